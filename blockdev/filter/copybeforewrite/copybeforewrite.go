// Package copybeforewrite is the filter that keeps a point in time: before a part of its file is
// written, what was there is copied to a target. A backup job copies the rest.
//
//	guests        job
//	   \          /
//	   filter ---------- target
//	     | file            ^
//	   source -- copies ---'
//
// Both copy by clusters, each once: a cluster is to do, being copied, or done.
//
//	to do --taken by a guest's write or by the job--> being copied --> done
//	   ^------------------------- failed ------------------'
//
// A guest's write waits for the clusters that it touches, and for no others: those to do it copies
// itself, at once; for those being copied it waits. Who copies holds its unit of work and waits for
// nothing but I/O.
//
// Locks: State.mu, a leaf, held for moments only.
package copybeforewrite

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// DriverName is how the filter shows itself.
const DriverName = "copy-before-write"

const (
	// minCluster is the least that is copied at once, in bytes.
	minCluster = 64 << 10
	// maxLeast is the most that a user can make of that: a copy takes as much memory.
	maxLeast = 64 << 20
	// MaxCopy is the most that one copy takes, in bytes: who waits for a cluster that somebody else
	// copies waits no longer than that takes.
	MaxCopy = 1 << 20
)

// maxBooks is the memory for what is to do and done, in bytes: enough for 512 TiB of clusters of 64
// KiB, however they are written to. Of larger disks more than that cannot be copied piecemeal.
var maxBooks int64 = 2 << 30

// State is what is to be copied and what is being copied.
type State struct {
	node       *graph.Node // of the filter
	cluster    int64
	flags      blk.Flags // of writes to the target
	compressed bool
	buffered   bool // data go through memory
	changes    bool // see ChangesSource
	copied     func(n int64)

	pending *bitmap.Bitmap // clusters to do; bits are cleared when a cluster is taken
	done    *bitmap.Bitmap // clusters that were copied
	access  *bitmap.Bitmap // clusters that the point in time consists of
	active  atomic.Int32   // copies under way; raised before the bits of a copy are cleared
	guests  atomic.Bool    // a guest's request has passed; cleared by who looks
	failed  atomic.Int64   // copies that failed; raised after the bits are set again and before active goes down

	readers       atomic.Int32       // raised before a reader looks whether its clusters are done
	timeout       time.Duration      // that a guest's write waits for a copy; 0: as long as it takes
	readersOver   func()             // ends the tracking of the target's readers; nil: they are not tracked
	listed        *graph.DirtyBitmap // pending, as clients see it; nil: the filter's owner lists it
	breakSnapshot bool               // a failing copy spoils the point in time, not the guest's write
	broken        atomic.Bool
	wholly        bool   // the point in time is all of the source
	left          uint64 // generation of the source when the filter was last in use

	mu sync.Mutex
	// nobody copies any more
	stopped bool                  // +checklocks:mu
	copies  map[*running]struct{} // +checklocks:mu
	// reads of the source for the point in time
	reading map[*running]struct{} // +checklocks:mu
}

// running is a copy, or a read of the source, under way.
type running struct {
	off, n int64
	over   chan struct{}
}

// ClusterSize is the unit of copies to target, in bytes: at least 64 KiB, and no less than what the
// target allocates, nor than least, which is 0 or a power of two.
func ClusterSize(target *graph.Node, least uint64) (int64, error) {
	err := error(nil)
	switch {
	case least > math.MaxInt64:
		err = fmt.Errorf("min-cluster-size too large: %d > %d", least, math.MaxInt64)
	case least&(least-1) != 0:
		err = errors.New("min-cluster-size needs to be a power of 2")
	case least > maxLeast:
		err = fmt.Errorf("min-cluster-size too large: %d > %d", least, maxLeast)
	}
	if err != nil {
		return 0, fmt.Errorf("Cannot create block-copy-state: %w", err)
	}
	return max(minCluster, target.Caps().Limits.ClusterSize, int64(least)), nil
}

// Pending are the clusters that are to be copied. Before the filter is in use its owner sets them.
func (s *State) Pending() *bitmap.Bitmap { return s.pending }

// Access are the clusters that can be read as they were. Before the filter is in use its owner sets
// them.
func (s *State) Access() *bitmap.Bitmap { return s.access }

// Guests is set whenever a request of a guest passes the filter.
func (s *State) Guests() *atomic.Bool { return &s.guests }

func (s *State) passing(r *blk.Req) {
	if !r.Job && !s.guests.Load() {
		s.guests.Store(true)
	}
}

