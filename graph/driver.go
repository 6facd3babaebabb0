package graph

import (
	"context"
	"time"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Kind is the kind of a driver.
type Kind uint8

const (
	Protocol Kind = iota // touches the outside world: file, nbd, null
	Format               // interprets a child: qcow2, raw
	Filter               // passes everything to its one filtered child
)

// Driver is what every driver does. off and the lengths are bytes; the node has already
// checked range, alignment, flags and permission. Requests on one driver run in parallel.
// Methods are never called before Open has returned nor while Close runs.
type Driver interface {
	// Caps is asked after open and after reopen, then cached by the node.
	Caps() Caps
	// Size is the length in bytes; cheap, never blocks.
	Size() int64
	// ReadAt fills v or fails; there are no short reads in a block layer.
	ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error
	// Close ends the driver after all requests have ended and data was flushed; children are still
	// attached.
	Close() error
}

// Caps are a driver's constant properties. A flag without the interface behind it panics under
// -tags invariants.
type Caps struct {
	Limits blk.Limits
	// WriteFlags, ZeroFlags: what WriteAt and Zero handle natively; FUA is emulated by a flush
	// otherwise.
	WriteFlags, ZeroFlags blk.Flags
	// Backing: the driver has a "backing" child or could have one.
	Backing bool
	// Transparent: Map, copy-range and compressed writes may pass this filter unseen.
	Transparent bool
	// ZeroInit: a freshly created image reads as zeroes.
	ZeroInit bool
	// Ordered: requests that overlap run one after the other, but reads side by side.
	Ordered bool
	// Instant: no request ever waits for anything.
	Instant bool
	// Remote: requests wait for a network rather than for processors here.
	Remote bool
}

// The optional abilities of drivers follow, by what they are about.

// Requests, each with what the node does for drivers without it. Those that serve requests may run
// in parallel with one another; a NoWait request must not wait in them.
type (
	Writer interface {
		WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error // default: blk.ErrReadOnly, for any options
	}
	Zeroer interface {
		Zero(r *blk.Req, off, n int64, f blk.Flags) error // default: writes of zeroes, unless NoFallback
	}
	Discarder interface {
		Discard(r *blk.Req, off, n int64) error // default: no-op
	}
	Flusher interface {
		// Flush: on return all completed writes are on stable storage. The node flushes the driver;
		// the driver flushes its children itself where it has any. Default: children are flushed.
		Flush(r *blk.Req) error
	}
	// BlockStatuser tells what there is in a range (block status, not statistics).
	BlockStatuser interface {
		Status(r *blk.Req, off, n int64) (blk.Extent, error) // default: all data, allocated
	}
	Mapper interface {
		// Map appends the host ranges of a prefix of [off, off+n) to m, possibly nothing. Default:
		// nothing.
		Map(r *blk.Req, off, n int64, m *blk.Mapping) error
	}
	CopyRanger interface {
		// CopyFrom writes src (host ranges, no zero runs) to off; ErrNotSupported or EXDEV make the
		// caller copy by hand. Caps.Remote: after another error src may still be read, by a server
		// that was lost, and what it finds there be written.
		CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error
	}
	Resizer interface {
		Resize(ctx context.Context, size int64, m blk.Prealloc) error // default: blk.ErrNotSupported
	}
	// Debugger drivers are told of steps: those that drivers take who have them as a child, and
	// those of the generic layer for them themselves. The call may wait, unless r must not.
	Debugger interface {
		DebugEvent(r *blk.Req, e blk.DebugEvent)
	}
)

// The place in the graph: permissions, options, and what draining and failing mean to a driver.
type (
	// Permer overrides the claim on a child; up is the cumulative claim of the node's parents
	// (Need joined, Share intersected). Default: by role, see package perm.
	Permer interface {
		EdgeClaim(child string, r perm.Role, up perm.Claim, readOnly bool) perm.Claim
	}
	// Idler is a Permer that asks for less while its node has no parents: c is what it would ask
	// for if there were one that does nothing.
	Idler interface {
		IdleClaim(child string, c perm.Claim) perm.Claim
		// Idle tells that the node has lost its last parent, or (false) has got its first one, once
		// that is so. The nodes at the ends of the edges that have changed are quiet meanwhile. It
		// takes at most leaf locks and does not block.
		Idle(idle bool)
	}
	// PermTaker is told the cumulative claim on the node itself (file locks, reopening read-write
	// under auto-read-only). Prepare may block and fail; then exactly one of Commit and Abort
	// follows; they cannot fail.
	PermTaker interface {
		PermPrepare(ctx context.Context, c perm.Claim) error
		PermCommit()
		PermAbort()
	}
	// ChildKeeper marks drivers that read what one node alone knows, their file: who is put above
	// that node does not come between.
	ChildKeeper interface {
		KeepsChild()
	}
	// ChildChanger drivers get children and lose them while they are open, as tx makes it so. Their
	// node is held; the child's parents and names are seen to. They do not block.
	ChildChanger interface {
		AddChild(tx *Tx, child *Node) error
		RemoveChild(tx *Tx, e *Edge) error
	}
	// ChildReplacer drivers show what several children have. CanReplace tells whether the place of a
	// node below can be taken by one that has what the driver shows.
	ChildReplacer interface {
		CanReplace(below *Node) bool
	}
	// ModeSwitcher has something to do when its node becomes writable or read-only (qcow2: repairs
	// and header bits). Both are called while the node is drained: Prepare before the change, it
	// may refuse; Commit after it. When a node that was to become read-only stays writable after
	// all, Commit is called with readOnly false.
	ModeSwitcher interface {
		PrepareReadOnly(r *blk.Req, readOnly bool) error
		CommitReadOnly(r *blk.Req, readOnly bool) error
	}
	// Inactivator stores what must be on disk before the node is closed or becomes read-only; called
	// while drained.
	Inactivator interface {
		Inactivate(r *blk.Req) error
	}
	// Activator drivers remember what their image says, which others may change while the node is
	// inactive. Activate is called before that ends, while the node is drained. It reads everything
	// again and writes nothing: it may block and fail, and be called again. Then, if the node can be
	// written to, it becomes so as a ModeSwitcher.
	Activator interface {
		Activate(r *blk.Req) error
	}
	// Deactivator drivers are told that their node is inactive now, by when everything is stored
	// (ModeSwitcher), or stays so after Activate.
	Deactivator interface {
		Deactivated()
	}
	// Drainer drivers hold requests back (throttle, reconnecting clients) and let them go between
	// DrainBegin and DrainEnd, which alternate. Quiet tells that nothing is held back; it is polled
	// meanwhile. Called with no lock held.
	Drainer interface {
		DrainBegin()
		Quiet() bool
		DrainEnd()
	}
	// Ejecter is a driver whose image may turn out to be unusable while it is open.
	Ejecter interface {
		Ejected() bool // all requests fail with blk.ErrNoMedium from now on
	}
	// FailureTaker is told that its node has failed (Node.Fail), from any goroutine, perhaps with
	// its own locks held: it does not take them. What it has in memory is in doubt and must not be
	// written any more, not by Close either.
	FailureTaker interface {
		NodeFailed()
	}
	// Lagging tells how many bytes have still to get to the medium, as far as that can be seen, and
	// whether the driver is bound to a call that only its storage ends: the process could not end
	// before it either. It is called now and then while the daemon ends, also beside Close, and
	// does not block.
	Lagging interface {
		Lag() (bytes int64, bound bool)
	}
)

// What images keep besides their data.
type (
	// Backed drivers name the backing file of their image header; both empty: none.
	Backed interface {
		BackingFile() (name, format string)
	}
	// BackingChanger rewrites the backing file string in the image. ("", "") removes it. May block.
	BackingChanger interface {
		// CheckBackingFile is the error of ChangeBackingFile that is known beforehand.
		CheckBackingFile(name, format string) error
		ChangeBackingFile(r *blk.Req, name, format string) error
	}
	// InternalSnapshotter drivers keep snapshots inside their image. The node is held quiet while
	// one is made or deleted; both may block, and change nothing when they fail.
	InternalSnapshotter interface {
		// CreateSnapshot makes one of that name, taken at that time, when the machine's clock said
		// clock. It returns the ID, which no other has.
		CreateSnapshot(r *blk.Req, name string, at time.Time, clock time.Duration) (id string, err error)
		// DeleteSnapshot deletes the first one that has both. An image may say that several have
		// the same ID, or the same name.
		DeleteSnapshot(r *blk.Req, id, name string) error
		Snapshots() []*types.SnapshotInfo
	}
	// Checker drivers look their images over for faults, and repair them.
	Checker interface {
		// CheckImage tells what it has found and, after a repair, what is left. The node is held, and
		// quiet. told hears how many bytes of metadata were looked at, and of how many.
		CheckImage(r *blk.Req, repair types.QblockdCheckRepair, told func(done, all int64)) (*types.ImageCheck, error)
		// Repairing tells that a repair is about to begin, or is over. In between the driver writes to
		// its file also below a read-only node: whoever calls refreshes the claims of the node.
		Repairing(on bool)
		// Repairs tells whether that is so.
		Repairs() bool
	}
	// SnapshotApplier drivers can go back to a snapshot, which stays: the node is what it was when
	// that was made, so large, too, and what it held since is gone. It is held quiet.
	SnapshotApplier interface {
		InternalSnapshotter
		// ApplySnapshot goes back to the first one that has both. May block; changes nothing when
		// it fails, or only what the next one who opens the image puts right.
		ApplySnapshot(r *blk.Req, id, name string) error
	}
	// SnapshotReader is a driver that keeps a point in time besides what its node shows now
	// (copy-before-write). Its methods need a unit of work that reaches its node. DiscardSnapshot
	// tells that a range of the point in time is not needed any more.
	SnapshotReader interface {
		ReadSnapshot(r *blk.Req, v blk.Vec, off int64) error
		SnapshotStatus(r *blk.Req, off, n int64) (blk.Extent, error)
		DiscardSnapshot(r *blk.Req, off, n int64) error
	}
	// BitmapStore drivers keep persistent dirty bitmaps in their image: those that are the node's
	// and persistent when it becomes read-only or is closed.
	BitmapStore interface {
		// CanStoreBitmap tells why there cannot be one more, besides others of them; granularity is
		// in bytes.
		CanStoreBitmap(name string, granularity int64, others int) error
		// HoldBitmap makes the image safe against the sudden end of the program: it has at least
		// what the persistent bitmap of that name has, and will have what writes add. Called when
		// the bitmap was added, enabled, or merged into, while the node is quiet, and when it was
		// disabled. May block.
		HoldBitmap(r *blk.Req, name string) error
		// RemoveBitmap takes it out of the image at once. May block.
		RemoveBitmap(r *blk.Req, name string) error
	}
)

// What queries show; called without locks, and without I/O but for ActualSize.
type (
	// Informer adds what query-named-block-nodes shows under image: cluster-size, dirty-flag,
	// compressed, encrypted, format-specific.
	Informer interface {
		ImageInfo(info *types.ImageInfo)
	}
	// Sizer tells the bytes allocated on the host ("actual-size"); may block.
	Sizer interface {
		ActualSize() (int64, error)
	}
	// StatsReporter adds the driver's own statistics to those of query-blockstats.
	StatsReporter interface {
		DriverStats() *types.BlockStatsSpecific
	}
	// Identified drivers tell which file or device of the host they have open.
	Identified interface {
		FileID() FileID
	}
)
