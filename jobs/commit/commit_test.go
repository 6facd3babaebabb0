package commit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// Guests read what they always read, before, while and after two layers go into the base, which
// grows.
func TestCommitUnderReaders(t *testing.T) {
	for range 5 {
		w := newWorld(t)
		stop := w.readers()
		w.committed(w.start(w.args()))
		stop()
	}
}

// A base that is longer than the top does not come to light where an overlay that is longer, too,
// read zeroes.
func TestLongBase(t *testing.T) {
	for _, active := range []int{14, 20, 24} {
		w := newWorldOf(t, 20, active+2)
		stop := w.readers()
		w.committed(w.start(w.args()))
		stop()
	}
}

// However the job ends, in whatever phase, the graph is what it was and guests read what they read.
func TestEnds(t *testing.T) {
	phases := map[string]struct {
		hold func(a *types.BlockCommitArgs)
		wait func(w *world, j *jobs.Job)
	}{
		"running": {func(a *types.BlockCommitArgs) { a.Speed = new(int64(1)) }, func(*world, *jobs.Job) {}},
		"paused": {func(a *types.BlockCommitArgs) { a.Speed = new(int64(1)) }, func(w *world, j *jobs.Job) {
			if err := j.Pause(); err != nil {
				w.t.Error(err)
			}
			w.Await(jobtest.InState(types.JobStatusPaused))
		}},
		"pending": {func(a *types.BlockCommitArgs) { a.AutoFinalize = new(false) }, untilPending},
	}
	fail := func(name string, ops drivertest.Op) func(w *world, j *jobs.Job) {
		return func(w *world, j *jobs.Job) {
			w.files[name].Inject(drivertest.Rule{Ops: ops})
			j.SetSpeed(0)
			if j.UserPaused() {
				if err := j.Resume(); err != nil {
					w.t.Error(err)
				}
			}
			if w.Await(jobtest.InState(types.JobStatusPending)) {
				j.Finalize()
			}
		}
	}
	ends := map[string]struct {
		do  func(w *world, j *jobs.Job)
		err error
	}{
		"cancel":        {func(w *world, j *jobs.Job) { j.Cancel(true) }, syscall.ECANCELED},
		"base fails":    {fail("base", drivertest.OpModify), syscall.EIO},
		"flush fails":   {fail("base", drivertest.OpFlush), syscall.EIO},
		"overlay fails": {fail("active", drivertest.OpModify), syscall.EIO},
		"quit": {func(w *world, j *jobs.Job) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := w.m.Shutdown(ctx); err != nil {
				w.t.Error(err)
			}
		}, syscall.ECANCELED},
	}
	for phase, p := range phases {
		for end, e := range ends {
			t.Run(phase+"/"+end, func(t *testing.T) {
				w := newWorld(t)
				a := w.args()
				p.hold(&a)
				j := w.start(a)
				p.wait(w, j)
				e.do(w, j)
				if <-j.Finished(); !errors.Is(j.Err(), e.err) {
					t.Errorf("outcome: %v", j.Err())
				}
				for _, f := range w.files {
					f.Clear()
				}
				if now := jobtest.Look(w.g); now != w.shape {
					t.Errorf("the graph is\n%s, it was\n%s", now, w.shape)
				}
				if !bytes.Equal(w.read(), w.want) {
					t.Error("what a guest reads has changed")
				}
			})
		}
	}
}

// The i-th I/O of any file fails: the job ends with that error and the graph is what it was, or,
// told to stop, it goes on when it is resumed. Guests read what they always read.
func TestFaults(t *testing.T) {
	for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorReport, types.BlockdevOnErrorStop} {
		for _, file := range []string{"base", "mid", "top", "active"} {
			for i := 0; faultAt(t, policy, file, i); i++ {
			}
		}
	}
}

// faultAt tells whether there was an i-th I/O.
func faultAt(t *testing.T, policy types.BlockdevOnError, file string, i int) bool {
	w := newWorld(t)
	f := w.files[file]
	f.FailAt(i, syscall.EIO)
	a := w.args()
	a.OnError = &policy
	j := w.start(a)
	resumed := make(chan struct{})
	go func() {
		defer close(resumed)
		if w.Await(jobtest.InState(types.JobStatusPaused)) {
			j.Resume()
		}
	}()
	<-j.Finished()
	<-resumed
	failed := f.Failed() > 0
	if j.Err() == nil {
		w.committed(j)
		return failed
	}
	if err := w.finished(j); !failed || !errors.Is(err, syscall.EIO) {
		t.Fatalf("%s, %s: I/O %d fails: %v", policy, file, i, err)
	}
	if !bytes.Equal(w.read(), w.want) {
		t.Fatalf("%s, %s: I/O %d fails: what a guest reads has changed", policy, file, i)
	}
	if now := jobtest.Look(w.g); now != w.shape {
		t.Fatalf("%s, %s: I/O %d fails: the graph is\n%s, it was\n%s", policy, file, i, now, w.shape)
	}
	return failed
}

