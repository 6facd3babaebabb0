package mirror

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"qblockd/schema/types"
)

// TestPhases: the edges that exist can be taken, all others panic.
func TestPhases(t *testing.T) {
	want := map[phase]string{copying: "ready ended ", ready: "ending ended ", ending: "ended ", ended: ""}
	for from := range phases {
		got := ""
		for to := range phases {
			func() {
				defer func() {
					if recover() == nil {
						got += phaseNames[to] + " "
					}
				}()
				if s := (state{phase: from, pivot: true, both: true}).to(to); s.phase != to || !s.pivot || s.both != (to != ended) {
					t.Errorf("%s to %s: %+v", phaseNames[from], phaseNames[to], s)
				}
			}()
		}
		if got != want[from] {
			t.Errorf("from %s to %s, want %s", phaseNames[from], got, want[from])
		}
	}
}

// TestTurn: guests' writes go to both sides if the user wants that, or the job does not converge,
// but never for a job that has failed or ended.
func TestTurn(t *testing.T) {
	for p := range phases {
		for _, mode := range []types.MirrorCopyMode{types.MirrorCopyModeBackground, types.MirrorCopyModeWriteBlocking} {
			for _, failed := range []bool{false, true} {
				for _, converge := range []bool{false, true} {
					s := state{phase: p, mode: mode, both: true}
					if failed {
						if s = s.fail(errors.New("failed")); s.both {
							t.Error("failed: guests' writes go to both sides")
						}
					}
					want := p != ended && !failed && (converge || mode == types.MirrorCopyModeWriteBlocking)
					if got := s.turn(converge).both; got != want {
						t.Errorf("%+v, converge %v: to both sides %v", s, converge, got)
					}
				}
			}
		}
	}
}

// TestFirstFailureCounts: a job fails once.
func TestFirstFailureCounts(t *testing.T) {
	var l life
	first := errors.New("first")
	l.fail(first)
	l.fail(errors.New("second"))
	if l.failure() != first {
		t.Error(l.failure())
	}
}

// TestComplete: a job takes the request until it is about to leave the graph.
func TestComplete(t *testing.T) {
	for p := range phases {
		s := state{phase: p}.complete()
		if s.pivot != (p < ending) {
			t.Errorf("%s: pivot %v", phaseNames[p], s.pivot)
		}
		if s.endAsked(false) != (p == ready) || (state{phase: p}).endAsked(true) != (p == ready) {
			t.Errorf("%s: is about to end, or is not", phaseNames[p])
		}
	}
}

// TestNext is what a job does for all that it may find.
func TestNext(t *testing.T) {
	const some, much = 1 << 20, lastCopy + 1
	for _, c := range []struct {
		s           state
		cancelled   bool
		dirty, most int64
		want        step
	}{
		{state{}, false, 0, 0, getEven},
		{state{}, true, 0, 0, getEven}, // a cancel of a job that is not ready is one by force
		{state{}, false, some, 0, copyOn},
		{state{}, false, some, some, getEven},
		{state{phase: ready}, false, 0, 0, rest},
		{state{phase: ready}, false, some, much, copyOn},
		{state{phase: ready}, true, 0, 0, end},
		{state{phase: ready, pivot: true}, false, some, 0, end},
		{state{phase: ready, pivot: true}, false, much, 0, copyOn},
		{state{phase: ready, pivot: true}, false, much, much, end},
	} {
		if got := c.s.next(c.cancelled, c.dirty, c.most); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// TestPace: after a few passes in vain guests' writes go to both sides, then the source is held
// quiet, for longer and longer, but not without bound.
func TestPace(t *testing.T) {
	var p pace
	got, last := "", int64(-1)
	for range 400 {
		if m := p.most(); p.stuck() && m != last {
			got += fmt.Sprint(p.passes, ":", m>>20, " ")
			last = m
		}
		p.passed(100<<20, time.Second)
	}
	if want := "3:0 6:2 26:4 46:8 66:16 86:32 106:64 126:128 146:256 166:512 "; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	p.passed(1<<62, 0)
	if m := p.most(); m != 1<<50 {
		t.Errorf("a pass in no time: %d", m)
	}
}
