package file

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// opened is the file as it is open now, with the calls that are in the kernel.
type opened struct {
	cur    atomic.Pointer[handle] // nil after Close
	busy   chan struct{}          // one element per call in the kernel
	memory bool                   // contents live in memory: calls never wait
}

// hold is a reference to the current handle, nil once the disk is closed.
func (o *opened) hold() *handle {
	for {
		h := o.cur.Load()
		if h == nil || h.hold() {
			return h
		}
		// It was swapped and closed in between; the next one is there already.
	}
}

// enter waits for a place among the calls in the kernel, or for the end of r's root. Pairs with
// leave.
func (o *opened) enter(r *blk.Req) error {
	select {
	case o.busy <- struct{}{}:
		return nil
	default:
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	select {
	case o.busy <- struct{}{}:
		return nil
	case <-r.Done():
		return unix.ECANCELED
	}
}

func (o *opened) leave() { <-o.busy }

// begin is hold and enter for requests that may wait unless the file is in memory. Pairs with end.
func (o *opened) begin(r *blk.Req) (*handle, error) {
	if r.NoWait && !o.memory {
		return nil, blk.ErrWouldBlock
	}
	h := o.hold()
	if h == nil {
		return nil, blk.ErrClosed
	}
	if err := o.enter(r); err != nil {
		h.drop()
		return nil, err
	}
	return h, nil
}

func (o *opened) end(h *handle) {
	o.leave()
	h.drop()
}
