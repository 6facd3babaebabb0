package mirror

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/chain"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

const (
	// idle is how long a job that is ready waits before it looks for what was written; completing it does not wait.
	idle = 100 * time.Millisecond
)

// Run implements jobs.Runner.
func (j *job) Run(ctx context.Context, h *jobs.Handle) error {
	j.h = h
	if err := j.fit(ctx); err != nil {
		h.Yield() // the reference quiesces the source before it ends
		return err
	}
	if j.ZeroTarget && !j.None && !j.zeroesUnmap() {
		// All of it is to be copied, and clients that ask right after the start are told so.
		j.bits.SetAll()
		h.SetRemaining(j.bits.Count())
	}
	h.Yield()
	if j.Source.Size() > 0 {
		j.findClusters()
		if err := j.findDirty(ctx, h); err != nil {
			return err
		}
	}
	err := j.keepInStep(ctx, h)
	if err != nil {
		j.life.fail(err)
	}
	return err
}

// fit makes the sizes equal, or tells that they are not.
func (j *job) fit(ctx context.Context) error {
	source, target := j.Source.Size(), j.Target.Size()
	switch {
	case j.Base == j.Target && source > target:
		hold, err := j.g.HoldNodes(ctx, j.Target)
		if err != nil {
			return err
		}
		defer hold.Release()
		undrain, err := j.g.Drain(ctx, j.Target)
		if err != nil {
			return err
		}
		defer undrain()
		return chain.Grow(ctx, j.target.Edge(), source)
	case j.misfit():
		return errors.New("Source and target image have different sizes")
	}
	return nil
}

// misfit tells whether the target has a size of its own that is not the source's.
func (j *job) misfit() bool { return j.Base != j.Target && j.Source.Size() != j.Target.Size() }

// findClusters finds out whether a backing file can come to lie below what is left out of the target, and whether its clusters must be written as a whole: it has a backing file, but that is not opened yet.
func (j *job) findClusters() {
	t := j.Target.SkipFilters()
	j.saysZero = t.Caps().Backing
	j.showsBacking = slices.ContainsFunc(t.NodesBelow(), func(n *graph.Node) bool { return n.Caps().Backing })
	j.alone = j.Base == nil && !j.None && chain.StandsAlone(t)
	if b, ok := t.Driver().(graph.Backed); ok && t.Backing() == nil {
		if name, _ := b.BackingFile(); name != "" {
			if j.hidden = t.Caps().Limits.ClusterSize; j.Granularity < j.hidden {
				j.allCluster = j.hidden
			}
		}
	}
}

// findDirty makes dirty what has to be copied. Writes are recorded already.
func (j *job) findDirty(ctx context.Context, h *jobs.Handle) error {
	if j.None {
		return nil
	}
	if j.ZeroTarget {
		if !j.zeroesUnmap() {
			return nil
		}
		if err := j.zeroTarget(ctx, h); err != nil {
			return err
		}
	}
	last := graph.Now.Overlay(j.Source, j.Base) // the last one to be copied
	for off, size := int64(0), j.Source.Size(); off < size; {
		if err := h.Checkpoint(); err != nil {
			return err
		}
		r, err := j.root.Begin(ctx)
		if err != nil {
			return err
		}
		x, err := j.driver.child().StatusAbove(r, last, true, off, size-off)
		j.root.End(r)
		switch {
		case err != nil:
			return err
		case x.N == 0:
			return nil
		case x.Allocated:
			j.bits.Set(off, x.N)
		}
		off += x.N
	}
	return nil
}

// zeroesUnmap tells whether zeroing the target is fast and takes no space.
func (j *job) zeroesUnmap() bool {
	return j.Target.Options().Discard && j.Target.Caps().ZeroFlags&blk.MayUnmap != 0
}

// zeroTarget zeroes all of the target.
func (j *job) zeroTarget(ctx context.Context, h *jobs.Handle) error {
	const piece = 1 << 30
	for off, size := int64(0), j.Source.Size(); off < size; {
		if err := h.Checkpoint(); err != nil {
			return err
		}
		n := min(piece, size-off)
		err := j.onTarget(ctx, func(r *blk.Req, e *graph.Edge) error {
			if k := j.zeroAlready(r, e, off, size-off); k > n {
				n = k
				return nil
			}
			return e.Zero(r, off, n, j.unmap())
		})
		if err == nil {
			off += n
		} else if err = j.failed(h, err); err != nil {
			return err
		}
	}
	return nil
}

