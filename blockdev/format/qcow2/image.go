package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// file is what an image needs of its children; *graph.Edge is one.
type file interface {
	Size() int64
	ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error
	WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error
	Zero(r *blk.Req, off, n int64, f blk.Flags) error
	Discard(r *blk.Req, off, n int64) error
	Flush(r *blk.Req) error
	Status(r *blk.Req, off, n int64) (blk.Extent, error)
	Map(r *blk.Req, off, n int64, m *blk.Mapping) error
	CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error
	Resize(ctx context.Context, size int64, exact bool, m blk.Prealloc) error
}

// config is what an image is opened with.
type config struct {
	file file
	// backing returns the backing child of the moment, nil if there is none.
	backing  func() file
	readOnly bool
	unmap    bool // discard=unmap was given for the node
	options  Options
	// corrupted is told about corruption found at run time; off and n are -1 if unknown. Called with mu held: must not call back.
	corrupted func(msg string, off, n int64, fatal bool)
	warn      func(msg string)
	// changed is told that something which queries show has changed; called with mu held. May be nil.
	changed func()
	// allocated tells the bytes that the file takes on its medium, for detecting preallocation; may be nil.
	allocated func() (int64, error)
	// keeper has the persistent bitmaps in memory; nil: nobody, they stay as they are in the image, in use.
	keeper bitmapKeeper
	// debug is told of steps before they are taken; may be nil.
	debug func(r *blk.Req, e blk.DebugEvent)
	// vetSteps are what the first and each further step of a survey read of L2 tables, in bytes; 0: firstStep and nextStep.
	vetSteps [2]int64
	// bare opens an image that is being created: nothing is refused or repaired.
	bare bool
}

// image is an open image.
type image struct {
	config
	geo layout.Geometry
	cs  int64 // cluster size
	cb  uint  // its log2
	set settings

	size atomic.Int64 // of the guest disk, bytes, a multiple of 512
	dead atomic.Bool  // unusable after fatal corruption

	info info

	resizing sync.Mutex // one Resize at a time; taken before marking and mu

	marks   atomic.Pointer[marks] // nil: no bitmap is marked
	marking sync.Mutex            // held while marks are written, and while what they are written to changes; taken before mu
	toMark  markQueue

	// Memory of requests under way, taken with no lock held. Who waits for one of these may hold parts of those before it.
	zipping, copying, unzipping, decoding blk.Budget

	mu   sync.Mutex
	wake *sync.Cond // an in-flight allocation has ended
	done *sync.Cond // flushing has become false, or giving less

	// All below is guarded by mu.
	hdr      *layout.Header
	ext      *layout.Extensions
	backName string
	hdrUsed  int // bytes of the first cluster taken by header, extensions and backing name
	snaps    []layout.Snapshot
	snapEnd  int64     // end of the snapshot table
	snapL1   ranges    // where the snapshots have their L1 tables
	stored   []*stored // persistent bitmaps in the image; changes with marking held, too
	// badBitmaps: the bitmaps extension makes no sense, and goes with the first change.
	badBitmaps bool
	// dirUnsure: a change of the header has failed, and which bitmap directory it refers to is not known.
	dirUnsure bool
	fresh     []int64 // clusters taken for bitmaps that the image does not refer to yet

	l1      entries
	l1Dirty map[int64]struct{}
	l2      *cache
	slice   int64 // bytes of an L2 slice

	reft      []uint64 // may be shorter than the table: what lies behind is zero
	reftSize  int64    // entries of the table on disk
	reftDirty map[int64]struct{}
	rb        *cache
	owners    map[int64]owner // clusters of L2 tables and refcount blocks, by cluster index
	inactive  map[int64]struct{}

	freeIdx  int64 // no free cluster lies below
	freeByte int64 // where the next compressed cluster goes, 0: nowhere
	dataEnd  int64 // end of the clusters that were taken for data
	fileEnd  int64 // nothing was ever written at or beyond this offset

	inflight  []*alloc
	epOld     *epoch
	epCur     *epoch
	sealed    bool    // something was freed in epCur
	pending   []freed // reference gone in memory
	limbo     []freed // reference gone on disk
	pendBytes int64
	given     uint64 // counts what was freed and has been given back
	giving    int    // so many are giving something back

	flushing  bool
	midFlush  bool   // a flush is under way that has not come to its end, or never will
	started   uint64 // flushes begun
	finished  uint64 // the newest flush that succeeded
	wrote     uint64 // counts writes that a barrier must cover
	synced    uint64 // writes up to this one are on stable storage
	signaled  bool   // corruption was reported
	prealloc  int8   // metadata preallocation: 0 unknown, 1 no, 2 yes
	closed    bool
	unz       unzipped
	flagsDue  bool // copied flags are to be set when limbo has gone
	storing   bool // bitmaps were about to be stored: the image may say that they hold
	stopClean func()
	busy      func(cluster int64) uint64 // during repair: clusters that are in use whatever their refcount says
	made      func(first, n int64)       // during repair: told of clusters that are taken
	survey    *survey                    // nil: over, or none is due
	wrong     wrong                      // what a survey found
}

