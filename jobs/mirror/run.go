package mirror

import (
	"context"
	"errors"
	"time"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

// idle is how long a job that is ready waits before it looks for what was written; completing it
// does not wait.
const idle = 100 * time.Millisecond

// Run implements jobs.Runner.
func (j *Job) Run(ctx context.Context, h *jobs.Handle) error {
	j.h = h
	defer j.patience.EndsWith(ctx)()
	if err := j.fit(ctx); err != nil {
		h.Yield() // QEMU quiesces the source before it ends
		return err
	}
	if j.full && !j.none && !j.zeroesUnmap() {
		// All of it is to be copied, and clients that ask right after the start are told so.
		j.bits.SetAll()
		h.SetRemaining(j.bits.Count())
	}
	h.Yield()
	if j.source.Size() > 0 {
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
func (j *Job) fit(ctx context.Context) error {
	switch {
	case j.base == j.target:
		return blockjob.Grow(ctx, j.h, j.writes, j.source.Size(), func(err error) error {
			return j.failed(j.h, &graph.CopyError{Write: true, Err: err})
		})
	case j.misfit():
		return errors.New("Source and target image have different sizes")
	}
	return nil
}

// findDirty makes dirty what has to be copied. Writes are recorded already.
func (j *Job) findDirty(ctx context.Context, h *jobs.Handle) error {
	if j.none {
		return nil
	}
	if j.full {
		if !j.zeroesUnmap() {
			return nil
		}
		if err := j.zeroTarget(ctx, h); err != nil {
			return err
		}
	}
	last := graph.Now.Overlay(j.source, j.base) // the last one to be copied
	return blockjob.Walk(ctx, h, j.reads, j.driver.Below(), last, func(off int64, x blk.Extent) {
		if x.Allocated {
			j.bits.Set(off, x.N)
		}
	})
}

// zeroTarget zeroes all of the target.
func (j *Job) zeroTarget(ctx context.Context, h *jobs.Handle) error {
	const piece = 1 << 30
	for off, size := int64(0), j.source.Size(); off < size; {
		if err := h.Checkpoint(); err != nil {
			return err
		}
		n := min(piece, size-off)
		err := j.onTarget(ctx, func(r *blk.Req, e *graph.Edge) error {
			if k, _ := j.zeroesThere(r, e, off, size-off); k > n {
				n = k
				return nil
			}
			return e.Zero(r, off, n, j.unmap)
		})
		if err == nil {
			off += n
		} else if err = j.failed(h, err); err != nil {
			return err
		}
	}
	return nil
}

// onTarget calls f in a unit of work on the target.
func (j *Job) onTarget(ctx context.Context, f func(r *blk.Req, e *graph.Edge) error) error {
	r, err := j.writes.Begin(ctx)
	if err != nil {
		return err
	}
	defer j.writes.End(r)
	if err := f(r, j.writes.Edge()); err != nil {
		return &graph.CopyError{Write: true, Err: err}
	}
	return nil
}

// keepInStep copies what is dirty until the job is to end. What it has to reach, to be ready or to
// be over, it reaches in so many passes, however fast guests write.
func (j *Job) keepInStep(ctx context.Context, h *jobs.Handle) error {
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

// becomeReady makes the job ready when what is copied is on stable storage. What is dirty, most
// bytes at most, is copied first with the source held quiet, so that there is a time when nothing
// is. It tells whether the job is ready.
func (j *Job) becomeReady(ctx context.Context, h *jobs.Handle, dirty, most int64) (bool, error) {
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
func (j *Job) copyDirty(ctx context.Context, h *jobs.Handle) error {
	chunk := min(max(j.bufSize/maxInFlight, j.granularity), j.maxCopy())
	chunk = max(blk.AlignDown(chunk, j.granularity), j.granularity)
	j.asked = 0
	t := copy.Task{
		Gate: copy.BothGates(ctx, j.reads, j.writes), Size: j.source.Size(),
		Chunk: chunk, LongZeroes: true,
		Look: func(r *blk.Req, off, _ int64) (copy.Extent, error) { return j.look(r, off, chunk) },
		// It counts by itself, as it may have to do what is done once more.
		Copy: func(r *blk.Req, off int64, e copy.Extent) (int64, error) {
			if j.life.failure() != nil {
				return 0, nil // the job is about to end: nothing is tried again, and what is left stays dirty
			}
			return 0, j.copy(r, off, e.N)
		},
		Side: j.side, Uncounted: true, RetryIgnored: true,
	}
	t.SetWorkers(workers, j.source, j.target)
	t.Workers = int(max(min(int64(t.Workers), j.bufSize/chunk), 1))
	return copy.Run(h, t)
}

// side tells reading errors from writing errors, and what becomes of them.
func (j *Job) side(err error) (types.IoOperationType, types.BlockdevOnError) {
	op, policy := j.policies().Side(err)
	if j.life.get().phase == ending {
		policy = types.BlockdevOnErrorReport
	}
	return op, policy
}
