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
	opened
	length
	abilities
	block  bool // a block device; implies device
	direct bool // O_DIRECT with its restrictions (settings.direct: asked for)
	local  bool // no server of a file system has a part in what becomes of the file
	limits blk.Limits
	id     graph.FileID // which file it is
	hint   uint32       // size of extents the file system is to aim at, as of the opening; 0: none

	pace   pace
	behind behind
	lost   atomic.Uint32 // errno of the sync that lost cached writes, 0: none

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

// aligned tells whether both are multiples of align, a power of two.
func aligned(off, n, align int64) bool { return (off|n)&(align-1) == 0 }