// alloc is an allocation whose data are being written; the L2 entries still hold the old state.
type alloc struct {
	first, n int64 // guest clusters
	host     int64
	reuse    bool // the entry's own host cluster is written
	fresh    bool // the host clusters were never written, so they read as zeroes
}

var be = binary.BigEndian

var (
	errIO      = syscall.EIO
	errNoSpace = syscall.ENOSPC
	errTooBig  = syscall.EFBIG
	errInval   = syscall.EINVAL
)

// lock takes mu as far as r may wait.
func (s *image) lock(r *blk.Req) bool {
	if r.NoWait {
		return s.mu.TryLock()
	}
	s.mu.Lock()
	return true
}

// unlocked calls f with mu dropped, which is held before and afterwards, also after a panic.
func (s *image) unlocked(f func()) {
	s.mu.Unlock()
	defer s.mu.Lock()
	f()
}

// readFile reads from the file; what lies beyond its end reads as zeroes.
func (s *image) readFile(r *blk.Req, v blk.Vec, off int64) error {
	n := v.Len()
	end := s.file.Size()
	if off+n <= end {
		return s.file.ReadAt(r, v, off, 0)
	}
	if off >= end {
		v.Zero()
		return nil
	}
	v.Slice(end-off, off+n-end).Zero()
	return s.file.ReadAt(r, v.Slice(0, end-off), off, 0)
}

// writeMeta writes b and remembers that a barrier is due.
func (s *image) writeMeta(r *blk.Req, b []byte, off int64, own overlap) error {
	if err := s.checkOverlap(r, off, int64(len(b)), own); err != nil {
		return err
	}
	if err := s.checkOwner(r, off, int64(len(b))); err != nil {
		return err
	}
	s.wrote++
	s.noteEnd(off + int64(len(b)))
	return s.file.WriteAt(r, blk.Buf(b), off, 0)
}

// patient is r for what has to be done whether its client has gone or not: the end of what has begun, and taking back what came to nothing.
func patient(r *blk.Req) *blk.Req {
	if r.Ctx == nil || r.Ctx.Done() == nil {
		return r
	}
	q := *r
	q.Ctx = context.WithoutCancel(r.Ctx)
	return &q
}

// enter writes to the header, and waits until that is on stable storage. It does not end with the context of r: nobody would know which of the two the image has, the old or
// the new.
func (s *image) enter(r *blk.Req, b []byte, off int64) error {
	r = patient(r)
	if err := s.writeMeta(r, b, off, olMainHeader); err != nil {
		return err
	}
	return s.barrier(r)
}

// swap is enter for the place of a table that is written to from then on: after an error the header has the old value, was. An image whose header may have either is given up, as
// what was written to one table would be lost with the other.
func (s *image) swap(r *blk.Req, now, was []byte, off int64) error {
	err := s.enter(r, now, off)
	if err != nil && s.enter(r, was, off) != nil {
		_ = s.corrupt(r, true, -1, -1, "Which table the header refers to is not known")
	}
	return err
}

// step announces what is about to be done.
func (s *image) step(r *blk.Req, e blk.DebugEvent) {
	if s.debug != nil {
		s.debug(r, e)
	}
}

// barrier flushes the file with mu held.
func (s *image) barrier(r *blk.Req) error {
	if s.wrote == s.synced {
		return nil
	}
	if err := s.file.Flush(r); err != nil {
		return err
	}
	s.synced = s.wrote
	return nil
}

func (s *image) noteEnd(end int64) {
	if end > s.fileEnd {
		s.fileEnd = end
	}
}

// usable is the error of an image that has been given up.
func (s *image) usable() error {
	if s.dead.Load() {
		return blk.ErrNoMedium
	}
	return nil
}

// child is the file as the target of status answers.
func (s *image) child() blk.Child {
	c, _ := s.file.(blk.Child)
	return c
}

// back returns the backing child or nil.
func (s *image) back() file {
	if s.backing == nil {
		return nil
	}
	return s.backing()
}

// backSize is the part of the disk that the backing chain decides.
func (s *image) backSize() int64 {
	if b := s.back(); b != nil {
		return b.Size()
	}
	return 0
}

// backLater tells whether the image names a backing file that is not opened: it is when the image is opened again, and then shows where there are no
// clusters.
func (s *image) backLater() bool { return s.backName != "" && s.back() == nil }

func isNotSupported(err error) bool {
	return errors.Is(err, blk.ErrNotSupported) || errors.Is(err, syscall.ENOTSUP)
}

// publish makes what queries show known to them; mu is held.
func (s *image) publish() {
	s.info.incompat.Store(s.hdr.IncompatibleFeatures)
	format := ""
	if s.ext != nil {
		format = s.ext.BackingFormat
	}
	s.info.backing.Store(&[2]string{s.backName, format})
	bitmaps := s.bitmapInfo()
	s.info.bitmaps.Store(&bitmaps)
	snapshots := s.snapshotInfo()
	s.info.snapshots.Store(&snapshots)
	if s.changed != nil {
		s.changed()
	}
}
