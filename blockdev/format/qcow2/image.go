package qcow2

import (
	"sync"
	"sync/atomic"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// image is an open image.
type image struct {
	allocator

	resizing sync.Mutex // one Resize at a time; taken before marking and mu

	marks   atomic.Pointer[marks] // nil: no bitmap is marked
	marking sync.Mutex            // held while marks are written, and while what they are written to changes; taken before mu
	toMark  markQueue

	// Memory of requests under way, taken with no lock held. Who waits for one of these may hold
	// parts of those before it.
	zipping, copying, unzipping, decoding blk.Budget

	shownBitmaps   atomic.Pointer[[]*types.Qcow2BitmapInfo]
	shownSnapshots atomic.Pointer[[]*types.SnapshotInfo]

	// All below is guarded by mu.
	snaps  []layout.Snapshot
	stored []*stored // persistent bitmaps in the image; changes with marking held, too
	// badBitmaps: the bitmaps extension makes no sense, and goes with the first change.
	badBitmaps bool
	// dirUnsure: a change of the header has failed, and which bitmap directory it refers to is not
	// known.
	dirUnsure bool

	l1      entries
	l1Dirty map[int64]struct{}
	l2      *cache
	slice   int64 // bytes of an L2 slice

	inflight  []*alloc
	flushing  bool
	midFlush  bool   // a flush is under way that has not come to its end, or never will
	started   uint64 // flushes begun
	finished  uint64 // the newest flush that succeeded
	closed    bool
	unz       unzipped
	flagsDue  bool // copied flags are to be set when limbo has gone
	storing   bool // bitmaps were about to be stored: the image may say that they hold
	stopClean func()
}

// alloc is an allocation whose data are being written; the L2 entries still hold the old state.
type alloc struct {
	first, n int64 // guest clusters
	host     int64
	reuse    bool // the entry's own host cluster is written
	fresh    bool // the host clusters were never written, so they read as zeroes
}
