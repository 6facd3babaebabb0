package file

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/events/panics"
	"qblockd/graph/blk"
)

// behindBytes is how much jobs write before its write-back is started.
const behindBytes = 8 << 20

// behind starts the write-back of what jobs write while they go on: the flush at their end, which
// they all need, then finds little left, and the medium was not idle until then. What guests write
// is left to the kernel, which waits for more of it.
type behind struct {
	n    atomic.Int64 // bytes written since the last start
	busy atomic.Bool  // one is being started, which may take as long as the medium's queue is full
}

// startWriteBack starts the write-back of all that is cached of a file. Nothing depends on it; what
// it could tell, the flush will.
func startWriteBack(fd int) { _ = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE) }

// wrote is told of n bytes that r has written to h.
func (d *disk) wrote(r *blk.Req, h *handle, n int64) {
	if !r.Job || d.memory || d.direct || d.noFlush || d.behind.n.Add(n) < behindBytes ||
		!d.behind.busy.CompareAndSwap(false, true) {
		return
	}
	d.behind.n.Store(0)
	if !h.hold() {
		d.behind.busy.Store(false)
		return
	}
	panics.Go("write-back", func() {
		defer h.drop()
		defer d.behind.busy.Store(false)
		d.writeBack(h.fd)
	}, nil)
}
