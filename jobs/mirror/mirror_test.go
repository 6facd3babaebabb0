package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// Guests write before, while and after the target takes the place of the source; nothing is lost.
func TestPivotUnderLoad(t *testing.T) {
	for _, mode := range modes {
		for range 5 {
			w := newWorld(t)
			stop := w.guests(w.guest)
			j := w.start(w.args(mode))
			if !w.Await(ready) {
				t.Fatal(j.Err())
			}
			if err := j.Complete(context.Background()); err != nil {
				t.Fatal(err)
			}
			if err := w.end(j, "target"); err != nil {
				t.Fatal(err)
			}
			stop()
			if !bytes.Equal(w.to.Bytes(), w.want) {
				t.Fatalf("%s: the target is not what the guests wrote", mode)
			}
		}
	}
}

// Writes that overlap, and writes past the filter, come in the same order to both sides.
func TestOverlappingWrites(t *testing.T) {
	for _, mode := range modes {
		for range 5 {
			w := newWorld(t)
			j := w.start(w.args(mode))
			past := drivertest.AddRoot(t, w.g, w.source, drivertest.Writer)
			var wg sync.WaitGroup
			for g := range 4 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(g), 11))
					root := w.guest
					if g == 3 {
						root = past
					}
					for i := range 300 {
						n := 512 * (1 + r.Int64N(64))
						p := bytes.Repeat([]byte{byte(i), byte(g)}, int(n/2))
						if err := jobtest.Write(root, 512*r.Int64N(4*granule/512), p); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if !w.Await(ready) {
				t.Fatal(j.Err())
			}
			line, _, _ := strings.Cut(w.shape, "\n")
			w.shape = line + "\n" + w.shape // of the other root
			j.Cancel(false)
			if err := w.end(j, "source"); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(w.from.Bytes(), w.to.Bytes()) {
				t.Fatalf("%s: the two sides differ", mode)
			}
		}
	}
}

// A mirror of a guest that never stops writing gets ready in write-blocking mode: each granule is
// copied once at most after the switch.
func TestWriteBlockingConverges(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	copied := map[int64]int{}
	w.fromF.Hook(func(op drivertest.Op, off, n int64) {
		if op == drivertest.OpRead {
			mu.Lock()
			defer mu.Unlock()
			for g := off / granule; g < (off+n+granule-1)/granule; g++ {
				copied[g]++
			}
		}
	})
	stop := w.guests(w.guest)
	j := w.start(w.args(types.MirrorCopyModeWriteBlocking))
	if !w.Await(ready) {
		t.Fatal(j.Err())
	}
	mu.Lock()
	for g, n := range copied {
		if n > 2 { // once for what was there, once for what was written before the switch
			t.Errorf("granule %d was copied %d times", g, n)
		}
	}
	mu.Unlock()
	j.Cancel(true)
	stop()
	if err := w.end(j, "source"); !errors.Is(err, syscall.ECANCELED) {
		t.Error(err)
	}
}

// A job that waits to be finalized does not hold up its guests, and what they write meanwhile is
// not lost.
func TestWriteWhilePending(t *testing.T) {
	for _, mode := range modes {
		w := newWorld(t)
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
		p := bytes.Repeat([]byte("written while pending "), 400000)[:8<<20>>1]
		if err := jobtest.Write(w.guest, 0, p[:size]); err != nil {
			t.Fatal(err)
		}
		copy(w.want, p)
		if err := j.Finalize(); err != nil {
			t.Fatal(err)
		}
		if err := w.end(j, "target"); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.to.Bytes(), w.want) {
			t.Errorf("%s: what was written while the job was pending is lost", mode)
		}
	}
}

// The i-th I/O of the job fails: it ends with that error, or, told to stop, goes on when it is
// resumed.
func TestFaults(t *testing.T) {
	for _, mode := range modes {
		for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorReport, types.BlockdevOnErrorStop} {
			for _, side := range []func(w *world) *drivertest.Fault{
				func(w *world) *drivertest.Fault { return w.fromF }, func(w *world) *drivertest.Fault { return w.toF },
			} {
				for i := 0; ; i++ {
					if !faultAt(t, mode, policy, side, i) {
						break
					}
				}
			}
		}
	}
}

// faultAt tells whether there was an i-th I/O.
func faultAt(
	t *testing.T, mode types.MirrorCopyMode, policy types.BlockdevOnError, side func(w *world) *drivertest.Fault, i int,
) bool {
	w := newWorld(t)
	f := side(w)
	f.FailAt(i, syscall.EIO)
	a := w.args(mode)
	a.OnSourceError, a.OnTargetError = &policy, &policy
	j := w.start(a)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			seen := 0
			if !w.Await(func(e events.Event) bool {
				x, ok := e.(types.JobStatusChangeEvent)
				if ok && x.Status == types.JobStatusPaused || ok && x.Status == types.JobStatusStandby {
					seen++
				}
				return seen > n
			}) {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			h, err := w.g.HoldNodes(ctx, w.source, w.target)
			if err != nil {
				t.Errorf("a job that waits for users keeps them from its nodes: %v", err)
			}
			h.Release()
			cancel()
			j.Resume()
		}
	}()
	at := "source"
	if w.Await(ready) {
		p := bytes.Repeat([]byte("late"), 4096)
		err := jobtest.Write(w.guest, 10*granule+512, p)
		if err == nil {
			copy(w.want[10*granule+512:], p)
		} else if side(w) == w.toF {
			t.Errorf("a guest's write fails with the target: %v", err)
		}
		j.Complete(context.Background())
	}
	<-j.Finished()
	failed := f.Failed() > 0
	if j.Err() == nil {
		at = "target"
	}
	err := w.end(j, at)
	<-done
	if err != nil && (policy == types.BlockdevOnErrorStop || !failed || !errors.Is(err, syscall.EIO)) {
		t.Fatalf("%s, %s: I/O %d fails: %v", mode, policy, i, err)
	}
	if err == nil && !bytes.Equal(w.to.Bytes(), w.want) && !bytes.Equal(w.to.Bytes(), w.from.Bytes()) {
		t.Fatalf("%s, %s: I/O %d fails: the target differs", mode, policy, i)
	}
	return failed
}

// Of two that start at the same time on the same source one is refused, and nothing of it is left.
func TestTwoAtOnce(t *testing.T) {
	for range 20 {
		w := newWorld(t)
		targets := []*graph.Node{w.target, drivertest.AddNode(t, w.g, "other", drivertest.MemFileOf(noise(3)))}
		w.shape = jobtest.Look(w.g)
		var wg sync.WaitGroup
		var errs [2]error
		for i := range errs {
			wg.Go(func() {
				a := w.args(types.MirrorCopyModeBackground)
				a.JobID, a.Target = new(fmt.Sprint("j", i)), targets[i].Name()
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
		if err := w.end(j, "source"); err != nil && !errors.Is(err, syscall.ECANCELED) {
			t.Fatal(err)
		}
	}
}
