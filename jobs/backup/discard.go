package backup

import (
	"context"
	"log/slog"
	"sync/atomic"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// giveUpAfter is how many bytes are copied before the source gives them up; as often the target is
// flushed for it.
var giveUpAfter int64 = 64 << 20

// surplus is what the source of a job with discard-source holds though the target has it.
type surplus struct {
	stored *bitmap.Bitmap // copied and not given up yet; nil: the source gives up nothing
	bytes  atomic.Int64   // of that, about
	giving atomic.Bool    // a worker gives up
	kept   atomic.Bool    // the target cannot be flushed: the source keeps what it has
}

// canGiveUp notes that [off, off+n) is copied, and gives up what was noted if it is enough.
func (j *job) canGiveUp(r *blk.Req, off, n int64) {
	j.stored.Set(off, n)
	if j.bytes.Add(n) >= giveUpAfter && j.giving.CompareAndSwap(false, true) {
		defer j.giving.Store(false)
		j.giveUp(r)
	}
}

// giveUpRest gives up what was noted since the last time. The workers have ended.
func (j *job) giveUpRest(ctx context.Context) error {
	if j.stored == nil {
		return nil
	}
	r, err := j.root.Begin(ctx)
	if err != nil {
		return err
	}
	defer j.root.End(r)
	j.giveUp(r)
	return nil
}

// giveUp lets the source discard what the target has on stable storage. That it cannot harms no
// copy: the source then keeps what it has.
func (j *job) giveUp(r *blk.Req) {
	if j.kept.Load() {
		return
	}
	j.bytes.Store(0)
	bits := j.stored.Take()
	err := j.site.Filter.Child("target").Flush(r)
	if err != nil {
		j.kept.Store(true)
	}
	source := j.site.Filter.FilteredChild()
	for off, size := int64(0), j.source.Size(); err == nil; {
		at, n, ok := bits.NextDirty(off, size)
		if !ok {
			return
		}
		off = at + n
		err = source.Discard(r, at, n)
	}
	slog.Warn("the source of a backup keeps what was copied", "job", j.site.Job.ID(), "error", err)
}