// OnCopied lets f count the bytes that are copied, whoever does that. f is called with a lock held
// and takes none. Set before the filter is in use.
func (s *State) OnCopied(f func(n int64)) { s.copied = f }

// CopyThroughMemory keeps the kernel from copying. Set before the filter is in use.
func (s *State) CopyThroughMemory() { s.buffered = true }

// ChangesSource claims that the owner may discard in the source. Set before the filter is in use.
func (s *State) ChangesSource() { s.changes = true }

// Cluster is the unit of copies in bytes.
func (s *State) Cluster() int64 { return s.cluster }

func (s *State) source() *graph.Edge { return s.node.FilteredChild() }

func (s *State) target() *graph.Edge { return s.node.Child("target") }

// Skip takes clusters of [off, off+n), a range of whole clusters, off the list of those to do.
func (s *State) Skip(off, n int64) { s.pending.Clear(off, n) }

// Remaining calls tell with how many bytes are to be copied or being copied. No copy is counted as
// over (OnCopied) meanwhile.
func (s *State) Remaining(tell func(n int64)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pending.Count()
	for c := range s.copies {
		n += s.counted(c)
	}
	tell(n)
}

// Over tells whether nothing is to do and nothing is being copied, at one point in time: a copy
// that fails is to do again.
func (s *State) Over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.copies) == 0 && s.pending.Empty()
}

// counted is the length of a copy as Bitmap.Count counts.
func (s *State) counted(c *running) int64 { return blk.AlignUp(c.n, s.cluster) }

// clean tells whether nothing of [off, off+n) is to do or being copied or read. A copy that fails
// between the two looks would be seen by neither: its clusters were not to do at the first, and it
// is over at the second. So failures are counted.
func (s *State) clean(off, n int64) bool {
	before := s.failed.Load()
	_, _, dirty := s.pending.NextDirty(off, off+n)
	return !dirty && s.active.Load() == 0 && s.readers.Load() == 0 && s.failed.Load() == before
}

// Copy copies what is to do of the clusters that [off, off+n) touches, and waits for those that
// others copy. Errors: *graph.CopyError, with the clusters to do again; the cause of the end of r's
// context; blk.ErrWouldBlock.
func (s *State) Copy(r *blk.Req, off, n int64) error { return s.copyAll(r, off, n, s.copied) }

// CopyCounting is Copy that returns how much it has copied by itself, as Bitmap.Count counts,
// instead of telling OnCopied.
func (s *State) CopyCounting(r *blk.Req, off, n int64) (copied int64, err error) {
	err = s.copyAll(r, off, n, func(n int64) { copied += n })
	return copied, err
}

func (s *State) copyAll(r *blk.Req, off, n int64, copied func(n int64)) error {
	lo, end := blk.Outer(off, off+n, s.cluster, s.pending.Size())
	for lo < end {
		if s.clean(lo, end-lo) {
			return nil
		}
		if r.NoWait {
			return blk.ErrWouldBlock
		}
		if s.crowded() {
			return &graph.CopyError{Write: true, Err: syscall.ENOMEM}
		}
		c, wait := s.take(lo, end, max(MaxCopy, s.cluster))
		if wait != nil {
			select {
			case <-wait:
			case <-r.Ctx.Done():
				return context.Cause(r.Ctx)
			}
			continue
		}
		if c == nil {
			return s.waitReaders(r, lo, end)
		}
		if err := s.copyTaken(r, c, copied); err != nil {
			return err
		}
	}
	return nil
}

// copyTaken copies c and gives it back, also after a panic: others wait for it.
func (s *State) copyTaken(r *blk.Req, c *running, copied func(n int64)) error {
	err := errPanic
	defer func() { s.release(c, err, copied) }()
	err = s.copy(r, c)
	return err
}

// errPanic is the error of a copy that has not come to its end.
var errPanic = errors.New("panic")

// SameZeroes is how much from off on, clusters to do of at most n bytes, reads as zeroes on both
// sides.
func (s *State) SameZeroes(r *blk.Req, off, n int64) int64 {
	end := off + n
	for _, e := range []*graph.Edge{s.source(), s.target()} {
		x, err := e.StatusAbove(r, nil, false, off, n)
		if err != nil || !x.Zero {
			return 0
		}
		n = x.N
	}
	if off+n == end {
		return n
	}
	return max(blk.AlignDown(off+n, s.cluster)-off, 0)
}

// SkipZeroes is Copy for a range of any length that SameZeroes has found, and on whose target
// nothing has to be allocated. What is not zeroes any more stays to do.
func (s *State) SkipZeroes(r *blk.Req, off, n int64) (skipped int64) {
	for end := off + n; off < end; {
		c, _ := s.take(off, end, n)
		if c == nil {
			break // others copy the rest
		}
		off = c.off + c.n
		skipped += s.skipTaken(r, c)
	}
	return skipped
}

