package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/jobs"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// A job that was told to complete, or to be finalized, is not held up by its speed any more:
// somebody waits for it.
func TestLastPassHasNoLimit(t *testing.T) {
	const size = 8 << 20
	for _, mode := range modes {
		for _, how := range []string{"complete", "cancel", "finalize"} {
			w := newWorldOf(t, size)
			a := w.args(mode)
			a.Sync, a.Speed = types.MirrorSyncModeNone, new(int64(1)) // what is dirty takes months
			a.AutoFinalize = new(how != "finalize")
			j := w.start(a)
			if !w.Await(ready) {
				t.Fatal(j.Err())
			}
			p := bytes.Repeat([]byte("x"), size)
			write := func() {
				if err := jobtest.Write(w.guest, 0, p); err != nil {
					t.Fatal(err)
				}
				copy(w.want, p)
			}
			guestAt := "target"
			if how != "finalize" {
				write()
			}
			if how == "cancel" {
				guestAt = "source"
				j.Cancel(false)
			} else if err := j.Complete(context.Background()); err != nil {
				t.Fatal(err)
			}
			if how == "finalize" {
				w.Await(func(e events.Event) bool { _, ok := e.(types.BlockJobPendingEvent); return ok })
				write()
				if err := j.Finalize(); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.end(j, guestAt); err != nil {
				t.Fatalf("%s, %s: %v", mode, how, err)
			}
			if !bytes.Equal(w.to.Bytes(), p) {
				t.Errorf("%s, %s: the target is not equal", mode, how)
			}
		}
	}
}

// What is done while a job is finalized ends when it is cancelled: here it waits for the target.
func TestCancelWhileFinalizing(t *testing.T) {
	const size = 8 << 20
	for _, mode := range modes {
		w := newWorldOf(t, size)
		a := w.args(mode)
		a.AutoFinalize = new(false)
		j := w.start(a)
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		if err := j.Complete(context.Background()); err != nil {
			t.Fatal(err)
		}
		w.Await(func(e events.Event) bool { _, ok := e.(types.BlockJobPendingEvent); return ok })
		undrain, err := w.g.Drain(context.Background(), w.target)
		if err != nil {
			t.Fatal(err)
		}
		p := bytes.Repeat([]byte("x"), size)
		if err := jobtest.Write(w.guest, 0, p); err != nil {
			t.Fatal(err)
		}
		copy(w.want, p)
		finalized := make(chan error)
		go func() { finalized <- j.Finalize() }()
		j.Cancel(true)
		if err := <-finalized; err != nil && j.Err() == nil {
			t.Error(err)
		}
		undrain()
		if err := w.end(j, "source"); !errors.Is(err, jobs.ErrCancelled) {
			t.Errorf("%s: outcome: %v", mode, err)
		}
	}
}

// What fails when a job is finalized ends it, whatever the policy is: it can neither pause nor try
// again for ever while somebody waits for the answer.
func TestFaultsWhileFinalizing(t *testing.T) {
	for _, mode := range modes {
		for _, policy := range []types.BlockdevOnError{
			types.BlockdevOnErrorStop, types.BlockdevOnErrorEnospc, types.BlockdevOnErrorIgnore,
		} {
			const size = 8 << 20 // more than is copied with the source held quiet
			w := newWorldOf(t, size)
			a := w.args(mode)
			a.AutoFinalize, a.OnTargetError = new(false), &policy
			j := w.start(a)
			if !w.Await(ready) {
				t.Fatal(j.Err())
			}
			if err := j.Complete(context.Background()); err != nil {
				t.Fatal(err)
			}
			w.Await(func(e events.Event) bool { _, ok := e.(types.BlockJobPendingEvent); return ok })
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify, Err: syscall.ENOSPC})
			if err := jobtest.Write(w.guest, 0, bytes.Repeat([]byte("x"), size)); err != nil {
				t.Fatal(err)
			}
			if err := j.Finalize(); err != nil {
				t.Errorf("%s, %s: %v", mode, policy, err)
			}
			if err := w.end(j, "source"); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("%s, %s: outcome: %v", mode, policy, err)
			}
		}
	}
}

// What a job tells of a guest's write that did not reach the target is what it does, also where it
// waits for that write to end: it fails, or pauses.
func TestFaultWhileHoldingQuiet(t *testing.T) {
	for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorReport, types.BlockdevOnErrorStop} {
		w := newWorld(t)
		a := w.args(types.MirrorCopyModeWriteBlocking)
		a.OnTargetError = &policy
		j := w.start(a)
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		entered, leave := make(chan struct{}), make(chan struct{})
		w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify, Count: 1}) // once: what is copied afterwards does not fail
		w.toF.Hook(holdFirst(entered, leave))
		p := bytes.Repeat([]byte("y"), granule)
		copy(w.want, p)
		written := make(chan error)
		go func() { written <- jobtest.Write(w.guest, 0, p) }()
		<-entered
		if err := j.Complete(context.Background()); err != nil {
			t.Fatal(err)
		}
		for r := w.guest.TryBegin(); r != nil; r = w.guest.TryBegin() { // until the source is held quiet
			w.guest.End(r)
			runtime.Gosched()
		}
		close(leave)
		if err := <-written; err != nil {
			t.Fatal(err)
		}
		guestAt, want := "source", error(syscall.EIO)
		if policy == types.BlockdevOnErrorStop {
			if !w.Await(jobtest.InState(types.JobStatusStandby)) {
				t.Fatalf("it has not paused: %v", j.Err())
			}
			if err := j.Resume(); err != nil {
				t.Fatal(err)
			}
			guestAt, want = "target", nil
		}
		if err := w.end(j, guestAt); !errors.Is(err, want) {
			t.Errorf("%s: outcome: %v", policy, err)
		}
		told := 0
		for _, e := range w.All() {
			if _, ok := e.(types.BlockJobErrorEvent); ok {
				told++
			}
		}
		if told != 1 {
			t.Errorf("%s: told of %d errors", policy, told)
		}
		if want == nil && !bytes.Equal(w.to.Bytes(), w.want) {
			t.Error("the target is not equal")
		}
	}
}

// holdFirst makes a hook that holds the first call up: it closes entered and waits for leave.
func holdFirst(entered chan<- struct{}, leave <-chan struct{}) func(drivertest.Op, int64, int64) {
	var once atomic.Bool
	return func(drivertest.Op, int64, int64) {
		if !once.Swap(true) {
			close(entered)
			<-leave
		}
	}
}

// TestFaultBesideOneThatIsIgnored: an error of a guest's write ends the job as its clients were
// told, also while another one, which is ignored, is tried again and again.
func TestFaultBesideOneThatIsIgnored(t *testing.T) {
	w := newWorld(t)
	a := w.args(types.MirrorCopyModeWriteBlocking)
	a.OnSourceError = new(types.BlockdevOnErrorIgnore)
	w.fromF.Inject(drivertest.Rule{Ops: drivertest.OpRead, N: 512})
	j := w.start(a)
	w.Await(func(e events.Event) bool {
		b, ok := e.(types.BlockJobErrorEvent)
		return ok && b.Action == types.BlockErrorActionIgnore
	})
	const at = 32 * granule
	w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify, Off: at, N: granule, Err: syscall.ENOSPC})
	p := bytes.Repeat([]byte("y"), granule)
	copy(w.want[at:], p)
	if err := jobtest.Write(w.guest, at, p); err != nil {
		t.Fatal(err)
	}
	if err := w.end(j, "source"); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("outcome: %v", err)
	}
}
