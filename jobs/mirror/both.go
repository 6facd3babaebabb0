package mirror

import (
	"errors"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// A guest's write to both sides, in the mode write-blocking:
//
//	take the range --> source --> target --> give the range back
//	     |                |          `-- fails: dirty, the policy is asked; the write succeeds
//	     |                `------------- fails: dirty, as nobody knows what is there now
//	     waits for copies and writes to both sides that overlap and came before
//
// The source's bitmap does not record it. Granules that it covers in full are clean when it begins:
// what is dirty about them is overwritten. Others stay what they are. So from the moment when all
// writes go to both sides nothing gets dirty any more but by errors, by who writes past the filter,
// and while the target is held quiet.
//
// In the background mode writes go to both sides only while the job does not get on without.

// writeBoth writes v to both sides. The bytes are taken once: a guest may change its memory
// meanwhile.
func (j *Job) writeBoth(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	if n == 0 {
		return j.driver.Below().WriteAt(r, v, off, f)
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	b := blk.GetBuf(int(n), max(j.driver.Below().Caps().Limits.MemAlign, j.writes.Edge().Caps().Limits.MemAlign))
	defer blk.PutBuf(b)
	v.CopyOut(b.B)
	return j.toBoth(r, off, n,
		func() error { return j.driver.Below().WriteAt(r, blk.Buf(b.B), off, f) },
		func() error { return j.writes.Edge().WriteAt(r, blk.Buf(b.B), off, 0) })
}

// zeroBoth zeroes a range of both sides.
func (j *Job) zeroBoth(r *blk.Req, off, n int64, f blk.Flags) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	return j.toBoth(r, off, n,
		func() error { return j.driver.Below().Zero(r, off, n, f) },
		func() error { return j.writes.Edge().Zero(r, off, n, f&blk.MayUnmap) })
}

// discardPiece is how much of a discard goes to both sides at once, in bytes: other requests wait
// for so much of it.
const discardPiece = 16 << 20

// discardBoth discards a range of the source, and makes the target what the source shows there
// then: that depends on its driver, its clusters, and what lies below it.
func (j *Job) discardBoth(r *blk.Req, off, n int64) error {
	src := j.driver.Below()
	if !src.TakesDiscard() {
		return src.Discard(r, off, n)
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	for end := off + n; off < end; {
		n := min(blk.AlignDown(off, discardPiece)+discardPiece, end) - off
		err := j.toBoth(r, off, n,
			func() error { return src.Discard(r, off, n) },
			func() error { return j.follow(r, off, off+n) })
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

func (j *Job) toBoth(r *blk.Req, off, n int64, source, target func() error) error {
	if j.life.get().mode != types.MirrorCopyModeWriteBlocking && j.h.Paused() {
		return source() // it is the job that wants both, and it does nothing now
	}
	lo, hi := off, off+n
	if c := j.hidden; c > 0 {
		lo, hi = blk.Outer(lo, hi, c, j.source.Size())
	}
	s, err := j.ranges.take(r.Ctx, lo, hi-lo)
	if err != nil {
		return err
	}
	defer j.ranges.give(s)
	pass := j.writes.TryBegin()
	if pass == nil {
		// The target is held quiet, and this unit of work must not wait for that. The background
		// copies it.
		return source()
	}
	defer j.writes.End(pass)
	settled := false
	defer func() {
		if !settled { // nobody knows what is there now
			j.bits.Set(lo, hi-lo)
		}
	}()
	if a, b := blk.Inner(off, off+n, j.bits.Granularity(), j.source.Size()); a < b {
		j.bits.Clear(a, b-a) // granules that are covered in full
	}
	if err := j.unrecorded(r, source); err != nil {
		return err
	}
	j.both.Add(n)
	defer j.both.Add(-n)
	j.h.AddRemaining(n)
	if j.hidden > 0 {
		// The rest of the target's clusters comes along, and zeroes are such that nothing shows
		// through.
		err = j.follow(r, lo, hi)
	} else {
		err = target()
	}
	settled = true
	if err != nil {
		j.bits.Set(lo, hi-lo)
		j.bothFailed(err)
		return nil
	}
	j.h.Done(n)
	return nil
}

// unrecorded calls f, which writes to the source, without the job's bitmap taking notice.
func (j *Job) unrecorded(r *blk.Req, f func() error) error {
	r.Unrecorded = j.bits
	defer func() { r.Unrecorded = nil }()
	return f()
}

// bothFailed does what the policies say about a guest's write that did not reach the target.
func (j *Job) bothFailed(err error) {
	op, policy := types.IoOperationTypeWrite, j.policies().Write
	var c *graph.CopyError
	if errors.As(err, &c) {
		op, policy = j.side(err)
	}
	if j.h.OnError(op, policy, err) == types.BlockErrorActionReport {
		j.life.fail(err)
		j.site.Job.Kick()
	}
}

// ActivelySynced implements jobs.Syncer: the target is equal, and what guests write goes to both.
func (j *Job) ActivelySynced() bool {
	s := j.life.get()
	return s.both && (s.phase == ready || s.phase == ending) && j.bits.Count() == 0
}