func (j *job) unmap() blk.Flags {
	if j.Unmap {
		return blk.MayUnmap
	}
	return 0
}

// onTarget calls f in a unit of work on the target.
func (j *job) onTarget(ctx context.Context, f func(r *blk.Req, e *graph.Edge) error) error {
	r, err := j.target.Begin(ctx)
	if err != nil {
		return err
	}
	defer j.target.End(r)
	if err := f(r, j.target.Edge()); err != nil {
		return &graph.CopyError{Write: true, Err: err}
	}
	return nil
}

// keepInStep copies what is dirty until the job is to end. What it has to reach, to be ready or to be
// over, it reaches in so many passes, however fast guests write.
func (j *job) keepInStep(ctx context.Context, h *jobs.Handle) error {
	for p := (pace{}); ; {
		s, cancelled := j.life.get(), h.Cancelled()
		if s.phase == ready && !s.endAsked(cancelled) {
			p.passes = 0
		}
		j.life.turn(p.stuck())
		if err := j.life.failure(); err != nil {
			return err
		}
		if err := h.Checkpoint(); err != nil {
			return err
		}
		dirty, most := j.bits.Count(), p.most()
		h.SetRemaining(dirty + j.both.Load())
		switch s.next(cancelled, dirty, most) {
		case end:
			if over, err := j.tryEnd(ctx, h, max(most, lastCopy)); over || err != nil {
				return err
			}
		case getEven:
			if even, err := j.becomeReady(ctx, h, dirty, most); err != nil {
				return err
			} else if even {
				continue
			}
		case rest:
			if err := h.Sleep(idle); err != nil {
				return err
			}
			continue
		}
		// Also when the attempt was in vain: each turn makes the distance shorter.
		if dirty = j.bits.Count(); dirty == 0 {
			continue
		}
		begin := time.Now()
		if err := j.copyDirty(ctx, h); err != nil {
			return err
		}
		p.passed(dirty, time.Since(begin))
		if j.life.get().phase == copying {
			if err := h.Linger(); err != nil { // what was copied is paid for before the job is ready
				return err
			}
		}
	}
}

// becomeReady makes the job ready when what is copied is on stable storage. What is dirty, most bytes at most, is copied first with the source held
// quiet, so that there is a time when nothing is. It tells whether the job is ready.
func (j *job) becomeReady(ctx context.Context, h *jobs.Handle, dirty, most int64) (bool, error) {
	if dirty > 0 {
		undrain, err := j.quieten(ctx, h, most)
		if undrain == nil {
			return false, j.failed(h, err)
		}
		undrain()
	}
	if err := j.onTarget(ctx, func(r *blk.Req, e *graph.Edge) error { return e.Flush(r) }); err != nil {
		return false, j.failed(h, err)
	}
	h.AwaitAnswer()
	j.life.to(ready)
	h.Ready()
	return true, nil
}

// copyDirty copies what is dirty once. It returns when nothing is in flight any more.
func (j *job) copyDirty(ctx context.Context, h *jobs.Handle) error {
	chunk := min(max(j.BufSize/maxInFlight, j.Granularity), j.maxCopy())
	chunk = max(blk.AlignDown(chunk, j.Granularity), j.Granularity)
	j.asked = 0
	return copy.Run(h, copy.Task{
		Gate: &gates{job: j, ctx: ctx, with: map[*blk.Req]*blk.Req{}}, Size: j.Source.Size(), Workers: workers, Chunk: chunk, LongZeroes: true,
		Look: func(r *blk.Req, off, _ int64) (copy.Extent, error) { return j.look(r, off, chunk) },
		// It counts by itself, as it may have to do what is done once more.
		Copy: func(r *blk.Req, off int64, e copy.Extent) (int64, error) {
			if j.life.failure() != nil {
				return 0, nil // the job is about to end: nothing is tried again, and what is left stays dirty
			}
			return 0, j.copy(r, off, e.N)
		},
		Side: j.side, Uncounted: true, RetryIgnored: true,
	})
}

