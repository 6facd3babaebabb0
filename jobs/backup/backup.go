// Package backup is the job behind blockdev-backup and drive-backup: it copies a node, as it is
// when the job starts, to a target while guests go on writing.
//
//	 before        while it runs                               after
//
//	parents        parents      job                            parents
//	   |              |        /                                  |
//	 source      copy-before-write ---------- target            source     target
//	                  | file
//	               source
//
// The filter copies what guests are about to overwrite, the job the rest; package copybeforewrite
// keeps the two apart.
package backup

import (
	"context"
	"log/slog"

	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/copy"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// workers copy extents at the same time where nobody says how many, mostWorkers at most. A worker
// takes up to copybeforewrite.MaxCopy of memory.
const (
	workers     = 2
	mostWorkers = 64
	// besideGuests is how many bytes are copied in one go while guests write.
	besideGuests = 128 << 10
)

// job is the runner.
type job struct {
	args           types.BlockdevBackup // canonical: nodes by their own names, sync not incremental
	source, target *graph.Node
	bitmap         *graph.DirtyBitmap // nil: none
	bitmapMode     types.BitmapSyncMode
	closesTarget   bool // the target's node goes with the job, and nobody else can flush it

	site   blockjob.Site
	driver *copybeforewrite.Driver
	root   *graph.Root // of the job's requests
	// of those requests
	patience blockjob.Patience
	listed   *graph.DirtyBitmap // what is to do, as clients see it on the source
	entered  bool
	frozen   bool // the bitmap is
	alone    bool // what the target does not hold are zeroes for good
	idle     bool // nothing was to do when the job was made
	ok       bool
	lost     bool // the target could not be flushed: nobody knows what of it is on stable storage

	surplus
}

func (j *job) perf() types.BackupPerf { return types.Or(j.args.XPerf, types.BackupPerf{}) }

func (j *job) policies() copy.Policies {
	return copy.PoliciesOf(j.args.OnSourceError, j.args.OnTargetError)
}

// Run implements jobs.Runner.
func (j *job) Run(ctx context.Context, h *jobs.Handle) error {
	defer j.patience.EndsWith(ctx)()
	j.driver.Remaining(h.SetRemaining)
	if j.idle && j.args.Sync != types.MirrorSyncModeNone {
		return nil // else guests may have copied already, or be copying, what there is
	}
	h.Yield()
	if j.args.Sync == types.MirrorSyncModeNone {
		return h.Idle()
	}
	if j.args.Sync == types.MirrorSyncModeTop {
		if err := j.skipUnallocated(ctx, h); err != nil {
			return err
		}
	}
	// Only of a full copy it is known that nothing will be put below it.
	j.alone = j.args.Sync == types.MirrorSyncModeFull && blockjob.StandsAlone(j.target)
	t := copy.Task{
		Gate: copy.RootGate(ctx, j.root), Size: j.source.Size(), Chunk: copybeforewrite.MaxCopy,
		Copy: j.copy, LongZeroes: true, Guests: j.driver.Guests(),
		Side: j.policies().Side, Uncounted: true, RetryIgnored: true,
	}
	p := j.perf()
	if most := types.Or(p.MaxChunk, 0); most > 0 {
		t.Chunk = min(t.Chunk, blk.AlignDown(most, j.driver.Cluster()))
	}
	t.Chunk = max(t.Chunk, j.driver.Cluster())
	t.Piece = blk.AlignUp(besideGuests, j.driver.Cluster())
	if t.SetWorkers(workers, j.source, j.target); p.MaxWorkers != nil {
		t.Workers = int(min(mostWorkers, *p.MaxWorkers))
	}
	t.Look = func(r *blk.Req, off, _ int64) (copy.Extent, error) { return j.look(h, r, off, t.Chunk) }
	for {
		if err := copy.Run(h, t); err != nil {
			return err
		}
		// What guests are copying was passed over, and is to do again where that fails.
		if err := j.driver.WaitCopies(ctx); err != nil {
			return err
		}
		if j.driver.Over() {
			break
		}
	}
	if err := j.giveUpRest(ctx); err != nil {
		return err
	}
	if !j.closesTarget && (j.bitmap == nil || j.bitmapMode == types.BitmapSyncModeNever) {
		return nil
	}
	return j.flush(ctx, h)
}

// flush puts the target on stable storage before the bitmap forgets what is in it, or before it is
// closed: what fails then nobody is told. Other backups get there when their users flush the
// target. Where the policy ignores that it fails, the job succeeds and the bitmap forgets nothing.
func (j *job) flush(ctx context.Context, h *jobs.Handle) error {
	for {
		r, err := j.root.Begin(ctx)
		if err != nil {
			return err
		}
		err = j.site.Filter.Child("target").Flush(r)
		j.root.End(r)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return jobs.ErrCancelled
		}
		switch h.OnError(types.IoOperationTypeWrite, j.policies().Write, err) {
		case types.BlockErrorActionReport:
			j.lost = true
			return err
		case types.BlockErrorActionIgnore:
			j.lost = true
			return nil
		}
		if err := h.Checkpoint(); err != nil {
			return err
		}
	}
}