// Guests go on writing while the layer that they write to is committed, and then write to the base.
func TestActiveCommitUnderLoad(t *testing.T) {
	for _, complete := range []bool{true, false} {
		w := newWorld(t)
		a := w.args()
		a.TopNode = nil
		release, err := w.begin(a)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for g := range 3 {
			wg.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					at := int64(i*7%16)*cluster + int64(g)*4096
					p := bytes.Repeat([]byte{byte(i), byte(g)}, 2048)
					copy(w.want[at:], p)
					w.write(w.guest, at, p)
				}
			})
		}
		release()
		j := w.m.Get("j")
		if !w.Await(jobtest.InState(types.JobStatusReady)) {
			t.Fatal(j.Err())
		}
		if complete {
			err = j.Complete(context.Background())
		} else {
			err = j.Cancel(false)
		}
		if err != nil {
			t.Fatal(err)
		}
		err = w.finished(j)
		close(stop)
		wg.Wait()
		if err != nil || !bytes.Equal(w.read(), w.want) {
			t.Fatalf("%v, or guests read what they did not write", err)
		}
		if n := w.guest.Node().Name(); complete != (n == "base") {
			t.Errorf("the guest is at %s", n)
		}
		if now := jobtest.Look(w.g); !complete && now != w.shape {
			t.Errorf("the graph is\n%s, it was\n%s", now, w.shape)
		}
	}
}

// Of two that start at the same time on one read-only base one is refused; the base is read-only
// again in the end.
func TestTwoAtOnce(t *testing.T) {
	for range 20 {
		w := newWorld(t)
		if err := w.g.SwitchReadOnly(context.Background(), true, w.nodes["base"]); err != nil {
			t.Fatal(err)
		}
		w.shape = jobtest.Look(w.g)
		var wg sync.WaitGroup
		var errs [2]error
		for i := range errs {
			wg.Go(func() {
				a := w.args()
				a.JobID, a.Speed = new(fmt.Sprint("j", i)), new(int64(1))
				release, err := w.begin(a)
				if errs[i] = err; err == nil {
					release()
				}
			})
		}
		wg.Wait()
		if (errs[0] == nil) == (errs[1] == nil) {
			t.Fatalf("%v, %v", errs[0], errs[1])
		}
		j := w.m.Get("j0")
		if errs[0] != nil {
			j = w.m.Get("j1")
		}
		_ = j.Cancel(true)
		if err := w.finished(j); err != nil && !errors.Is(err, syscall.ECANCELED) {
			t.Fatal(err)
		}
		if now := jobtest.Look(w.g); now != w.shape {
			t.Fatalf("the graph is\n%s, it was\n%s", now, w.shape)
		}
	}
}

// TestRecordOfReadOnlyBase: a base that is writable for the time of the job is recorded as what it
// will be: read-only, unless it takes the place of the layer that guests write to.
func TestRecordOfReadOnlyBase(t *testing.T) {
	for _, c := range []struct {
		name             string
		active, complete bool
		after            bool // read-only
	}{
		{"top", false, true, true},
		{"active, cancelled", true, false, true},
		{"active", true, true, false},
	} {
		w := newWorld(t)
		base := w.nodes["base"]
		if err := w.g.SwitchReadOnly(t.Context(), true, base); err != nil {
			t.Fatal(err)
		}
		var recorded atomic.Pointer[graph.NodeState]
		w.g.SetRecorder(func(l []graph.Change) error {
			for _, x := range l {
				if s, ok := x.Value.(graph.NodeState); ok && x.Key.Name == "base" {
					recorded.Store(&s)
				}
			}
			return nil
		})
		expect := func(when string, readOnly, recordedSo bool) {
			t.Helper()
			s := recorded.Load()
			if base.ReadOnly() != readOnly || s == nil || s.ReadOnly != recordedSo || s.Options.ReadOnly != recordedSo ||
				graph.StateOf(base) != *s {
				t.Errorf("%s, %s: read-only is %v, recorded is %+v", c.name, when, base.ReadOnly(), s)
			}
		}
		a := w.args()
		a.AutoFinalize = new(c.active)
		if c.active {
			a.TopNode = nil
		}
		j, ready := w.start(a), jobtest.InState(types.JobStatusReady)
		if !c.active {
			ready = jobtest.InState(types.JobStatusPending)
		}
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		expect("at work", false, true)
		var err error
		switch {
		case !c.active:
			err = j.Finalize()
		case c.complete:
			err = j.Complete(t.Context())
		default:
			err = j.Cancel(false)
		}
		if err := errors.Join(err, w.finished(j)); err != nil {
			t.Fatal(err)
		}
		expect("afterwards", c.after, c.after)
	}
}

// A base of 64 TiB below a short top, and an overlay as long: what the base shows beyond the end of
// the top is hidden where there is something, and only there.
func TestHugeBase(t *testing.T) {
	w := newWorldOf(t, 1<<30, 1<<30)
	before := w.files["active"].Size()
	w.committed(w.start(w.args()))
	if grown := w.files["active"].Size() - before; grown > 1<<20 {
		t.Errorf("the overlay has grown by %d bytes", grown)
	}
}

func untilPending(w *world, _ *jobs.Job) { w.Await(jobtest.InState(types.JobStatusPending)) }
