package file

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// maxBusy is how many blocking calls of one node are in the kernel at once; each holds a thread.
const maxBusy = 64

// disk is an open file or device: the driver behind both names.
type disk struct {
	settings
	block  bool // a block device; implies device
	direct bool // O_DIRECT with its restrictions (settings.direct: asked for)
	memory bool // contents live in memory: calls never wait
	local  bool // no server of a file system has a part in what becomes of the file
	limits blk.Limits

	cur  atomic.Pointer[handle] // nil after Close
	size atomic.Int64           // what Size says: eof rounded up to sectors
	eof  atomic.Int64           // the file's own length as far as we know; 0 <= eof <= size
	id   graph.FileID           // which file it is

	busy   chan struct{} // one element per call in the kernel
	pace   pace
	behind behind
	lost   atomic.Uint32 // errno of the sync that lost cached writes, 0: none

	// What the file system was found to take; cleared at the first refusal.
	nowaitRead, nowaitWrite, dsync  atomic.Bool
	canZero, canPunch, canAllocate  atomic.Bool
	discardOK, discardErr, discardN atomic.Int64

	extent  atomic.Pointer[extent] // last data extent met by Status
	seeking sync.Mutex             // held while the next one of a file in memory is looked for

	engine    *engine            // carries reads and writes; nil: blocking calls
	fdatasync func(fd int) error // unix.Fdatasync but in tests
	writeBack func(fd int)       // startWriteBack but in tests

	// permSlot holds one element while a permission change is being prepared, or an abandoned
	// one is still stuck in the kernel. The fields below belong to who put it there.
	permSlot chan struct{}
	held     lockSet  // committed lock bytes, on cur
	pending  *pending // prepared, neither committed nor aborted

	// next are the settings that a reopen is about to change to, nil otherwise. It belongs to the
	// transaction that has the node.
	next *settings
}

var (
	_ graph.Writer        = (*disk)(nil)
	_ graph.Zeroer        = (*disk)(nil)
	_ graph.Flusher       = (*disk)(nil)
	_ graph.Lagging       = (*disk)(nil)
	_ graph.Discarder     = (*disk)(nil)
	_ graph.BlockStatuser = (*disk)(nil)
	_ graph.Mapper        = (*disk)(nil)
	_ graph.CopyRanger    = (*disk)(nil)
	_ graph.Resizer       = (*disk)(nil)
	_ graph.PermTaker     = (*disk)(nil)
	_ graph.Sizer         = (*disk)(nil)
)

// Caps implements graph.Driver.
func (d *disk) Caps() graph.Caps {
	return graph.Caps{
		Limits:     d.limits,
		WriteFlags: blk.FUA,
		ZeroFlags:  blk.MayUnmap | blk.NoFallback,
		ZeroInit:   !d.device,
	}
}

// Size implements graph.Driver: the length of the file rounded up to 512 bytes.
func (d *disk) Size() int64 { return d.size.Load() }

// FileID implements graph.Identified.
func (d *disk) FileID() graph.FileID { return d.id }

// ActualSize implements graph.Sizer.
func (d *disk) ActualSize() (int64, error) {
	h := d.hold()
	if h == nil {
		return 0, blk.ErrClosed
	}
	defer h.drop()
	var st unix.Stat_t
	if err := unix.Fstat(h.fd, &st); err != nil {
		return 0, err
	}
	return st.Blocks * blk.SectorSize, nil
}

// Close implements graph.Driver: gives all locks back and closes the file, which a mapping
// that is still leased may keep open for a while.
func (d *disk) Close() error {
	h := d.cur.Swap(nil)
	if h == nil {
		return nil
	}
	// A lease may outlive us, its locks must not.
	_ = unlockBytes(h.fd, d.held)
	d.held = lockSet{}
	if d.engine != nil {
		d.engine.close()
	}
	h.drop()
	return nil
}

// hold is a reference to the current handle, nil once the disk is closed.
func (d *disk) hold() *handle {
	for {
		h := d.cur.Load()
		if h == nil || h.hold() {
			return h
		}
		// It was swapped and closed in between; the next one is there already.
	}
}

// enter waits for a place among the calls in the kernel, or for the end of r's root. Pairs with
// leave.
func (d *disk) enter(r *blk.Req) error {
	select {
	case d.busy <- struct{}{}:
		return nil
	default:
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	if r.Ctx == nil {
		d.busy <- struct{}{}
		return nil
	}
	select {
	case d.busy <- struct{}{}:
		return nil
	case <-r.Ctx.Done():
		return unix.ECANCELED
	}
}

func (d *disk) leave() { <-d.busy }

// begin is hold and enter for requests that may wait unless the file is in memory. Pairs with end.
func (d *disk) begin(r *blk.Req) (*handle, error) {
	if r.NoWait && !d.memory {
		return nil, blk.ErrWouldBlock
	}
	h := d.hold()
	if h == nil {
		return nil, blk.ErrClosed
	}
	if err := d.enter(r); err != nil {
		h.drop()
		return nil, err
	}
	return h, nil
}

func (d *disk) end(h *handle) {
	d.leave()
	h.drop()
}

// grow notes that the file reaches at least to end.
func (d *disk) grow(end int64) {
	if end <= d.eof.Load() || d.device {
		return
	}
	raise(&d.eof, end)
	raise(&d.size, blk.AlignUp(end, blk.SectorSize))
}

// setEnd notes the file's length after a resize; no request runs that could grow it.
func (d *disk) setEnd(n int64) {
	d.eof.Store(n)
	d.size.Store(blk.AlignUp(n, blk.SectorSize))
	d.extent.Store(nil)
}

// raise makes a at least n.
func raise(a *atomic.Int64, n int64) {
	for {
		old := a.Load()
		if old >= n || a.CompareAndSwap(old, n) {
			return
		}
	}
}

// aligned tells whether both are multiples of align, a power of two.
func aligned(off, n, align int64) bool { return (off|n)&(align-1) == 0 }
