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
	// lastCopy is the most, in bytes, that is copied while the source is held quiet for the end.
	lastCopy = 4 << 20
	// patience is how many passes a job makes before it holds up guests to get ready, and hold how long it does that at most, as far as it can
	// tell; it doubles, maxDoublings times at most, each time that as many passes more as doubleAfter were in vain.
	patience     = 3
	hold         = 20 * time.Millisecond
	doubleAfter  = 20
	maxDoublings = 4
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
		j.driver.job.Store(nil)
	}
	return err
}

// fit makes the sizes equal, or tells that they are not.
func (j *job) fit(ctx context.Context) error {
	source, target := j.Source.Size(), j.Target.Size()
	switch {
	case j.Base == j.Target && source > target:
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
	if b, ok := t.Driver().(graph.Backed); ok && t.Backing() == nil {
		if name, _ := b.BackingFile(); name != "" && j.Granularity < t.Caps().Limits.ClusterSize {
			j.allCluster = t.Caps().Limits.ClusterSize
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
	last := chain.Overlay(j.Source, j.Base) // the last one to be copied
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
		err := j.onTarget(ctx, func(r *blk.Req, e *graph.Edge) error { return e.Zero(r, off, n, j.unmap()) })
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

// keepInStep copies what is dirty until the job is to end.
func (j *job) keepInStep(ctx context.Context, h *jobs.Handle) error {
	for pass := 0; ; pass++ {
		// Guests' writes that are under way end as they began: those to both sides hold their ranges, the others are recorded.
		if *j.copyMode.Load() == types.MirrorCopyModeWriteBlocking {
			j.driver.job.Store(j)
		} else {
			j.driver.job.Store(nil)
		}
		if err := j.failure.Load(); err != nil {
			return *err
		}
		if err := h.Checkpoint(); err != nil {
			return err
		}
		dirty := j.bits.Count()
		h.SetRemaining(dirty + j.both.Load())
		ending := j.ready.Load() && (j.complete.Load() || h.Cancelled())
		switch {
		case ending && dirty <= lastCopy:
			if ended, err := j.tryEnd(ctx, h); ended || err != nil {
				return err
			}
		case !j.ready.Load() && (dirty == 0 || pass > patience && j.soon(dirty, pass)):
			if err := j.becomeReady(ctx, h); err != nil {
				return err
			}
		case dirty > 0:
			begin := time.Now()
			if err := j.copyDirty(ctx, h); err != nil {
				return err
			}
			j.rate = float64(dirty) / max(time.Since(begin).Seconds(), 1e-6)
			if !j.ready.Load() {
				if err := h.Linger(); err != nil { // what was copied is paid for before the job is ready
					return err
				}
			}
		default:
			if err := h.Sleep(idle); err != nil {
				return err
			}
		}
	}
}

// soon tells whether so many bytes are copied in no time, after so many passes.
func (j *job) soon(dirty int64, pass int) bool {
	t := hold << min((pass-patience)/doubleAfter, maxDoublings)
	return float64(dirty) < j.rate*t.Seconds()
}

// becomeReady makes the job ready when what is copied is on stable storage. A guest that makes granules dirty faster than they are copied is held up
// for a moment, so that there is a time when none is.
func (j *job) becomeReady(ctx context.Context, h *jobs.Handle) error {
	if j.bits.Count() > 0 {
		undrain, err := j.quieten(ctx, h, lastCopy)
		if undrain == nil {
			return j.failed(h, err)
		}
		undrain()
	}
	if err := j.onTarget(ctx, func(r *blk.Req, e *graph.Edge) error { return e.Flush(r) }); err != nil {
		return j.failed(h, err)
	}
	h.AwaitAnswer()
	j.ready.Store(true)
	h.Ready()
	return nil
}

// copyDirty copies what is dirty once. It returns when nothing is in flight any more.
func (j *job) copyDirty(ctx context.Context, h *jobs.Handle) error {
	chunk := min(max(j.BufSize/maxInFlight, j.Granularity), maxCopy)
	if j.driver.job.Load() != nil {
		chunk = min(chunk, shortCopy)
	}
	return copy.Run(h, copy.Task{
		Gate: &gates{job: j, ctx: ctx, with: map[*blk.Req]*blk.Req{}}, Size: j.Source.Size(), Workers: workers,
		Chunk: max(blk.AlignDown(chunk, j.Granularity), j.Granularity),
		Look:  j.look, Copy: func(r *blk.Req, off int64, e copy.Extent) error { return j.copy(r, off, e.N) },
		Side: j.side, Uncounted: true, RetryIgnored: true,
	})
}

// look tells the copy engine what is dirty in a range that begins with a granule, or where that begins.
func (j *job) look(_ *blk.Req, off, n int64) (copy.Extent, error) {
	end := j.Source.Size()
	at, k, ok := j.bits.NextDirty(off, end)
	switch {
	case j.failure.Load() != nil:
		return copy.Extent{N: end - off}, nil // the job is about to end
	case !ok:
		return copy.Extent{N: end - off}, nil
	case at > off:
		return copy.Extent{N: at - off}, nil
	}
	return copy.Extent{N: min(k, n), Action: copy.Data}, nil
}

// side tells reading errors from writing errors.
func (j *job) side(err error) (types.IoOperationType, types.BlockdevOnError) {
	var c *graph.CopyError
	if errors.As(err, &c) && c.Write {
		return types.IoOperationTypeWrite, j.OnTargetError
	}
	return types.IoOperationTypeRead, j.OnSourceError
}

// copy copies what is dirty of [off, off+n), which is whole granules. What fails is dirty again.
func (j *job) copy(r *blk.Req, off, n int64) error {
	end := off + n
	if c := j.allCluster; c > 0 {
		off = blk.AlignDown(off, c)
		end = min(blk.AlignUp(end, c), j.Source.Size())
	}
	s, err := j.ranges.take(r.Ctx, off, end-off)
	if err != nil {
		return err
	}
	defer j.ranges.give(s)
	if j.allCluster > 0 {
		return j.copyClean(r, off, end)
	}
	for off < end {
		at, k, ok := j.bits.NextDirty(off, end)
		if !ok {
			break
		}
		if err := j.copyClean(r, at, at+min(k, maxCopy)); err != nil {
			return err
		}
		off = at + min(k, maxCopy)
	}
	return nil
}

// copyClean makes [off, end) clean and copies it.
func (j *job) copyClean(r *blk.Req, off, end int64) error {
	j.bits.Clear(off, end-off)
	src, dst := j.driver.child(), j.target.Edge()
	for off < end {
		x, err := src.StatusAbove(r, nil, false, off, end-off)
		if err != nil || x.N == 0 {
			x = blk.Extent{N: end - off, Data: true} // reading tells
		}
		x = j.wholeGranules(x, off, end)
		if !x.Zero {
			x.N = min(x.N, maxCopy)
			err = graph.Copy(r, src, dst, off, x.N, 0)
		} else if err = j.zero(r, dst, off, x.N); err == nil && j.zeroesUnmap() {
			j.h.Count(-x.N) // the speed limit is for data
		}
		if err != nil {
			j.bits.Set(off, end-off)
			return err
		}
		j.h.Done(x.N)
		off += x.N
	}
	return nil
}

// wholeGranules makes an extent end with a granule, as data where it is zeroes in part only.
func (j *job) wholeGranules(x blk.Extent, off, end int64) blk.Extent {
	g := j.Granularity
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

// zero makes the target read as zeroes, where it does not do so already. Of an image that can have a backing file that is what it says itself: one that
// is attached later, as for a shallow copy, must not show through.
func (j *job) zero(r *blk.Req, dst *graph.Edge, off, n int64) error {
	if j.allCluster == 0 {
		x, err := dst.StatusAbove(r, nil, false, off, n)
		if err == nil && x.Zero && x.N == n && (x.Allocated && j.saysZero || !j.showsBacking) {
			return nil
		}
	}
	if err := dst.Zero(r, off, n, j.unmap()); err != nil {
		return &graph.CopyError{Write: true, Err: err}
	}
	return nil
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