// skipTaken gives c back, as done where both sides still read as zeroes, and returns what that
// counts as.
func (s *State) skipTaken(r *blk.Req, c *running) (skipped int64) {
	err := errNotSame
	defer func() { s.release(c, err, func(n int64) { skipped += n }) }()
	if s.SameZeroes(r, c.off, c.n) == c.n {
		err = nil
	}
	return skipped
}

var errNotSame = errors.New("not zeroes any more")

// crowded tells whether the books of what is to do and done have become too large: they are exact,
// so each write to a far part of a huge disk adds to them.
func (s *State) crowded() bool { return s.pending.Memory()+s.done.Memory() > maxBooks }

// Stop lets nobody copy any more, and waits for the copies under way: what is to do now is to do
// for ever, and guests' writes go to the source alone, so that the point in time is spoilt for its
// readers. It is called without a unit of work. Error: the cause of the end of ctx.
func (s *State) Stop(ctx context.Context) error {
	s.broken.Store(true)
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	return s.WaitCopies(ctx)
}

// Copied are the clusters that were copied.
func (s *State) Copied() *bitmap.Bitmap { return s.done }

// take begins a copy of the first clusters to do in [lo, end), most bytes at most, or returns what
// to wait for; nil, nil if there is neither.
func (s *State) take(lo, end, most int64) (*running, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, n, ok := s.pending.NextDirty(lo, end)
	if !ok || s.stopped {
		for c := range s.copies {
			if blk.Overlap(c.off, c.n, lo, end-lo) {
				return nil, c.over
			}
		}
		return nil, nil
	}
	c := &running{off: at, n: min(n, most), over: make(chan struct{})}
	s.active.Add(1)
	s.copies[c] = struct{}{}
	s.pending.Clear(c.off, c.n)
	return c, nil
}

// WaitCopies waits until those copies are over that are under way now. It is called without a unit
// of work. Error: the cause of the end of ctx.
func (s *State) WaitCopies(ctx context.Context) error {
	s.mu.Lock()
	var l []<-chan struct{}
	for c := range s.copies {
		l = append(l, c.over)
	}
	s.mu.Unlock()
	for _, over := range l {
		select {
		case <-over:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// waitReaders waits for reads of the source that began before [lo, end) was done.
func (s *State) waitReaders(r *blk.Req, lo, end int64) error {
	for {
		var wait chan struct{}
		s.mu.Lock()
		for c := range s.reading {
			if blk.Overlap(c.off, c.n, lo, end-lo) {
				wait = c.over
				break
			}
		}
		s.mu.Unlock()
		if wait == nil {
			return nil
		}
		select {
		case <-wait:
		case <-r.Ctx.Done():
			return context.Cause(r.Ctx)
		}
	}
}

func (s *State) release(c *running, err error, copied func(n int64)) {
	if err == nil {
		s.done.Set(c.off, c.n)
	}
	s.mu.Lock()
	switch {
	case err == nil && copied != nil:
		copied(s.counted(c))
	case err != nil:
		s.pending.Set(c.off, c.n) // also what was given up meanwhile: it may be copied, but need not
		s.failed.Add(1)
	}
	delete(s.copies, c)
	s.active.Add(-1)
	close(c.over)
	s.mu.Unlock()
}

// copy copies by what the source says of the range.
func (s *State) copy(r *blk.Req, c *running) error {
	src, dst := s.source(), s.target()
	f := s.flags
	if s.compressed {
		f |= blk.Compressed
	}
	for off, end := c.off, c.off+c.n; off < end; {
		x, err := src.StatusAbove(r, nil, false, off, end-off)
		if err != nil || x.N == 0 {
			x = blk.Extent{N: end - off, Data: true} // reading tells
		}
		if s.compressed {
			x = x.Whole(off, end, s.cluster)
		}
		if x.Zero {
			if err = dst.Zero(r, off, x.N, s.flags|blk.MayUnmap); err != nil {
				err = &graph.CopyError{Write: true, Err: err}
			}
		} else {
			copy := graph.Copy
			if s.buffered || graph.Now.Remote(dst.Node()) {
				// Pages that the kernel was given for a server may be read by it after the connection
				// is lost, and after the copy: with what the guest has written by then.
				copy = graph.CopyThroughMemory
			}
			err = copy(r, src, dst, off, x.N, f)
		}
		if err != nil {
			return err
		}
		off += x.N
	}
	return nil
}
