package jobs

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"qblockd/schema/types"
)

// group creates all jobs of a transaction and then starts them.
func group(t *testing.T, m *Manager, txn *Txn, members map[string]*work) {
	t.Helper()
	var all []*Job
	for id, w := range members {
		j, err := m.Create(Spec{ID: id, Type: types.JobTypeStream, Block: true, Txn: txn, Runner: w})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, j)
	}
	for _, j := range all {
		m.Start(j)()
	}
}

func TestPrepareFails(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	w := &work{prepare: syscall.ENOSPC}
	start(t, m, Spec{ID: "j", Type: types.JobTypeStream, Runner: w, Block: true})
	const want = "j:created j:running j:waiting j:pending j:aborting j:COMPLETED(No space left on device) j:concluded j:null"
	if got := r.wait("j:null"); got != want {
		t.Errorf("events %q, want %q", got, want)
	}
	if w.said() != "prepare abort clean" {
		t.Errorf("calls: %s", w.said())
	}
}

func TestTransactionFailsTogether(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	txn := m.NewTxn()
	fail := make(chan struct{})
	group(t, m, txn, map[string]*work{
		"done": {},
		"busy": {run: untilCancelled},
		"bad":  {run: func(_ context.Context, h *Handle) error { h.Yield(); <-fail; return syscall.EIO }},
	})
	r.wait("done:waiting")
	close(fail)
	r.wait("bad:null")
	r.wait("busy:null")
	got := r.wait("done:null")
	for _, want := range []string{"done:aborting", "busy:aborting", "bad:aborting", "done:CANCELLED", "busy:CANCELLED",
		"bad:COMPLETED(Input/output error)"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in %q", want, got)
		}
	}
}

func TestTransactionSucceedsTogether(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	txn := m.NewTxn()
	gate := make(chan struct{})
	group(t, m, txn, map[string]*work{
		"a": {},
		"b": {run: func(_ context.Context, h *Handle) error { h.Yield(); <-gate; return nil }},
	})
	if got := r.wait("a:waiting"); strings.Contains(got, "a:pending") {
		t.Errorf("a did not wait for b: %q", got)
	}
	close(gate)
	r.wait("b:null")
	got := r.wait("a:null")
	if !(strings.Index(got, "b:waiting") < strings.Index(got, "a:pending") && strings.Index(got, "b:pending") < strings.Index(got, "a:COMPLETED")) {
		t.Errorf("events %q", got)
	}
}

// One of two jobs is cancelled: both end so, whatever the other was doing.
func TestTransactionCancelledTogether(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	group(t, m, m.NewTxn(), map[string]*work{"a": {run: untilCancelled}, "b": {run: untilCancelled}})
	if err := m.Get("a").Cancel(true); err != nil {
		t.Fatal(err)
	}
	r.wait("a:null")
	got := r.wait("b:null")
	if !strings.Contains(got, "a:CANCELLED") || !strings.Contains(got, "b:CANCELLED") {
		t.Errorf("events %q", got)
	}
}

// One job fails at the moment when the other is cancelled: each ends once.
func TestTransactionFailsWhileCancelled(t *testing.T) {
	for range 100 {
		r := newRecorder()
		m := NewManager(r, nil)
		fail := make(chan struct{})
		group(t, m, m.NewTxn(), map[string]*work{
			"bad":  {run: func(_ context.Context, h *Handle) error { h.Yield(); <-fail; return syscall.EIO }},
			"busy": {run: untilCancelled},
		})
		busy := m.Get("busy")
		close(fail)
		_ = busy.Cancel(true) // refused if it has ended already
		r.wait("bad:null")
		got := r.wait("busy:null")
		for _, id := range []string{"bad", "busy"} {
			if n := strings.Count(got, id+":concluded"); n != 1 {
				t.Fatalf("%s was concluded %d times: %q", id, n, got)
			}
		}
		shutdown(t, m)
	}
}

// lastWork is work that meets a pause point and an error when it is finalized.
type lastWork struct {
	work
	action ErrorAction
	paused error
}

func (w *lastWork) Prepare(_ context.Context, h *Handle) error {
	if w.paused = h.Checkpoint(); w.paused != nil {
		return w.paused
	}
	w.action, w.paused = h.OnErrorIdle(types.IoOperationTypeWrite, types.BlockdevOnErrorStop, syscall.EIO)
	return syscall.EIO
}

// A job whose work is over does not pause, neither for an error nor because it was told to just
// before: it could not be resumed.
func TestNoPauseWhileFinalizing(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	w := &lastWork{}
	w.run = func(_ context.Context, h *Handle) error {
		h.Yield()
		return h.j.Pause()
	}
	j := start(t, m, Spec{
		ID: "a", Type: types.JobTypeMirror, Runner: w, Block: true, ManualFinalize: true, ManualDismiss: true,
	})
	r.wait("a:PENDING")
	if err := j.Finalize(); err != nil {
		t.Fatal(err)
	}
	<-j.Finished()
	if w.paused != nil || w.action != types.BlockErrorActionReport || !errors.Is(j.Err(), syscall.EIO) {
		t.Errorf("paused: %v; action %v; outcome %v", w.paused, w.action, j.Err())
	}
}
