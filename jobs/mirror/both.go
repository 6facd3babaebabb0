package mirror

import (
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// A guest's write to both sides, in the mode write-blocking:
//
//	take the range --> source --> target --> give the range back
//	     |                |          `-- fails: dirty, and the error policy is asked; the guest's write has succeeded
//	     |                `------------- fails: dirty, as nobody knows what is there now
//	     waits for copies and writes to both sides that overlap and came before
//
// The source's bitmap does not record it. Granules that it covers in full are clean when it begins: what is dirty about them is overwritten. Others stay
// what they are.

// writeBoth writes v to both sides. The bytes are taken once: a guest may change its memory meanwhile.
func (j *job) writeBoth(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	if n == 0 {
		return j.driver.child().WriteAt(r, v, off, f)
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	b := blk.GetBuf(int(n), max(j.driver.child().Caps().Limits.MemAlign, j.target.Edge().Caps().Limits.MemAlign))
	defer blk.PutBuf(b)
	v.CopyOut(b.B)
	return j.toBoth(r, off, n,
		func() error { return j.driver.child().WriteAt(r, blk.Buf(b.B), off, f) },
		func() error { return j.target.Edge().WriteAt(r, blk.Buf(b.B), off, 0) })
}

// zeroBoth zeroes a range of both sides.
func (j *job) zeroBoth(r *blk.Req, off, n int64, f blk.Flags) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	return j.toBoth(r, off, n,
		func() error { return j.driver.child().Zero(r, off, n, f) },
		func() error { return j.target.Edge().Zero(r, off, n, f&blk.MayUnmap) })
}

func (j *job) toBoth(r *blk.Req, off, n int64, source, target func() error) error {
	s, err := j.ranges.take(r.Ctx, off, n)
	if err != nil {
		return err
	}
	defer j.ranges.give(s)
	pass := j.target.TryBegin()
	if pass == nil {
		// The target is held quiet, and this unit of work must not wait for that. The background copies it.
		return source()
	}
	defer j.target.End(pass)
	g := j.bits.Granularity()
	lo, hi := blk.AlignUp(off, g), blk.AlignDown(off+n, g)
	if off+n == j.bits.Size() {
		hi = off + n
	}
	if j.allCluster > 0 && (lo > off || hi < off+n || !blk.IsAligned(off, n, j.allCluster)) {
		// The rest of the target's clusters has to come along.
		return source()
	}
	if lo < hi {
		j.bits.Clear(lo, hi-lo)
	}
	r.Unrecorded = j.bits
	err = source()
	r.Unrecorded = nil
	if err != nil {
		j.bits.Set(off, n)
		return err
	}
	j.both.Add(n)
	defer j.both.Add(-n)
	j.h.AddRemaining(n)
	if err := target(); err != nil {
		j.bits.Set(off, n)
		j.targetFailed(err)
		return nil
	}
	j.h.Done(n)
	return nil
}

// targetFailed does what the policy says about a guest's write that did not reach the target.
func (j *job) targetFailed(err error) {
	if j.h.OnError(types.IoOperationTypeWrite, j.OnTargetError, err) == types.BlockErrorActionReport {
		j.failure.CompareAndSwap(nil, &err)
		j.driver.job.Store(nil)
		j.mj.Kick()
	}
}
