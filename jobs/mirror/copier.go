package mirror

import (
	"slices"

	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/copy"
)

// copier makes the target what the source shows.
type copier struct {
	plan
	driver *filterDriver
	bits   *bitmap.Bitmap // what is dirty
	ranges ranges
	writes *graph.Root // the job's requests at the target
	life   life

	// Set before the first copy.
	h *jobs.Handle
	// hidden is the target's cluster size, in bytes, if its backing file is not opened: of a
	// cluster that gets anything nothing shows through later. It is allCluster as well if granules
	// are smaller; both 0: neither.
	hidden, allCluster     int64
	alone                  bool // what the target does not hold are zeroes for good
	saysZero, showsBacking bool // the target's own allocation tells whether a backing file shows; one could at all

	asked int64 // up to where the walk knows that there are no long zeroes
}

// findClusters finds out whether a backing file can come to lie below what is left out of the
// target, and whether its clusters must be written as a whole: it has a backing file, but that is
// not opened yet.
func (c *copier) findClusters() {
	t := c.target.SkipFilters()
	c.saysZero = t.Caps().Backing
	c.showsBacking = slices.ContainsFunc(t.NodesBelow(), func(n *graph.Node) bool { return n.Caps().Backing })
	c.alone = c.base == nil && !c.none && blockjob.StandsAlone(t)
	if b, ok := t.Driver().(graph.Backed); ok && t.Backing() == nil {
		if name, _ := b.BackingFile(); name != "" {
			if c.hidden = t.Caps().Limits.ClusterSize; c.granularity < c.hidden {
				c.allCluster = c.hidden
			}
		}
	}
}

// look tells the copy engine what is dirty from off on, where a granule begins, or where that
// begins.
func (c *copier) look(r *blk.Req, off, chunk int64) (copy.Extent, error) {
	end := c.source.Size()
	at, k, ok := c.bits.NextDirty(off, end)
	switch {
	case !ok || c.life.failure() != nil: // then the job is about to end
		return copy.Extent{N: end - off}, nil
	case at > off:
		return copy.Extent{N: at - off}, nil
	}
	n, step := c.longZeroes(r, off, k, chunk)
	if n > 0 {
		return copy.Extent{N: n, Action: copy.Zero}, nil
	}
	return copy.Extent{N: min(k, chunk, step), Action: copy.Data}, nil
}

// copy copies what is dirty of [off, off+n), which is whole granules. What fails is dirty again.
func (c *copier) copy(r *blk.Req, off, n int64) error {
	end := off + n
	if c.allCluster > 0 {
		lo, hi := blk.Outer(off, end, c.allCluster, c.source.Size())
		return c.copyClean(r, lo, hi)
	}
	for off < end {
		at, k, ok := c.bits.NextDirty(off, end)
		if !ok {
			break
		}
		if err := c.copyClean(r, at, at+k); err != nil {
			return err
		}
		off = at + k
	}
	return nil
}

// copyClean makes [off, end), which is whole granules, clean and copies it. A granule may be longer
// than what is copied at once: guests' writes to both sides wait for that only. Of a range that is
// longer than what is looked at as data, the rest is dirty again after the first extent, or after
// the cluster in which that ends where clusters are copied as a whole.
func (c *copier) copyClean(r *blk.Req, off, end int64) error {
	long := end-off > c.longest()
	c.bits.Clear(off, end-off)
	for off < end {
		s, err := c.ranges.take(r.Ctx, off, end-off)
		if err != nil {
			c.bits.Set(off, end-off)
			return err
		}
		x, err := c.copyTaken(r, s, off, end)
		if err != nil {
			c.bits.Set(off, end-off)
			return err
		}
		if x.Zero && c.zeroesUnmap() {
			c.h.Count(-x.N) // the speed limit is for data
		}
		c.h.Done(x.N)
		if off += x.N; off < end && long {
			stop := off
			if c.allCluster > 0 { // else the next pass begins with the same cluster again
				stop = min(blk.AlignUp(off, c.allCluster), end)
			}
			c.bits.Set(stop, end-stop)
			end, long = stop, false
		}
	}
	return nil
}

