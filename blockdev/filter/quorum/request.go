package quorum

import (
	"context"
	"errors"
	"sync"

	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// op is what a request does on a copy.
type op uint8

const (
	opRead op = iota
	opWrite
	opZero
	opFlush
)

// request is a request that is under way on the copies. It is used again, with all that it has.
type request struct {
	d      *quorum
	r      *blk.Req
	op     op
	off, n int64
	flags  blk.Flags
	v      blk.Vec
	shares []share // one for each copy, in their order
	under  sync.WaitGroup
}

// share is the part of a request that concerns one copy.
type share struct {
	q      *request
	e      *graph.Edge
	req    blk.Req // one belongs to one goroutine: each copy has its own, inside that of the request
	off, n int64   // what of the request is done now
	v      blk.Vec // and where it is read into, or written from
	buf    *blk.Buffer
	skip   bool // it has no part in what is done now
	err    error
	// class is the first copy that has had the same as this one so far; was is that of the piece
	// before.
	class, was int
}

var requests = sync.Pool{New: func() any { return new(request) }}

// begin prepares a request on all copies. end must follow.
func (d *quorum) begin(r *blk.Req, what op, off, n int64, f blk.Flags) *request {
	q := requests.Get().(*request)
	q.d, q.r, q.op, q.off, q.n, q.flags = d, r, what, off, n, f
	kids := d.node.Children()
	if cap(q.shares) < len(kids) {
		q.shares = make([]share, len(kids))
	}
	q.shares = q.shares[:len(kids)]
	for i := range q.shares {
		q.shares[i] = share{q: q, e: kids[len(kids)-1-i], req: *r}
	}
	return q
}

func (q *request) end() {
	for i := range q.shares {
		blk.PutBuf(q.shares[i].buf)
		q.shares[i] = share{}
	}
	q.d, q.r, q.v = nil, nil, blk.Vec{}
	requests.Put(q)
}

// inlineMax is up to which length, in bytes, a copy is asked in the goroutine of the request first
// whether it can answer at once: to wake another one takes longer.
const inlineMax = 64 << 10

// gather does what is to be done on all copies that have not failed and are not skipped, and waits
// for all of them. Errors: blk.ErrWouldBlock, if the request must not wait and one would have to;
// the cause of the end of its context. Those of the copies are noted in their shares.
func (q *request) gather() error {
	var last *share // the one that is left for this goroutine
	for i := range q.shares {
		s := &q.shares[i]
		if s.err != nil || s.skip {
			continue
		}
		if s.off, s.n = q.off, q.n; q.op != opRead {
			s.v = q.v
		}
		if q.r.NoWait || q.n <= inlineMax && q.op != opFlush && len(q.shares) > 1 {
			s.req.NoWait = true
			err := s.do()
			if s.req.NoWait = q.r.NoWait; !errors.Is(err, blk.ErrWouldBlock) {
				s.err = err
				continue
			}
			if q.r.NoWait {
				return blk.ErrWouldBlock
			}
		}
		if last != nil {
			q.under.Add(1)
			q.d.crew.start(last)
		}
		last = s
	}
	if last != nil {
		last.err = last.do()
		q.under.Wait()
	}
	return stopped(q.r)
}

// stopped is the cause of the end of the context of r, or nil.
func stopped(r *blk.Req) error {
	if r.Ctx == nil || r.Ctx.Err() == nil {
		return nil
	}
	return context.Cause(r.Ctx)
}

// do does the share.
func (s *share) do() error {
	switch s.q.op {
	case opRead:
		return s.e.ReadAt(&s.req, s.v, s.off, 0)
	case opWrite:
		return s.e.WriteAt(&s.req, s.v, s.off, s.q.flags)
	case opZero:
		return s.e.Zero(&s.req, s.off, s.n, s.q.flags)
	}
	return s.e.Flush(&s.req)
}

// run is do in a goroutine of the crew.
func (s *share) run() {
	defer s.q.under.Done()
	defer panics.Into("a request on a copy of a quorum", &s.err)
	s.err = s.do()
}

// succeeded is the number of copies that have not failed.
func (q *request) succeeded() (n int) {
	for i := range q.shares {
		if q.shares[i].err == nil {
			n++
		}
	}
	return n
}

// reportFailed tells of the copies that have failed.
func (q *request) reportFailed(what types.QuorumOpType) {
	for i := range q.shares {
		if s := &q.shares[i]; s.err != nil {
			q.d.reportBad(what, s.e, q.off, q.n, s.err)
		}
	}
}
