package qcow2

import (
	"fmt"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// allocator gives out and takes back clusters. Its methods need mu.
type allocator struct {
	surveyor

	// freeIdx: no free cluster lies below.
	freeIdx int64 // +checklocks:mu
	// freeByte is where the next compressed cluster goes, 0: nowhere.
	freeByte int64 // +checklocks:mu
	// dataEnd is the end of the clusters that were taken for data.
	dataEnd int64 // +checklocks:mu
	// fresh are clusters that were taken for metadata to which the image does not refer yet.
	fresh      []int64    // +checklocks:mu
	quarantine quarantine // +checklocks:mu
	// mending is the counter of a repair under way, or nil. What it has counted is in use, whatever
	// the refcounts say.
	mending *counter // +checklocks:mu
}

// took tells a repair that clusters [first, first+n) were taken for refcounts.
// +checklocks:s.mu
func (s *allocator) took(first, n int64) {
	for c := first; s.mending != nil && c < first+n; c++ {
		s.mending.t.add(c, 1, true)
	}
}

// addRef changes the refcount of cluster c by d, which is 1 or -1. There must be a refcount block,
// see coverRun.
// +checklocks:s.mu
func (s *allocator) addRef(r *blk.Req, c int64, d int) error {
	bits := s.geo.RefblockBits()
	t, err := s.refblock(r, c>>bits)
	if err != nil {
		return err
	}
	if t == nil {
		return errInval
	}
	if err := s.checkOwner(r, t.off, s.cs); err != nil {
		return err
	}
	i := c & (1<<bits - 1)
	v := s.geo.Refcount(t.data, i)
	if d < 0 && v == 0 || d > 0 && v == s.geo.RefcountMax() {
		return errInval
	}
	v += uint64(d) // modulo 2^64
	s.geo.SetRefcount(t.data, i, v)
	s.rb.markDirty(t)
	if v == 0 {
		s.freeAgain(c)
		if s.freeByte>>s.cb == c {
			s.freeByte = 0
		}
	}
	return nil
}

// mostSearched is how many clusters are looked at for a free one, in the file and again behind its
// end. Tables can count 2^40 clusters and more as used.
var mostSearched int64 = 1 << 24

// findFree returns the first run of free clusters from from on: at least need clusters, at most
// want. next is where the next search is to begin. If much has to be looked at, what is free in the
// file may be passed over: the next search goes on there.
// +checklocks:s.mu
func (s *allocator) findFree(r *blk.Req, from, need, want int64) (first, n, next int64, err error) {
	bits := s.geo.RefblockBits()
	limit := int64(1) << (layout.MaxHostBits - s.cb)
	end := s.geo.Clusters(s.end())
	first = from
	skipped := int64(-1) // from here to the end of the file
search:
	for c, left := from, mostSearched; n < want; {
		switch {
		case c >= limit, left <= 0 && c >= end:
			return 0, 0, 0, errTooBig
		case left <= 0:
			skipped = c
			c, first, n, left = end, end, 0, mostSearched
		}
		if err := ended(r); err != nil {
			return 0, 0, 0, err
		}
		b := c >> bits
		last := (b + 1) << bits
		t, err := s.refblock(r, b)
		if err != nil {
			return 0, 0, 0, err
		}
		for ; c < last && n < want; c++ {
			if (t == nil || s.geo.Refcount(t.data, c&(1<<bits-1)) == 0) && !s.taken(c) {
				n++
				continue
			}
			left--
			if n >= need && n > 0 {
				break search
			}
			first, n = c+1, 0
		}
	}
	if skipped >= 0 {
		return first, n, skipped, nil
	}
	return first, n, first + n, nil
}

// allocate takes a run of at least need and at most want free clusters and gives each refcount 1.
// It returns the first cluster; what is for the error.
// +checklocks:s.mu
func (s *allocator) allocate(r *blk.Req, need, want int64, what string) (first, n int64, err error) {
	if err := s.setDirtyBit(r); err != nil {
		return 0, 0, err
	}
	if v := s.survey; v != nil && v.c == nil {
		if err := s.vet(r); err != nil {
			return 0, 0, err
		}
	}
	s.step(r, blk.EvClusterAlloc)
	first, n, next, err := s.findCovered(r, false, need, want)
	if err != nil {
		return 0, 0, err
	}
	if first == 0 {
		return 0, 0, s.corrupt(r, -1, -1, "Preventing invalid allocation of %s at offset 0", what)
	}
	if err := s.take(r, first, n); err != nil {
		return 0, 0, err
	}
	if need == 1 || first == s.lowest() {
		s.setLowest(next)
	}
	return first, n, nil
}

// findCovered is findFree where there are refcount blocks for all of the run: those that are
// missing are made, which takes clusters, too. With behind it looks behind all that was ever
// written.
// +checklocks:s.mu
func (s *allocator) findCovered(r *blk.Req, behind bool, need, want int64) (first, n, next int64, err error) {
	for again := true; again && err == nil; {
		from := s.lowest()
		if behind {
			from = s.geo.Clusters(s.end())
		}
		if first, n, next, err = s.findFree(r, from, need, want); err == nil {
			again, err = s.coverRun(r, first, n)
		}
	}
	return first, n, next, err
}

// take gives clusters [first, first+n), which are free and covered, refcount 1.
// +checklocks:s.mu
func (s *allocator) take(r *blk.Req, first, n int64) error {
	for i := range n {
		if err := s.addRef(r, first+i, 1); err != nil {
			s.unref(r, freed{off: first << s.cb, n: i << s.cb})
			return err
		}
	}
	return nil
}

// cover makes all refcount blocks for clusters [first, first+n).
// +checklocks:s.mu
func (s *allocator) cover(r *blk.Req, first, n int64) error {
	for {
		if again, err := s.coverRun(r, first, n); err != nil || !again {
			return err
		}
	}
}

// coverRun makes a refcount block for clusters [first, first+n) if one is missing; again tells that
// it did, which may have taken clusters of the run.
// +checklocks:s.mu
func (s *allocator) coverRun(r *blk.Req, first, n int64) (again bool, err error) {
	bits := s.geo.RefblockBits()
	last := (first + n - 1) >> bits
	if last >= s.reftSize {
		return true, s.growReftable(r, last)
	}
	for b := first >> bits; b <= last; b++ {
		if s.reftAt(b)&layout.ReftMask == 0 {
			return true, s.newBlock(r, b)
		}
	}
	return false, nil
}

// newBlock makes refcount block b, or one that it needs for its own cluster. The caller tries again
// until all are there.
// +checklocks:s.mu
func (s *allocator) newBlock(r *blk.Req, b int64) error {
	s.step(r, blk.EvRefblockAlloc)
	bits := s.geo.RefblockBits()
	c, _, next, err := s.findFree(r, s.lowest(), 1, 1)
	if err != nil {
		return err
	}
	cb := c >> bits
	if cb >= s.reftSize {
		return s.growReftable(r, cb)
	}
	if cb != b && s.reftAt(cb)&layout.ReftMask == 0 {
		// The block that counts c has to come first; it lies in c and counts itself.
		b = cb
	}
	if c == 0 && s.hdrUsed > 0 && s.mending == nil && !s.bare {
		return s.corrupt(r, -1, -1, "Preventing invalid allocation of refcount block at offset 0")
	}
	if err := s.checkOverlap(r, c<<s.cb, s.cs, 0); err != nil {
		return err
	}
	if err := s.roomForBlock(r); err != nil {
		return err
	}
	t := s.rb.alloc(c << s.cb)
	clear(t.data)
	if cb == b {
		s.geo.SetRefcount(t.data, c&(1<<bits-1), 1)
	}
	// At once: if there were no space for it later, no flush would succeed any more.
	if err := s.writeMeta(r, t.data, t.off, 0); err != nil {
		return err
	}
	if cb != b {
		if err := s.addRef(r, c, 1); err != nil {
			return err
		}
	}
	s.rb.dropRange(t.off, s.cs)
	s.rb.insert(t)
	s.rb.markDirty(t)
	s.setReft(b, uint64(t.off))
	s.own(t.off, ownBlock, 1)
	s.noteEnd(t.off + s.cs)
	s.setLowest(next) // it was the first free one
	s.took(c, 1)
	return nil
}

// lowest is the first cluster that could be given out.
// +checklocks:s.mu
func (s *allocator) lowest() int64 {
	if s.survey != nil {
		return max(s.freeIdx, s.survey.hint)
	}
	return s.freeIdx
}

// setLowest tells that no cluster from lowest on is free below c.
// +checklocks:s.mu
func (s *allocator) setLowest(c int64) {
	if s.survey != nil {
		s.survey.hint = max(s.survey.hint, c)
	} else {
		s.freeIdx = c
	}
}

// freeAgain tells that cluster c is free now.
// +checklocks:s.mu
func (s *allocator) freeAgain(c int64) {
	s.freeIdx = min(s.freeIdx, c)
	if v := s.survey; v != nil && c >= v.found {
		v.hint = min(v.hint, c)
	}
}

// allocBytes takes n bytes, fewer than a cluster: behind the compressed data written last if they
// fit there.
// +checklocks:s.mu
func (s *allocator) allocBytes(r *blk.Req, n int64) (int64, error) {
	s.step(r, blk.EvClusterAllocBytes)
	off := s.freeByte
	if off != 0 {
		v, err := s.refcount(r, off>>s.cb)
		if err != nil {
			return 0, err
		}
		if v == 0 || v >= s.geo.RefcountMax() {
			off = 0
		}
	}
	left := -off & (s.cs - 1)
	if off != 0 && left >= n {
		if err := s.addRef(r, off>>s.cb, 1); err != nil {
			return 0, err
		}
	} else {
		c, _, err := s.allocate(r, 1, 1, "compressed cluster")
		if err != nil {
			return 0, err
		}
		s.noteEnd((c + 1) << s.cb)
		if off != 0 && off+left == c<<s.cb {
			err = s.addRef(r, off>>s.cb, 1) // goes on from the cluster before
		} else {
			off = c << s.cb
		}
		if err == nil && off+n > s.geo.MaxCompressedOffset() {
			err = errTooBig
		}
		if err != nil {
			_ = s.addRef(r, c, -1)
			return 0, err
		}
	}
	s.freeByte = off + n
	if s.freeByte&(s.cs-1) == 0 {
		s.freeByte = 0
	}
	return off, nil
}

// allocateEnd takes up to k clusters behind everything that was ever written.
// +checklocks:s.mu
func (s *allocator) allocateEnd(r *blk.Req, k int64) (host, n int64, err error) {
	if err := s.setDirtyBit(r); err != nil {
		return 0, 0, err
	}
	first, n, _, err := s.findCovered(r, true, 1, k)
	if err == nil {
		err = s.take(r, first, n)
	}
	if err != nil {
		return 0, 0, err
	}
	s.noteEnd((first + n) << s.cb)
	return first << s.cb, n, nil
}

// extendFile makes the file at least end bytes long: clusters that are in use must lie in it.
// +checklocks:s.mu
func (s *allocator) extendFile(r *blk.Req, end int64, m blk.Prealloc) error {
	if end <= s.file.Size() {
		return nil
	}
	s.wrote++
	if m == blk.PreallocMetadata {
		return s.file.Resize(ctxOf(r), end, false, blk.PreallocOff)
	}
	if err := s.file.Resize(ctxOf(r), end, false, m); err != nil {
		return fmt.Errorf("Failed to resize underlying file: %w", err)
	}
	return nil
}

// padding is to what length what is written to new clusters is filled up: a page, so that it is not
// written piecemeal, and not the cluster. What lies behind it in its last cluster means nothing.
const padding = 4 << 10

// writeNew writes b to new clusters and returns where.
// +checklocks:s.mu
func (s *allocator) writeNew(r *blk.Req, b []byte, what string) (int64, error) {
	n := blk.AlignUp(int64(len(b)), s.cs) >> s.cb
	first, _, err := s.allocate(r, n, n, what)
	if err != nil {
		return 0, err
	}
	for i := range n {
		s.fresh = append(s.fresh, first+i)
	}
	if pad := blk.AlignUp(int64(len(b)), min(s.cs, padding)) - int64(len(b)); pad != 0 {
		b = append(b, make([]byte, pad)...)
	}
	s.noteEnd((first + n) << s.cb)
	return first << s.cb, s.writeMeta(r, b, first<<s.cb, 0)
}

// giveBack frees what was written to new clusters for nothing: the image does not refer to it.
// +checklocks:s.mu
func (s *allocator) giveBack(r *blk.Req) {
	for _, c := range s.fresh {
		s.unref(r, freed{off: c << s.cb, n: s.cs})
	}
	s.fresh = nil
}

// taken tells that cluster k must not be given out, although its refcount may be 0.
// +checklocks:s.mu
func (s *allocator) taken(k int64) bool {
	if s.wrong.n == 0 && s.counted == nil && s.mending == nil {
		return false
	}
	return s.wrong.at(k) || s.counted.get(k) > 0 || s.mending != nil && s.mending.t.get(k) > 0
}
