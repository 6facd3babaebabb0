package file

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/events/panics"
)

// handle is an open file. It is closed when the last reference goes: the driver's own,
// those of running requests, those of mapping leases.
type handle struct {
	fd       int
	writable bool
	refs     atomic.Int64 // > 0 while open; once 0 it stays 0
}

func newHandle(fd int, writable bool) *handle {
	h := &handle{fd: fd, writable: writable}
	h.refs.Store(1)
	return h
}

// hold takes a reference; false if the handle is closed already.
func (h *handle) hold() bool {
	for {
		n := h.refs.Load()
		if n <= 0 {
			return false
		}
		if h.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// drop gives a reference back; the last one closes the file, which may block on network
// file systems.
func (h *handle) drop() {
	if h.refs.Add(-1) == 0 {
		_ = unix.Close(h.fd) // data was flushed before; there is nothing left to lose
	}
}

// Release ends a mapping's lease (blk.Lease). It never blocks: a close that falls to it
// happens in the background.
func (h *handle) Release() {
	if h.refs.Add(-1) == 0 {
		panics.Go("closing a file", func() { _ = unix.Close(h.fd) }, nil)
	}
}
