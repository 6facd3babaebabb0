package mirror_test

import (
	"bytes"
	"errors"
	"sync"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// remote is a file on another machine.
type remote struct{ *drivertest.Fault }

func (r remote) Caps() graph.Caps {
	c := r.Fault.Caps()
	c.Remote = true
	return c
}

// Over a network as many extents are under way as fit into the buffer, 16 at most, also while
// guests write: else each would wait for the answer to the one before. On this machine it is one.
func TestRemoteTarget(t *testing.T) {
	for _, c := range []struct {
		remote bool
		buffer int64
		want   int
	}{{true, 16 * granule, 16}, {true, 32 * granule, 16}, {true, 3 * granule, 3}, {false, 16 * granule, 1}} {
		w := newWorld(t)
		if c.remote {
			n := drivertest.AddNode(t, w.g, "remote", remote{w.toF})
			w.target, w.shape = n, jobtest.Look(w.g)
		}
		var mu sync.Mutex
		inside, most := 0, 0
		met := make(chan struct{}) // closed when as many as are expected have come together
		w.toF.Hook(func(op drivertest.Op, _, _ int64) {
			if op != drivertest.OpWrite {
				return
			}
			mu.Lock()
			if inside++; inside > most {
				if most = inside; most == c.want {
					close(met)
				}
			}
			mu.Unlock()
			<-met
			mu.Lock()
			inside--
			mu.Unlock()
		})
		a := w.args(types.MirrorCopyModeBackground)
		a.BufSize, a.Granularity = &c.buffer, new(uint32(granule))
		j := w.start(a)
		if err := jobtest.Write(w.guest, 0, w.want[:4096]); err != nil {
			t.Error(err)
		}
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		j.Cancel(false)
		if err := w.end(j, "source"); err != nil || most != c.want || !bytes.Equal(w.from.Bytes(), w.to.Bytes()) {
			t.Errorf("%+v: %v; %d extents at the same time", c, err, most)
		}
	}
}

// deaf is a target that answers nothing, as a server that is away, until nobody waits any more.
type deaf struct {
	remote
	came chan struct{} // gets each write
}

func (d deaf) WriteAt(r *blk.Req, _ blk.Vec, _ int64, _ blk.Flags) error {
	select {
	case d.came <- struct{}{}:
	default:
	}
	<-r.Done()
	return syscall.ECANCELED
}

func (d deaf) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return d.WriteAt(r, blk.Vec{}, off, f)
}

// A mirror that is cancelled by force does not wait for its target, and tells of no error.
func TestDeafTarget(t *testing.T) {
	for _, mode := range modes {
		w := newWorld(t)
		d := deaf{remote{w.toF}, make(chan struct{}, 1)}
		w.target = drivertest.AddNode(t, w.g, "deaf", d)
		w.shape = jobtest.Look(w.g)
		j := w.start(w.args(mode))
		<-d.came
		j.Cancel(true)
		if err := w.end(j, "source"); !errors.Is(err, syscall.ECANCELED) {
			t.Error(err)
		}
		for _, e := range w.All() {
			if _, ok := e.(types.BlockJobErrorEvent); ok {
				t.Errorf("%+v", e)
			}
		}
	}
}