// look tells the copy engine what is to do from off on, where a cluster begins.
func (j *job) look(h *jobs.Handle, r *blk.Req, off, chunk int64) (copy.Extent, error) {
	size := j.source.Size()
	at, k, ok := j.driver.Pending().NextDirty(off, size)
	switch {
	case !ok:
		return copy.Extent{N: size - off}, nil
	case at > off:
		return copy.Extent{N: at - off}, nil
	}
	if k > chunk && j.alone && !h.Limited() {
		if n := j.driver.SameZeroes(r, off, k); n > chunk {
			return copy.Extent{N: n, Action: copy.Zero}, nil
		}
	}
	return copy.Extent{N: min(k, chunk), Action: copy.Data}, nil
}

func (j *job) copy(r *blk.Req, off int64, e copy.Extent) (int64, error) {
	if e.Action == copy.Zero {
		return j.driver.SkipZeroes(r, off, e.N), nil
	}
	n, err := j.driver.CopyCounting(r, off, e.N)
	if err == nil && j.stored != nil {
		j.canGiveUp(r, off, e.N)
	}
	return n, err
}

// skipUnallocated takes off the list what the source itself does not hold.
func (j *job) skipUnallocated(ctx context.Context, h *jobs.Handle) error {
	c, top := j.driver.Cluster(), j.source.SkipFilters()
	from := int64(0) // what the source does not hold goes from here on
	return blockjob.Walk(ctx, h, j.root, j.site.Filter.FilteredChild(), top, func(off int64, x blk.Extent) {
		if end := off + x.N; x.Allocated {
			from = blk.AlignUp(end, c)
		} else if lo, hi := blk.Inner(from, end, c, j.source.Size()); lo < hi {
			j.driver.Skip(lo, hi-lo)
			from = hi
			j.driver.Remaining(h.SetRemaining)
		}
	})
}

// Commit implements jobs.Committer.
func (j *job) Commit(*jobs.Handle) { j.ok = true }

// Clean implements jobs.Cleaner: the filter goes, the bitmap is handed over.
func (j *job) Clean(h *jobs.Handle) {
	if !j.ok {
		j.settle(h)
	}
	hold, _ := j.source.Graph().HoldNodes(context.Background(), j.source) // none if the graph is closed
	defer hold.Release()
	undrain, err := j.source.Graph().Drain(context.Background(), j.source)
	if err == nil {
		defer undrain()
	} else {
		j.lost = true
	}
	j.listed.Remove()
	j.endBitmap()
	_ = j.driver.Stop(context.Background()) // who stays at the filter does so without the job
	filter := j.site.Filter
	j.site.TakeOut(func(tx *graph.Tx) error { // the target as well: the filter copies nothing any more
		if e := filter.Child("target"); e != nil {
			return tx.Detach(e)
		}
		return nil
	})
	j.site.Release()
	h.Show(visible.BackupLeft, j.source)
}

// settle puts what a job that has failed has copied so far on stable storage, if its bitmap is to
// forget that. Guests go on meanwhile, and do not copy any more.
func (j *job) settle(h *jobs.Handle) {
	if !j.frozen || j.bitmapMode != types.BitmapSyncModeAlways || j.lost {
		return
	}
	err := j.driver.Stop(context.Background())
	if err == nil && !j.driver.Copied().Empty() {
		// Without a unit of work: nobody waits for a gate here.
		err = j.site.Filter.Child("target").Flush(&blk.Req{Ctx: context.Background(), Job: true})
	}
	if err != nil {
		j.lost = true
		slog.Warn("a backup that failed cannot flush its target; its bitmap keeps everything",
			"job", h.Job().ID(), "error", err)
	}
}

// endBitmap lets the bitmap record what the next backup needs: what was written since this one,
// and, where this one does not count, what was recorded before. It forgets only what is on stable
// storage in the target. The source is quiet.
func (j *job) endBitmap() {
	if !j.frozen {
		return
	}
	j.frozen = false
	bits, counts := j.bitmap.Bits(), j.ok || j.bitmapMode == types.BitmapSyncModeAlways
	switch {
	case j.bitmapMode == types.BitmapSyncModeNever || !counts:
		j.bitmap.Reclaim()
		return
	case j.lost:
		j.bitmap.Reclaim()
		bits.Merge(j.driver.Copied())
	default:
		j.bitmap.Abdicate()
	}
	bits.Merge(j.driver.Pending()) // nothing, if it has succeeded
}