// look tells the copy engine what is dirty from off on, where a granule begins, or where that begins.
func (j *job) look(r *blk.Req, off, chunk int64) (copy.Extent, error) {
	end := j.Source.Size()
	at, k, ok := j.bits.NextDirty(off, end)
	switch {
	case j.life.failure() != nil:
		return copy.Extent{N: end - off}, nil // the job is about to end
	case !ok:
		return copy.Extent{N: end - off}, nil
	case at > off:
		return copy.Extent{N: at - off}, nil
	}
	n, step := j.longZeroes(r, off, k, chunk)
	if n > 0 {
		return copy.Extent{N: n, Action: copy.Zero}, nil
	}
	return copy.Extent{N: min(k, chunk, step), Action: copy.Data}, nil
}

// side tells reading errors from writing errors.
func (j *job) side(err error) (types.IoOperationType, types.BlockdevOnError) {
	var c *graph.CopyError
	op, policy := types.IoOperationTypeRead, j.OnSourceError
	if errors.As(err, &c) && c.Write {
		op, policy = types.IoOperationTypeWrite, j.OnTargetError
	}
	if j.life.get().phase == ending {
		policy = types.BlockdevOnErrorReport
	}
	return op, policy
}

// copy copies what is dirty of [off, off+n), which is whole granules. What fails is dirty again.
func (j *job) copy(r *blk.Req, off, n int64) error {
	end := off + n
	if c := j.allCluster; c > 0 {
		return j.copyClean(r, blk.AlignDown(off, c), min(blk.AlignUp(end, c), j.Source.Size()))
	}
	for off < end {
		at, k, ok := j.bits.NextDirty(off, end)
		if !ok {
			break
		}
		if err := j.copyClean(r, at, at+k); err != nil {
			return err
		}
		off = at + k
	}
	return nil
}

// copyClean makes [off, end), which is whole granules, clean and copies it. A granule may be longer than what is copied at once: guests' writes to
// both sides wait for that only. Of a range that is longer than what is looked at as data, the rest is dirty again after the first extent, or after the
// cluster in which that ends where clusters are copied as a whole.
func (j *job) copyClean(r *blk.Req, off, end int64) error {
	long := end-off > j.longest()
	j.bits.Clear(off, end-off)
	for off < end {
		s, err := j.ranges.take(r.Ctx, off, end-off)
		if err != nil {
			j.bits.Set(off, end-off)
			return err
		}
		x, err := j.copyTaken(r, s, off, end)
		if err != nil {
			j.bits.Set(off, end-off)
			return err
		}
		if x.Zero && j.zeroesUnmap() {
			j.h.Count(-x.N) // the speed limit is for data
		}
		j.h.Done(x.N)
		if off += x.N; off < end && long {
			stop := off
			if j.allCluster > 0 { // else the next pass begins with the same cluster again
				stop = min(blk.AlignUp(off, j.allCluster), end)
			}
			j.bits.Set(stop, end-stop)
			end, long = stop, false
		}
	}
	return nil
}

// copyTaken is copyExtent that gives the range s back, also after a panic: guests wait for it.
func (j *job) copyTaken(r *blk.Req, s *span, off, end int64) (blk.Extent, error) {
	defer j.ranges.give(s)
	return j.copyExtent(r, off, end)
}

// longest is the longest range that a unit of work may have to write to the target, in bytes.
func (j *job) longest() int64 { return max(maxCopy, j.Granularity, j.allCluster) }

// copyExtent copies the first extent of [off, end), and tells what it was. The range is taken.
func (j *job) copyExtent(r *blk.Req, off, end int64) (blk.Extent, error) {
	src, dst := j.driver.child(), j.target.Edge()
	x, err := src.StatusAbove(r, nil, false, off, end-off)
	if err != nil || x.N == 0 {
		x = blk.Extent{N: end - off, Data: true} // reading tells
	}
	if x = j.wholeGranules(x, off, end); x.Zero {
		x.N, err = j.zero(r, dst, off, x.N)
		return x, err
	}
	x.N = min(x.N, j.maxCopy())
	return x, graph.Copy(r, src, dst, off, x.N, 0)
}

// maxCopy is the most that is copied at once.
func (j *job) maxCopy() int64 {
	if j.life.both() {
		return shortCopy
	}
	return maxCopy
}

