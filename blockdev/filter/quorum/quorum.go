// Package quorum is the driver quorum: several copies of a disk. What is written goes to all of
// them, and what is read is what enough of them agree about; so a copy may be wrong, or fail.
//
//	quorum ---"children.0"---> copy
//	       \--"children.1"---> copy
//	       \--"children.2"---> copy        vote-threshold 2: any two are enough
//
// A request is under way on all copies at once and takes as long as the slowest. Requests that
// overlap run one after the other, which QEMU does not care for: else what is written to the copies
// in different orders would differ for good, and who reads meanwhile would find, and perhaps mend,
// differences that are none.
//
// The copies are read piece by piece, the first one into the memory of who asked. Which of them
// have been equal so far is known at any time (vote.go), so that a large request needs no memory of
// its size, and one about which all agree is copied nowhere.
package quorum

import (
	"slices"
	"sync/atomic"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

type quorum struct {
	node      *graph.Node
	threshold int
	fifo      bool // one copy is read: the first that can be
	verify    bool // a difference is the end
	rewrite   bool // copies that differ are written to

	differ atomic.Bool // the end that verify means
	memory blk.Budget  // of the copies that are read to be compared
	crew   crew

	// next is the number of the next copy that is added. It changes while the node is held.
	next int
}

// Caps implements graph.Driver. Zeroing that is not to fall back on writing is not promised: one
// copy might be able to do so and another not.
func (d *quorum) Caps() graph.Caps {
	return graph.Caps{WriteFlags: blk.WriteUnchanged, ZeroFlags: blk.WriteUnchanged | blk.MayUnmap, Ordered: true}
}

// Size implements graph.Driver: what so many copies have that they can decide. All had one size
// when they were opened, but one may have failed to grow.
func (d *quorum) Size() int64 {
	kids := d.node.Children()
	if len(kids) == 0 {
		return 0 // it waits to be closed
	}
	size, same := kids[0].Size(), true
	for _, e := range kids[1:] {
		same = same && e.Size() == size
	}
	if same {
		return size
	}
	l := make([]int64, len(kids))
	for i, e := range kids {
		l[i] = e.Size()
	}
	slices.Sort(l)
	return l[max(len(l)-d.threshold, 0)]
}

// Close implements graph.Driver.
func (d *quorum) Close() error {
	d.crew.dismiss()
	return nil
}

// EdgeClaim implements graph.Permer. Nobody else may write to a copy or resize it: it would differ
// from the others.
func (d *quorum) EdgeClaim(_ string, _ perm.Role, up perm.Claim, _ bool) perm.Claim {
	c := perm.Claim{Need: up.Need, Share: up.Share & (perm.ConsistentRead | perm.WriteUnchanged)}
	if d.rewrite {
		c.Need |= perm.Write
	}
	return c
}

// WriteAt implements graph.Writer.
func (d *quorum) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	q := d.begin(r, opWrite, off, v.Len(), f)
	defer q.end()
	q.v = v
	return q.change()
}

// Zero implements graph.Zeroer.
func (d *quorum) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	q := d.begin(r, opZero, off, n, f)
	defer q.end()
	return q.change()
}

// change does something on all copies, and succeeds where it does on enough of them. It cannot be
// taken back on one if another has to wait.
func (q *request) change() error {
	if q.r.NoWait && len(q.shares) > 1 {
		return blk.ErrWouldBlock
	}
	if err := q.gather(); err != nil {
		return err
	}
	q.reportFailed(types.QuorumOpTypeWrite)
	return q.enough()
}

// Flush implements graph.Flusher.
func (d *quorum) Flush(r *blk.Req) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	q := d.begin(r, opFlush, 0, 0, 0)
	defer q.end()
	if err := q.gather(); err != nil {
		return err
	}
	q.reportFailed(types.QuorumOpTypeFlush)
	if q.succeeded() < d.threshold {
		return q.commonError()
	}
	return nil
}

// Status implements graph.BlockStatuser: zeroes are what all copies call so.
func (d *quorum) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	zero, data := n, int64(0)
	kids := d.node.Children()
	for i := range kids {
		e := kids[len(kids)-1-i]
		x, err := e.StatusAbove(r, nil, false, off, n)
		switch {
		case err == nil && x.N == 0: // it is shorter
		case err == nil && x.Zero:
			zero = min(zero, x.N)
		case err == nil:
			data = max(data, x.N)
		case r.NoWait:
			return x, blk.ErrWouldBlock
		default:
			d.reportBad(types.QuorumOpTypeRead, e, off, n, err)
			return blk.Extent{N: n, Data: true}, nil
		}
	}
	if data > 0 {
		return blk.Extent{N: data, Data: true}, nil
	}
	return blk.Extent{N: zero, Zero: true}, nil
}

// sectors are those that a range touches.
func sectors(off, n int64) (first, count int64) {
	first = off / blk.SectorSize
	return first, blk.AlignUp(off+n, blk.SectorSize)/blk.SectorSize - first
}

// reportBad tells that a copy failed at something, or, err being nil, that it differs.
func (d *quorum) reportBad(what types.QuorumOpType, e *graph.Edge, off, n int64, err error) {
	x := &types.QuorumReportBadEvent{Type: what, NodeName: e.Node().Name()}
	x.SectorNum, x.SectorsCount = sectors(off, n)
	if err != nil {
		x.Error = new(blk.ErrnoText(err))
	}
	d.node.Graph().Sink().Emit(x)
}

// fail tells that a request has failed, and is its error.
func (q *request) fail(err error) error {
	x := &types.QuorumFailureEvent{Reference: q.d.node.Name()}
	x.SectorNum, x.SectorsCount = sectors(q.off, q.n)
	q.d.node.Graph().Sink().Emit(x)
	return err
}

// enough is the error of a request that has succeeded on too few copies.
func (q *request) enough() error {
	if q.succeeded() >= q.d.threshold {
		return nil
	}
	return q.fail(q.commonError())
}

// commonError is the error that most copies have that failed; of two, that of the later copy.
func (q *request) commonError() (err error) {
	most := 0
	for i := len(q.shares) - 1; i >= 0; i-- {
		s := &q.shares[i]
		if s.err == nil || slices.ContainsFunc(q.shares[:i], func(x share) bool { return sameError(x.err, s.err) }) {
			continue // the first copy with that error speaks for all
		}
		n := 0
		for j := i; j < len(q.shares); j++ {
			if sameError(q.shares[j].err, s.err) {
				n++
			}
		}
		if n > most {
			most, err = n, s.err
		}
	}
	if err == nil {
		return syscall.EIO // there are fewer copies than have to agree
	}
	return err
}

func sameError(a, b error) bool { return blk.Errno(a) == blk.Errno(b) }
