package jobs

import (
	"context"
	"testing"
	"testing/synctest"

	"qblockd/jobs/machine"
	"qblockd/schema/types"
)

// idler becomes ready, if it is asked to, and waits for its end.
func idler(ready bool) func(context.Context, *Handle) error {
	return func(_ context.Context, h *Handle) error {
		if ready {
			h.Ready()
		}
		return h.Idle()
	}
}

// TestDeferEnd: a job that ends after the answer does so, and is over when answered returns; others
// end before.
func TestDeferEnd(t *testing.T) {
	for typ, late := range map[types.JobType]bool{types.JobTypeMirror: true, types.JobTypeCommit: false} {
		r := newRecorder()
		m := NewManager(r, nil)
		j, err := m.Create(Spec{ID: "j", Type: typ, Runner: &work{run: idler(true)}, Block: true, Instant: true})
		if err != nil {
			t.Fatal(err)
		}
		m.Start(j)
		const started = "j:created j:running j:ready j:READY"
		if got := r.String(); got != started {
			t.Fatalf("started: %s", got)
		}
		answered := j.DeferEnd(machine.Cancel)
		if err := j.Cancel(true); err != nil {
			t.Fatal(err)
		}
		const ended = started + " j:aborting j:CANCELLED j:concluded j:null"
		if got, want := r.String(), map[bool]string{true: started, false: ended}[late]; got != want {
			t.Errorf("late %v: before the answer %s, want %s", late, got, want)
		}
		answered()
		if got := r.String(); got != ended {
			t.Errorf("late %v: after the answer %s", late, got)
		}
	}
}

// TestAwaitAnswer: a job that was resumed is ready only when the command that did it has been
// answered.
func TestAwaitAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecorder()
		m := NewManager(r, nil)
		copied := make(chan struct{})
		w := &work{run: func(_ context.Context, h *Handle) error {
			h.Yield()
			<-copied
			h.AwaitAnswer()
			h.Ready()
			return h.Idle()
		}}
		j, err := m.Create(Spec{ID: "j", Type: types.JobTypeMirror, Block: true, Runner: w})
		if err != nil {
			t.Fatal(err)
		}
		m.Start(j)()
		answered := j.DeferEnd(machine.Resume)
		close(copied)
		const started = "j:created j:running"
		synctest.Wait()
		if got := r.String(); got != started {
			t.Errorf("before the answer: %s", got)
		}
		answered()
		synctest.Wait()
		if got, want := r.String(), started+" j:ready j:READY"; got != want {
			t.Errorf("after the answer: %s, want %s", got, want)
		}
		if err := m.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// TestSettle: a job on nodes that answer at once has done its work, or waits, when Start returns.
func TestSettle(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	create := func(id string, manual bool, run func(context.Context, *Handle) error) *Job {
		j, err := m.Create(Spec{
			ID: id, Type: types.JobTypeBackup, Runner: &work{run: run}, Block: true, Instant: true, ManualFinalize: manual,
		})
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	m.Start(create("a", false, func(_ context.Context, h *Handle) error { h.Yield(); return nil }))
	m.Start(create("b", true, func(context.Context, *Handle) error { return nil }))
	m.Start(create("c", false, idler(false)))
	const want = "a:created a:running a:waiting a:pending a:COMPLETED a:concluded a:null" +
		" b:created b:running b:waiting b:pending b:PENDING c:created c:running"
	if got := r.String(); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if err := m.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
}
