package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// file is what an image needs of its children; *graph.Edge is one.
type file interface {
	Caps() graph.Caps
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
	// external has the guest data of an image that says so, nil for others.
	external file
	// backing returns the backing child of the moment, nil if there is none.
	backing  func() file
	readOnly bool
	unmap    bool // discard=unmap was given for the node
	options  types.BlockdevOptionsQcow2
	// password is the text of a secret.
	password passwords
	// keeper has the persistent bitmaps in memory; nil: nobody, in the image they stay in use.
	keeper bitmapKeeper

	// All of these functions may be nil. What is called with mu held must not call back.

	// corrupted hears of corruption found at run time, with mu held; off and n are -1 if unknown.
	corrupted func(msg string, off, n int64, fatal bool)
	warn      func(msg string)
	// changed hears that something has changed that queries show, with mu held.
	changed func()
	// allocated tells the bytes that the file takes on its medium.
	allocated func() (int64, error)
	// debug hears of steps before they are taken.
	debug func(r *blk.Req, e blk.DebugEvent)

	// vetSteps are what the first and each further step of a survey read of L2 tables, in bytes;
	// 0 is firstStep and nextStep.
	vetSteps [2]int64
	// bare opens an image that is being created: nothing is refused, unlocked or repaired.
	bare bool
	// sealing: an image that is being created is going to be encrypted.
	sealing bool
}

// imageFile is the file of an open image: its header, its geometry, and where metadata lie in it.
type imageFile struct {
	guestData
	geo layout.Geometry
	cs  int64 // cluster size
	cb  uint  // its log2
	sb  uint  // log2 of a subcluster, which is a whole cluster if L2 entries are plain
	eb  uint  // log2 of an L2 entry
	set settings
	// What a header says for good, readable without mu.
	version     uint32
	compression uint8
	dataName    string // of external, as the header has it
	raw         bool   // external shows the disk to those who know nothing of the image
	rawBit      bool   // the header says that it does

	size  atomic.Int64 // of the guest disk, bytes, a multiple of 512
	dead  atomic.Bool  // unusable after fatal corruption
	stale atomic.Bool  // unusable until it is read again as a whole
	shown struct {     // what queries show, readable without mu
		incompat atomic.Uint64
		backing  atomic.Pointer[[2]string] // name and format
		header   atomic.Pointer[layout.Header]
		dataName atomic.Pointer[string]
	}

	mu   sync.Mutex
	wake *sync.Cond // an allocation in flight has ended
	done *sync.Cond // a flush has ended, or somebody has given back what was freed

	hdr      *layout.Header     // +checklocks:mu
	ext      *layout.Extensions // +checklocks:mu
	backName string             // +checklocks:mu
	// hdrUsed is the length of header, extensions and backing name.
	hdrUsed int // +checklocks:mu
	// reftSize is the number of entries that the refcount table has on disk.
	reftSize int64 // +checklocks:mu
	// owners are the clusters of L2 tables and refcount blocks, by cluster index.
	owners map[int64]owner // +checklocks:mu
	// inactive are the clusters of L2 tables of snapshots, if the overlap checks look at them.
	inactive map[int64]struct{} // +checklocks:mu
	// snapEnd is the end of the snapshot table, and snapL1 where the L1 tables of snapshots lie.
	snapEnd int64  // +checklocks:mu
	snapL1  ranges // +checklocks:mu
	// badTable tells why the table of snapshots of an image that is opened for a check is not known
	// as a whole. A repair drops what is not.
	badTable error // +checklocks:mu
	// wrong is what a survey found, counted what one under way has counted so far.
	wrong   wrong  // +checklocks:mu
	counted *tally // +checklocks:mu

	// fileEnd: nothing was ever written at or beyond it.
	fileEnd int64 // +checklocks:mu
	// wrote counts writes that a barrier must cover; those up to synced are on stable storage.
	wrote  uint64 // +checklocks:mu
	synced uint64 // +checklocks:mu
	// passive: others may be changing the image.
	passive bool // +checklocks:mu
	// signaled: corruption was reported.
	signaled bool // +checklocks:mu
}

var be = binary.BigEndian

var (
	errIO      = syscall.EIO
	errNoSpace = syscall.ENOSPC
	errTooBig  = syscall.EFBIG
	errInval   = syscall.EINVAL
)

// lock takes mu as far as r may wait. Who has got it says so by locked.
// +checklocksignore: a lock that may not be taken is nothing that checklocks knows.
func (s *imageFile) lock(r *blk.Req) bool {
	if r.NoWait {
		return s.mu.TryLock()
	}
	s.mu.Lock()
	return true
}

