package jobs

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"qblockd/graph"
	"qblockd/schema/types"
)

// mirrorLike is work that can be told to change its mode.
type mirrorLike struct {
	work
	mode types.MirrorCopyMode
}

func (w *mirrorLike) ChangeCopyMode(to types.MirrorCopyMode) { w.mode = to }

// What a job was told since it started is recorded before it is so; what the recorder refuses is
// not so.
func TestChangesAreRecorded(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	args := &types.BlockdevMirrorArgs{Device: "disk"}
	w := &mirrorLike{work: work{run: untilCancelled}}
	j := start(t, m, Spec{ID: "j", Type: types.JobTypeMirror, Block: true, Speed: 5, Runner: w, Args: args})
	defer shutdown(t, m)
	g := graph.New(r)
	var told State
	var refuse error
	g.SetRecorder(func(l []graph.Change) error {
		if refuse == nil {
			told = l[0].Value.(State)
		}
		return refuse
	})
	if err := g.Enter(j.Record()); err != nil || told != (State{Args: args, Speed: 5}) {
		t.Fatalf("%v, told %v", err, told)
	}
	blocking := types.MirrorCopyModeWriteBlocking
	is := told
	for _, x := range []struct {
		name  string
		do    func() error
		after func(s *State)
	}{
		{"speed", func() error { return j.SetSpeed(7) }, func(s *State) { s.Speed = 7 }},
		{"mode", func() error { return j.ChangeCopyMode(blocking) }, func(s *State) { s.CopyMode = blocking }},
		{"pause", j.Pause, func(s *State) { s.Paused = true }},
		{"resume", j.Resume, func(s *State) { s.Paused = false }},
	} {
		shown := func() string { return fmt.Sprint(m.QueryBlock()[0].Speed, j.UserPaused(), w.mode) }
		before := shown()
		refuse = errors.New("no room")
		if err := x.do(); !errors.Is(err, refuse) || told != is || shown() != before {
			t.Errorf("%s, refused: %v, told %v, shown %v", x.name, err, told, shown())
		}
		refuse = nil
		x.after(&is)
		if err := x.do(); err != nil || told != is || shown() == before {
			t.Errorf("%s: %v, told %v, shown %v", x.name, err, told, shown())
		}
	}
	if err := j.SetSpeed(-1); err == nil || told != is {
		t.Errorf("%v, told %v", err, told)
	}
}

// A job that comes to its end while that is recorded does not take a verb any more, and what was
// recorded is taken back.
func TestEndsWhileRecorded(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	end := make(chan struct{})
	w := &work{run: func(_ context.Context, h *Handle) error { h.Yield(); <-end; return nil }}
	j := start(t, m, Spec{ID: "j", Type: types.JobTypeStream, Block: true, ManualFinalize: true, Runner: w})
	defer shutdown(t, m)
	g := graph.New(r)
	var told []State
	g.SetRecorder(func(l []graph.Change) error {
		if told = append(told, l[0].Value.(State)); len(told) == 2 {
			close(end)
			r.wait("j:pending")
		}
		return nil
	})
	if err := g.Enter(j.Record()); err != nil {
		t.Fatal(err)
	}
	err := j.Pause()
	if err == nil || err.Error() != "Job 'j' in state 'pending' cannot accept command verb 'pause'" {
		t.Error(err)
	}
	if len(told) != 3 || !told[1].Paused || told[2].Paused {
		t.Errorf("told %v", told)
	}
}