// copyTaken is copyExtent that gives the range s back, also after a panic: guests wait for it.
func (c *copier) copyTaken(r *blk.Req, s *span, off, end int64) (blk.Extent, error) {
	defer c.ranges.give(s)
	return c.copyExtent(r, off, end)
}

// longest is the longest range that a unit of work may have to write to the target, in bytes.
func (c *copier) longest() int64 { return max(maxCopy, c.granularity, c.allCluster) }

// copyExtent copies the first extent of [off, end), and tells what it was. The range is taken.
func (c *copier) copyExtent(r *blk.Req, off, end int64) (blk.Extent, error) {
	src, dst := c.driver.Below(), c.writes.Edge()
	x, err := src.StatusAbove(r, nil, false, off, end-off)
	if err != nil || x.N == 0 {
		x = blk.Extent{N: end - off, Data: true} // reading tells
	}
	if x = x.Whole(off, end, min(c.granularity, maxCopy)); x.Zero {
		x.N, err = c.zero(r, dst, off, x.N)
		return x, err
	}
	x.N = min(x.N, c.maxCopy())
	return x, graph.Copy(r, src, dst, off, x.N, 0)
}

// maxCopy is the most that is copied at once.
func (c *copier) maxCopy() int64 {
	if c.life.both() {
		return shortCopy
	}
	return maxCopy
}

// zero makes the beginning of [off, off+n), whole granules, read as zeroes in the target and
// returns how much that was.
func (c *copier) zero(r *blk.Req, dst *graph.Edge, off, n int64) (int64, error) {
	already, _ := c.zeroesThere(r, dst, off, n)
	if already == n {
		return n, nil
	}
	// What is long was found to need nothing; that it does now is done in steps.
	if n = min(n, c.longest()); already >= n {
		return n, nil
	}
	if err := dst.Zero(r, off, n, c.unmap); err != nil {
		return 0, &graph.CopyError{Write: true, Err: err}
	}
	return n, nil
}

// zeroesThere is how much of [off, off+n) reads as zeroes in the target for good, and for how long
// it is known that it does, or does not. Of an image that can have a backing file it is what it
// says itself, unless the copy is to stand alone: one that is attached later, as for a shallow
// copy, must not show through.
func (c *copier) zeroesThere(r *blk.Req, dst *graph.Edge, off, n int64) (zero, known int64) {
	if c.allCluster > 0 {
		return 0, n
	}
	x, err := dst.StatusAbove(r, nil, false, off, n)
	switch {
	case err != nil:
		return 0, 0
	case x.Zero && (x.Allocated && c.saysZero || !c.showsBacking || c.alone):
		return x.N, x.N
	}
	return 0, x.N
}

// longZeroes is how much from off on, dirty granules of at most n bytes, reads as zeroes on both
// sides, if that is more than chunk; else 0, and it is asked again where that may have changed on
// one of them. step is what is to be done by itself meanwhile: where only the target is in the way,
// no more than that, so that the next question is asked where one of its clusters begins.
func (c *copier) longZeroes(r *blk.Req, off, n, chunk int64) (zeroes, step int64) {
	if n <= chunk || off < c.asked || c.allCluster > 0 || c.h.Limited() {
		return 0, n
	}
	x, err := c.driver.Below().StatusAbove(r, nil, false, off, n)
	known := x.N
	if err == nil && x.Zero {
		if x.N < n {
			x.N = max(blk.AlignDown(off+x.N, c.granularity)-off, 0)
		}
		var k int64
		if k, known = c.zeroesThere(r, c.writes.Edge(), off, x.N); k < n {
			k = max(blk.AlignDown(off+k, c.granularity)-off, 0)
		}
		if k > chunk {
			return k, n
		}
		if k == 0 && 0 < known && known < chunk {
			step = blk.AlignUp(known, c.granularity)
			c.asked = off + step
			return 0, step
		}
	}
	c.asked = off + max(known, chunk)
	return 0, n
}

// follow makes [off, end) of the target what the source shows there now. The range is taken.
func (c *copier) follow(r *blk.Req, off, end int64) error {
	for off < end {
		x, err := c.copyExtent(r, off, end)
		if err != nil {
			return err
		}
		off += x.N
	}
	return nil
}
