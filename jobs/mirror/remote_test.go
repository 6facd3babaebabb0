package mirror_test

import (
	"bytes"
	"sync"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
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