// wholeGranules makes an extent end with a granule, or with what is copied at once of a long one, as data where it is zeroes in part only.
func (j *job) wholeGranules(x blk.Extent, off, end int64) blk.Extent {
	g := min(j.Granularity, maxCopy)
	if off+x.N >= end {
		x.N = end - off
		return x
	}
	if n := blk.AlignDown(off+x.N, g) - off; x.Zero && n > 0 {
		x.N = n
		return x
	}
	return blk.Extent{N: min(blk.AlignUp(off+x.N, g), end) - off, Data: true}
}

// zero makes the beginning of [off, off+n), whole granules, read as zeroes in the target and returns how much that was.
func (j *job) zero(r *blk.Req, dst *graph.Edge, off, n int64) (int64, error) {
	already := j.zeroAlready(r, dst, off, n)
	if already == n {
		return n, nil
	}
	// What is long was found to need nothing; that it does now is done in steps.
	if n = min(n, j.longest()); already >= n {
		return n, nil
	}
	if err := dst.Zero(r, off, n, j.unmap()); err != nil {
		return 0, &graph.CopyError{Write: true, Err: err}
	}
	return n, nil
}

// zeroAlready is how much of [off, off+n) reads as zeroes in the target for good. Of an image that can have a backing file that is what it says itself, unless the
// copy is to stand alone: one that is attached later, as for a shallow copy, must not show through.
func (j *job) zeroAlready(r *blk.Req, dst *graph.Edge, off, n int64) int64 {
	k, _ := j.zeroesThere(r, dst, off, n)
	return k
}

// zeroesThere is zeroAlready that tells as well for how long it is so, or is not so.
func (j *job) zeroesThere(r *blk.Req, dst *graph.Edge, off, n int64) (zero, known int64) {
	if j.allCluster > 0 {
		return 0, n
	}
	x, err := dst.StatusAbove(r, nil, false, off, n)
	switch {
	case err != nil:
		return 0, 0
	case x.Zero && (x.Allocated && j.saysZero || !j.showsBacking || j.alone):
		return x.N, x.N
	}
	return 0, x.N
}

// longZeroes is how much from off on, dirty granules of at most n bytes, reads as zeroes on both sides, if that is more than chunk; else 0, and it is
// asked again where that may have changed on one of them. step is what is to be done by itself meanwhile: where only the target is in the way, no more than that,
// so that the next question is asked where one of its clusters begins.
func (j *job) longZeroes(r *blk.Req, off, n, chunk int64) (zeroes, step int64) {
	if n <= chunk || off < j.asked || j.allCluster > 0 || j.h.Limited() {
		return 0, n
	}
	x, err := j.driver.child().StatusAbove(r, nil, false, off, n)
	known := x.N
	if err == nil && x.Zero {
		if x.N < n {
			x.N = max(blk.AlignDown(off+x.N, j.Granularity)-off, 0)
		}
		var k int64
		if k, known = j.zeroesThere(r, j.target.Edge(), off, x.N); k < n {
			k = max(blk.AlignDown(off+k, j.Granularity)-off, 0)
		}
		if k > chunk {
			return k, n
		}
		if k == 0 && 0 < known && known < chunk {
			step = blk.AlignUp(known, j.Granularity)
			j.asked = off + step
			return 0, step
		}
	}
	j.asked = off + max(known, chunk)
	return 0, n
}

// gates let a unit of work begin on both sides. Nobody waits for one of them while inside the other.
type gates struct {
	*job
	ctx  context.Context
	mu   sync.Mutex
	with map[*blk.Req]*blk.Req // guarded by mu; the pass of the target for each unit
}

// Begin implements copy.Gate.
func (g *gates) Begin() (*blk.Req, error) {
	for {
		r, err := g.root.Begin(g.ctx)
		if err != nil {
			return nil, err
		}
		if t := g.target.TryBegin(); t != nil {
			g.mu.Lock()
			g.with[r] = t
			g.mu.Unlock()
			return r, nil
		}
		g.root.End(r)
		t, err := g.target.Begin(g.ctx)
		if err != nil {
			return nil, err
		}
		g.target.End(t)
	}
}

// End implements copy.Gate.
func (g *gates) End(r *blk.Req) {
	g.mu.Lock()
	t := g.with[r]
	delete(g.with, r)
	g.mu.Unlock()
	g.target.End(t)
	g.root.End(r)
}
