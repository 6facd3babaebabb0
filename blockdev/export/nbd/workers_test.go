package nbd

import (
	"context"
	"sync/atomic"
	"testing"

	"qblockd/blockdev/export"
	"qblockd/blockdev/nbdwire"
)

// group is an export.Workers of one worker.
type group struct {
	free    chan struct{}
	entered atomic.Int64
}

func newGroup() *group {
	g := &group{free: make(chan struct{}, 1)}
	g.free <- struct{}{}
	return g
}

func (g *group) Enter(ctx context.Context) error {
	select {
	case <-g.free:
		g.entered.Add(1)
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *group) Leave() { g.free <- struct{}{} }

// TestWorkers: requests that have to wait enter the group of the time, others do not.
func TestWorkers(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	a, b := newGroup(), newGroup()
	var now atomic.Pointer[group]
	_, _, path := server(t, d, Options{}, func(s *Spec) {
		s.Workers = func() export.Workers {
			if g := now.Load(); g != nil {
				return g
			}
			return nil
		}
	})
	c := open(t, path, nbdwire.Structured)
	write := func() {
		t.Helper()
		if x := c.do(wr(0, 4096), make([]byte, 4096)...); x.errno != 0 {
			t.Fatalf("errno %d", x.errno)
		}
	}
	now.Store(a)
	write() // needs no wait
	d.wouldBlock.Store(true)
	write()
	now.Store(b)
	write()
	now.Store(nil)
	write()
	if a.entered.Load() != 1 || b.entered.Load() != 1 {
		t.Errorf("%d and %d requests in the groups", a.entered.Load(), b.entered.Load())
	}
}

// TestWorkersAtTheGate: a request at a closed gate holds no worker, and one without a worker does
// not hold the gate.
func TestWorkersAtTheGate(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	d.wouldBlock.Store(true)
	g := newGroup()
	_, _, path := server(t, d, Options{}, func(s *Spec) { s.Workers = func() export.Workers { return g } })
	c := open(t, path, nbdwire.Simple)
	<-g.free
	q := wr(0, 4096)
	c.put(append(q.Append(nil), make([]byte, 4096)...))
	// There is no free worker: the drain has nobody to wait for.
	eventually(t, "nobody is inside", func() bool { return d.inside.Load() == 0 })
	openGate := d.closeGate()
	g.free <- struct{}{}
	eventually(t, "the request has entered and left", func() bool { return g.entered.Load() == 1 && len(g.free) == 1 })
	openGate()
	if x := c.reply(q); x.errno != 0 {
		t.Errorf("errno %d", x.errno)
	}
	// A connection that ends does not wait for workers: the server stops in time.
	<-g.free
	c.put(append(q.Append(nil), make([]byte, 4096)...))
}