// locked tells checklocks that lock has taken mu.
// +checklocksacquire:s.mu
// +checklocksignore
func (s *imageFile) locked() {}

// unlocked calls f with mu dropped, which is held before and afterwards, also after a panic.
// +checklocks:s.mu
func (s *imageFile) unlocked(f func()) {
	s.mu.Unlock()
	defer s.mu.Lock()
	f()
}

// readFile reads from the file; what lies beyond its end reads as zeroes.
func (s *imageFile) readFile(r *blk.Req, v blk.Vec, off int64) error {
	return readPadded(r, s.file, s.file.Size(), v, off)
}

// data is the file that has the guest data.
func (s *config) data() file {
	if s.external != nil {
		return s.external
	}
	return s.file
}

// flushFiles flushes all that the image is written to: first the data, to which the rest refers.
func (s *config) flushFiles(r *blk.Req) error {
	if err := s.flushData(r); err != nil {
		return err
	}
	return s.file.Flush(r)
}

// flushData flushes the guest data if they are in another file.
func (s *config) flushData(r *blk.Req) error {
	if s.external == nil {
		return nil
	}
	return s.external.Flush(r)
}

// readPadded reads from f, which ends at end; beyond that are zeroes.
func readPadded(r *blk.Req, f file, end int64, v blk.Vec, off int64) error {
	n := v.Len()
	if off+n <= end {
		return f.ReadAt(r, v, off, 0)
	}
	if off >= end {
		v.Zero()
		return nil
	}
	v.Slice(end-off, off+n-end).Zero()
	return f.ReadAt(r, v.Slice(0, end-off), off, 0)
}

// writeMeta writes metadata of the kinds own, and remembers that a barrier is due.
// +checklocks:s.mu
func (s *imageFile) writeMeta(r *blk.Req, b []byte, off int64, own overlap) error {
	if err := s.mayWrite(r, off, int64(len(b)), own); err != nil {
		return err
	}
	s.wrote++
	s.noteEnd(off + int64(len(b)))
	return s.file.WriteAt(r, blk.Buf(b), off, 0)
}

// step announces what is about to be done.
func (s *imageFile) step(r *blk.Req, e blk.DebugEvent) {
	if s.debug != nil {
		s.debug(r, e)
	}
}

// barrier flushes the files with mu held.
// +checklocks:s.mu
func (s *imageFile) barrier(r *blk.Req) error {
	if s.wrote == s.synced {
		return nil
	}
	if err := s.flushFiles(r); err != nil {
		return err
	}
	s.synced = s.wrote
	return nil
}

// +checklocks:s.mu
func (s *imageFile) noteEnd(end int64) { s.fileEnd = max(s.fileEnd, end) }

// end is the end of the file: clusters may be allocated but not written yet.
// +checklocks:s.mu
func (s *imageFile) end() int64 { return max(s.file.Size(), s.fileEnd) }

// usable returns the error of an image that has been given up.
func (s *imageFile) usable() error {
	if s.dead.Load() {
		return blk.ErrNoMedium
	}
	if s.stale.Load() {
		return errIO
	}
	return nil
}

// back is the backing child, or nil.
func (s *imageFile) back() file {
	if s.backing == nil {
		return nil
	}
	return s.backing()
}

// backSize is the part of the disk that the backing chain decides.
func (s *imageFile) backSize() int64 {
	if b := s.back(); b != nil {
		return b.Size()
	}
	return 0
}

// backLater tells whether the image names a backing file that is not opened. Once it is, it shows
// where there are no clusters.
// +checklocks:s.mu
func (s *imageFile) backLater() bool { return s.backName != "" && s.back() == nil }

// publish makes what queries show of the header known to them; mu is held.
// +checklocks:s.mu
func (s *imageFile) publish() {
	s.shown.incompat.Store(s.hdr.IncompatibleFeatures)
	h, name := *s.hdr, s.dataName
	s.shown.header.Store(&h)
	s.shown.dataName.Store(&name)
	format := ""
	if s.ext != nil {
		format = s.ext.BackingFormat
	}
	s.shown.backing.Store(&[2]string{s.backName, format})
	s.tellChanged()
}

// tellChanged tells the node that something which queries show has changed; mu is held.
func (s *imageFile) tellChanged() {
	if s.changed != nil {
		s.changed()
	}
}

func (s *imageFile) warnf(format string, args ...any) {
	if s.warn != nil {
		s.warn(fmt.Sprintf(format, args...))
	}
}

// +checklocks:s.mu
func (s *imageFile) reftOffset() int64 { return int64(s.hdr.RefcountTableOffset) }
