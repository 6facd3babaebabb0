// Package backup is the job behind blockdev-backup: it copies a node, as it is when the job starts, to a target while guests go on writing.
//
//	 before        while it runs                               after
//
//	parents        parents      job                            parents
//	   |              |        /                                  |
//	 source      copy-before-write ---------- target            source     target
//	                  | file
//	               source
//
// The filter copies what guests are about to overwrite, the job the rest; package copybeforewrite keeps the two apart.
package backup

import (
	"context"
	"errors"
	"log/slog"

	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/chain"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

// workers copy extents at the same time where nobody says how many, mostWorkers at most. A worker takes up to copybeforewrite.MaxCopy of memory.
const (
	workers     = 2
	mostWorkers = 64
	// besideGuests is how many bytes are copied in one go while guests write.
	besideGuests = 128 << 10
)

// Args says what to back up. Source, Target and Bitmap were looked up by the caller, who has checked that the modes fit together.
type Args struct {
	ID             string
	Source, Target *graph.Node
	Sync           types.MirrorSyncMode // not incremental
	Bitmap         *graph.DirtyBitmap   // nil: none
	BitmapMode     types.BitmapSyncMode
	Compress       bool
	Speed          int64 // bytes per second, 0: no limit
	OnSourceError  types.BlockdevOnError
	OnTargetError  types.BlockdevOnError
	FilterNodeName *string // nil: generated, and the filter is implicit
	ManualFinalize bool
	ManualDismiss  bool
	Buffered       bool      // data go through memory
	MaxWorkers     *int64    // nil: as many as are good
	MaxChunk       int64     // bytes; 0: as the filter copies at most
	Txn            *jobs.Txn // nil: the job stands alone
	// ClosesTarget: the target's node goes with the job, and nobody else can flush it.
	ClosesTarget bool
}

// errInUse is why the nodes of a job take no other operation.
var errInUse = errors.New("block device is in use by block job: backup")

// job is the runner.
type job struct {
	Args
	g      *graph.Graph
	mj     *jobs.Job   // nil until it is created
	filter *graph.Node // nil once removed
	driver *copybeforewrite.Driver
	root   *graph.Root        // of the job's requests
	hold   *graph.Root        // on the target
	listed *graph.DirtyBitmap // what is to do, as clients see it on the source
	frozen bool               // the bitmap is
	alone  bool               // what the target does not hold are zeroes for good
	idle   bool               // nothing was to do when the job was made
	ok     bool
	lost   bool // the target could not be flushed: nobody knows what of it is on stable storage
	block  []func()
}

// Run implements jobs.Runner.
func (j *job) Run(ctx context.Context, h *jobs.Handle) error {
	j.driver.Remaining(h.SetRemaining)
	if j.idle && j.Sync != types.MirrorSyncModeNone {
		return nil // else guests may have copied already, or be copying, what there is
	}
	h.Yield()
	if j.Sync == types.MirrorSyncModeNone {
		return h.Idle()
	}
	if j.Sync == types.MirrorSyncModeTop {
		if err := j.skipUnallocated(ctx, h); err != nil {
			return err
		}
	}
	// Only of a full copy it is known that nothing will be put below it.
	j.alone = j.Sync == types.MirrorSyncModeFull && chain.StandsAlone(j.Target)
	t := copy.Task{
		Gate: copy.RootGate(ctx, j.root), Size: j.Source.Size(), Chunk: copybeforewrite.MaxCopy, Workers: workers,
		Copy: j.copy, LongZeroes: true, Guests: j.driver.Guests(), Side: j.side, Uncounted: true, RetryIgnored: true,
	}
	if j.MaxChunk > 0 {
		t.Chunk = min(t.Chunk, blk.AlignDown(j.MaxChunk, j.driver.Cluster()))
	}
	t.Chunk = max(t.Chunk, j.driver.Cluster())
	t.Piece = blk.AlignUp(besideGuests, j.driver.Cluster())
	if j.MaxWorkers != nil {
		t.Workers = int(min(mostWorkers, *j.MaxWorkers))
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
	if !j.ClosesTarget && (j.Bitmap == nil || j.BitmapMode == types.BitmapSyncModeNever) {
		return nil
	}
	return j.flush(ctx, h)
}

// flush puts the target on stable storage before the bitmap forgets what is in it, or before it is closed: what fails then nobody is told. Other backups
// get there when their users flush the target. Where the policy ignores that it fails, the job succeeds and the bitmap forgets nothing.
func (j *job) flush(ctx context.Context, h *jobs.Handle) error {
	for {
		r, err := j.root.Begin(ctx)
		if err != nil {
			return err
		}
		err = j.filter.Child("target").Flush(r)
		j.root.End(r)
		if err == nil {
			return nil
		}
		switch h.OnError(types.IoOperationTypeWrite, j.OnTargetError, err) {
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
	size := j.Source.Size()
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
	return j.driver.CopyCounting(r, off, e.N)
}

// side tells reading errors from writing errors.
func (j *job) side(err error) (types.IoOperationType, types.BlockdevOnError) {
	var c *graph.CopyError
	if errors.As(err, &c) && c.Write {
		return types.IoOperationTypeWrite, j.OnTargetError
	}
	return types.IoOperationTypeRead, j.OnSourceError
}

// skipUnallocated takes off the list what the source itself does not hold.
func (j *job) skipUnallocated(ctx context.Context, h *jobs.Handle) error {
	c, top := j.driver.Cluster(), j.Source.SkipFilters()
	from := int64(0) // what the source does not hold goes from here to off
	for off, size := int64(0), j.Source.Size(); off < size; {
		if err := h.Checkpoint(); err != nil {
			return err
		}
		r, err := j.root.Begin(ctx)
		if err != nil {
			return err
		}
		x, err := j.filter.FilteredChild().StatusAbove(r, top, true, off, size-off)
		j.root.End(r)
		if err != nil {
			return err
		}
		if x.N == 0 {
			break
		}
		if off += x.N; x.Allocated {
			off = min(blk.AlignUp(off, c), size)
			from = off
			continue
		}
		lo, hi := blk.AlignUp(from, c), blk.AlignDown(off, c)
		if off == size {
			hi = size
		}
		if lo < hi {
			j.driver.Skip(lo, hi-lo)
			from = hi
			j.driver.Remaining(h.SetRemaining)
		}
	}
	return nil
}

// Commit implements jobs.Committer.
func (j *job) Commit(*jobs.Handle) { j.ok = true }

// Clean implements jobs.Cleaner: the filter goes, the bitmap is handed over.
func (j *job) Clean(h *jobs.Handle) {
	if !j.ok {
		j.settle(h)
	}
	if hold, err := j.g.HoldNodes(context.Background(), j.Source); err == nil {
		defer hold.Release()
	}
	for _, f := range j.block {
		f()
	}
	j.block = nil
	undrain, err := j.g.Drain(context.Background(), j.Source)
	if err == nil {
		defer undrain()
	} else {
		j.lost = true
	}
	j.listed.Remove()
	j.endBitmap()
	_ = j.driver.Stop(context.Background()) // who stays at the filter does so without the job
	chain.TakeOut(j.ID, j.filter, nil, j.leave)
	h.Quiesced(1, j.Source)
}

// settle puts what a job that has failed has copied so far on stable storage, if its bitmap is to forget that. Guests go on meanwhile, and do not copy any
// more.
func (j *job) settle(h *jobs.Handle) {
	if !j.frozen || j.BitmapMode != types.BitmapSyncModeAlways || j.lost {
		return
	}
	err := j.driver.Stop(context.Background())
	if err == nil && !j.driver.Copied().Empty() {
		// Without a unit of work: nobody waits for a gate here.
		err = j.filter.Child("target").Flush(&blk.Req{Ctx: context.Background(), Job: true})
	}
	if err != nil {
		j.lost = true
		slog.Warn("a backup that failed cannot flush its target; its bitmap keeps everything", "job", h.Job().ID(), "err", err)
	}
}

// leave lets tx give back what the job relies on, the target as well: the filter copies nothing any more.
func (j *job) leave(tx *graph.Tx) error {
	if err := errors.Join(tx.DetachRoot(j.root), tx.DetachRoot(j.hold)); err != nil {
		return err
	}
	if e := j.filter.Child("target"); e != nil {
		return tx.Detach(e)
	}
	return nil
}

// endBitmap lets the bitmap record what the next backup needs: what was written since this one, and, where this one does not count,
// what was recorded before. It forgets only what is on stable storage in the target. The source is quiet.
func (j *job) endBitmap() {
	if !j.frozen {
		return
	}
	j.frozen = false
	bits, counts := j.Bitmap.Bits(), j.ok || j.BitmapMode == types.BitmapSyncModeAlways
	switch {
	case j.BitmapMode == types.BitmapSyncModeNever || !counts:
		j.Bitmap.Reclaim()
		return
	case j.lost:
		j.Bitmap.Reclaim()
		bits.Merge(j.driver.Copied())
	default:
		j.Bitmap.Abdicate()
	}
	bits.Merge(j.driver.Pending()) // nothing, if it has succeeded
}
