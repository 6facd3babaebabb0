package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/jobs"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// A job that is ready and cancelled gently leaves the guests at the source, and a copy of it in the
// target.
func TestGentleCancel(t *testing.T) {
	for _, mode := range modes {
		w := newWorld(t)
		stop := w.guests(w.guest)
		j := w.start(w.args(mode))
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		stop()
		if err := j.Cancel(false); err != nil {
			t.Fatal(err)
		}
		if err := w.end(j, "source"); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.from.Bytes(), w.want) || !bytes.Equal(w.to.Bytes(), w.want) {
			t.Fatalf("%s: the disks are not what the guests wrote", mode)
		}
	}
}

// times are when a job may end.
var times = []struct {
	name string
	hold func(w *world, a *types.BlockdevMirrorArgs)
	wait func(w *world, j *jobs.Job)
}{
	{"running", func(w *world, a *types.BlockdevMirrorArgs) { a.Speed = new(int64(1)) }, func(w *world, j *jobs.Job) {}},
	{"paused", func(w *world, a *types.BlockdevMirrorArgs) { a.Speed = new(int64(1)) }, func(w *world, j *jobs.Job) {
		if err := j.Pause(); err != nil {
			w.t.Error(err)
		}
		w.Await(until(types.JobStatusPaused))
	}},
	{"ready", func(*world, *types.BlockdevMirrorArgs) {}, func(w *world, j *jobs.Job) { w.Await(ready) }},
	{"standby", func(*world, *types.BlockdevMirrorArgs) {}, func(w *world, j *jobs.Job) {
		w.Await(ready)
		if err := j.Pause(); err != nil {
			w.t.Error(err)
		}
		w.Await(until(types.JobStatusStandby))
	}},
	{"pending", func(_ *world, a *types.BlockdevMirrorArgs) { a.AutoFinalize = new(false) }, func(w *world, j *jobs.Job) {
		w.Await(ready)
		if err := j.Complete(context.Background()); err != nil {
			w.t.Error(err)
		}
		w.Await(until(types.JobStatusPending))
	}},
}

// ends are how it may.
var ends = []struct {
	name string
	do   func(w *world, j *jobs.Job)
	err  error
}{
	{"cancel", func(w *world, j *jobs.Job) { j.Cancel(true) }, syscall.ECANCELED},
	{"source fails", func(w *world, j *jobs.Job) {
		w.fromF.Inject(drivertest.Rule{Ops: drivertest.OpRead})
		w.again(j)
	}, syscall.EIO},
	{"target fails", func(w *world, j *jobs.Job) {
		w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify})
		w.again(j)
	}, syscall.EIO},
	{"flush fails", func(w *world, j *jobs.Job) {
		w.toF.Inject(drivertest.Rule{Ops: drivertest.OpFlush})
		w.again(j)
	}, syscall.EIO},
	{"quit", func(w *world, j *jobs.Job) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := w.m.Shutdown(ctx); err != nil {
			w.t.Error(err)
		}
	}, syscall.ECANCELED},
}

func until(s types.JobStatus) func(e events.Event) bool {
	return func(e events.Event) bool { x, ok := e.(types.JobStatusChangeEvent); return ok && x.Status == s }
}

// However the job ends, in whatever phase, nothing of it is left and the guest's data are what it
// wrote.
func TestEnds(t *testing.T) {
	for _, mode := range modes {
		for _, p := range times {
			for _, e := range ends {
				over := p.name != "running" && p.name != "paused"
				if e.name == "source fails" && mode == types.MirrorCopyModeWriteBlocking && over {
					continue // nothing is read any more
				}
				t.Run(fmt.Sprintf("%s/%s/%s", mode, p.name, e.name), func(t *testing.T) {
					w := newWorld(t)
					a := w.args(mode)
					p.hold(w, &a)
					j := w.start(a)
					p.wait(w, j)
					e.do(w, j)
					w.mustEnd(j, e.name == "quit", e.err)
				})
			}
		}
	}
}

// mustEnd requires that the job ends with an error, and that nothing of it is left.
func (w *world) mustEnd(j *jobs.Job, quit bool, want error) {
	t := w.t
	if quit {
		<-j.Finished()
		if err := j.Err(); !errors.Is(err, want) {
			t.Errorf("outcome: %v", err)
		}
		if now := jobtest.Look(w.g); now != w.shape {
			t.Errorf("the graph is\n%s, want\n%s", now, w.shape)
		}
	} else if err := w.end(j, "source"); !errors.Is(err, want) {
		t.Errorf("outcome: %v", err)
	}
	if !bytes.Equal(w.from.Bytes(), w.want) {
		t.Error("the source is not what the guest wrote")
	}
}

// again lets the job do all it has to do, with something written first: it fails on its way.
func (w *world) again(j *jobs.Job) {
	p := bytes.Repeat([]byte("again"), 2000)
	if err := jobtest.Write(w.guest, 5*granule, p); err != nil {
		w.t.Error(err)
	}
	copy(w.want[5*granule:], p)
	j.SetSpeed(0)
	if j.UserPaused() {
		if err := j.Resume(); err != nil {
			w.t.Error(err)
		}
	}
	j.Complete(context.Background())
	j.Finalize()
}

// A job that is paused when it is told to complete does so when it is resumed.
func TestCompleteInStandby(t *testing.T) {
	w := newWorld(t)
	j := w.start(w.args(types.MirrorCopyModeBackground))
	if !w.Await(ready) {
		t.Fatal(j.Err())
	}
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	w.Await(func(e events.Event) bool {
		x, ok := e.(types.JobStatusChangeEvent)
		return ok && x.Status == types.JobStatusStandby
	})
	if err := j.Complete(context.Background()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-j.Finished():
		t.Error("a job ends while it is paused")
	default:
	}
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := w.end(j, "target"); err != nil {
		t.Error(err)
	}
}
