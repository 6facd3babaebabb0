package quorum

import (
	"bytes"
	"log/slog"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

const (
	// pieceMax is how much of each copy is read at once, in bytes, and piecesMax how much of all
	// copies together, as long as that leaves a copy pieceMin.
	pieceMax  = 1 << 20
	piecesMax = 8 << 20
	pieceMin  = 4 << 10
	// memoryMax is what the requests on a quorum have in memory together.
	memoryMax = 32 << 20
)

// ReadAt implements graph.Driver.
func (d *quorum) ReadAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) error {
	if d.differ.Load() {
		return syscall.EIO
	}
	q := d.begin(r, opRead, off, v.Len(), 0)
	defer q.end()
	q.v = v
	if d.fifo {
		return q.readFirst()
	}
	return q.readAll()
}

// readFirst reads the first copy that can be read. What cannot be read at once is done again: so
// each failure is told once.
func (q *request) readFirst() error {
	for i := range q.shares {
		s := &q.shares[i]
		s.off, s.n, s.v = q.off, q.n, q.v
		if s.err = s.do(); s.err == nil {
			return nil
		}
		if q.r.NoWait {
			return blk.ErrWouldBlock
		}
		if err := stopped(q.r); err != nil {
			return err
		}
		q.d.reportBad(types.QuorumOpTypeRead, s.e, q.off, q.n, s.err)
	}
	if len(q.shares) == 0 {
		return blk.ErrClosed
	}
	return q.shares[len(q.shares)-1].err
}

// readAll reads all copies and lets them vote about the whole request. Where the first one is to
// be had it is read into q.v.
func (q *request) readAll() error {
	others := int64(max(len(q.shares)-1, 1))
	piece := min(q.n, pieceMax, max(blk.AlignDown(piecesMax/others, blk.SectorSize), pieceMin))
	if q.r.NoWait && piece < q.n {
		return blk.ErrWouldBlock
	}
	if err := q.d.memory.Take(q.r, piece*others); err != nil {
		return err
	}
	defer q.d.memory.Give(piece * others)
	first, err := q.readPieces(piece)
	if err != nil {
		return err
	}
	odd := first < 0 || !q.unanimous(first)
	if q.r.NoWait && (odd || q.succeeded() < len(q.shares)) {
		return blk.ErrWouldBlock
	}
	q.reportFailed(types.QuorumOpTypeRead)
	if err := q.enough(); err != nil {
		return err
	}
	if !odd {
		return nil
	}
	return q.decide(first, piece)
}

// readPieces reads the copies to the end, and compares them. q.v has what copy first has; it is
// negative if all have failed.
func (q *request) readPieces(piece int64) (first int, err error) {
	for pos := int64(0); pos < q.n; {
		k := min(piece, q.n-pos)
		lead := true
		for i := range q.shares {
			s := &q.shares[i]
			if s.err != nil {
				continue
			}
			if pos == 0 {
				s.class = 0
			}
			if lead {
				first, s.v, lead = i, q.v, false
				if k < q.n {
					s.v = q.v.Slice(pos, k)
				}
				continue
			}
			if s.buf == nil {
				s.buf = blk.GetBuf(int(piece), 0)
			}
			s.v = blk.Buf(s.buf.B[:k])
		}
		if lead {
			return -1, nil
		}
		if err := q.gatherPiece(pos, k); err != nil {
			return 0, err
		}
		if q.shares[first].err != nil {
			pos = 0 // another one is read into q.v, from the beginning
			continue
		}
		q.classify(first)
		pos += k
	}
	return first, nil
}

// gatherPiece reads a part of the request.
func (q *request) gatherPiece(pos, k int64) error {
	off, n := q.off, q.n
	q.off, q.n = off+pos, k
	err := q.gather()
	q.off, q.n = off, n
	return err
}

// classify finds out which copies that were equal so far are so in the piece that was just read.
// Where first has that is in its share's v.
func (q *request) classify(first int) {
	for i := first; i < len(q.shares); i++ {
		s := &q.shares[i]
		if s.err != nil {
			continue
		}
		s.was, s.class = s.class, i
		for j := first; j < i; j++ {
			x := &q.shares[j]
			if x.err == nil && x.class == j && x.was == s.was && equal(x.v, s.v) {
				s.class = j
				break
			}
		}
	}
}

// equal compares two vectors of one length, of which the second one is one buffer.
func equal(a, b blk.Vec) bool {
	rest, _ := b.Single()
	if one, ok := a.Single(); ok {
		return bytes.Equal(one, rest)
	}
	same := true
	a.Each(func(p []byte) {
		same = same && bytes.Equal(p, rest[:len(p)])
		rest = rest[len(p):]
	})
	return same
}

// unanimous tells whether all copies that could be read have what first has.
func (q *request) unanimous(first int) bool {
	for i := range q.shares {
		if s := &q.shares[i]; s.err == nil && s.class != first {
			return false
		}
	}
	return true
}

// votes is the number of copies of a class.
func (q *request) votes(class int) (n int) {
	for i := range q.shares {
		if s := &q.shares[i]; s.err == nil && s.class == class {
			n++
		}
	}
	return n
}

// winner is the class with most votes; of two, the one whose first copy comes later.
func (q *request) winner() (class, votes int) {
	for i := len(q.shares) - 1; i >= 0; i-- {
		if n := q.votes(i); n > votes {
			class, votes = i, n
		}
	}
	return class, votes
}

// decide lets copies vote that do not agree; q.v has what copy first has.
func (q *request) decide(first int, piece int64) error {
	if q.d.verify {
		return q.wrong()
	}
	class, votes := q.winner()
	if votes < q.d.threshold {
		return q.fail(syscall.EIO)
	}
	if class != first {
		if err := q.take(class, piece); err != nil {
			return err
		}
	}
	for c := len(q.shares) - 1; c >= 0; c-- {
		for i := len(q.shares) - 1; i >= c && c != class; i-- {
			if s := &q.shares[i]; s.err == nil && s.class == c {
				q.d.reportBad(types.QuorumOpTypeRead, s.e, q.off, q.n, nil)
			}
		}
	}
	if !q.d.rewrite {
		return nil
	}
	for i := range q.shares {
		s := &q.shares[i]
		s.skip = s.err != nil || s.class == class
	}
	q.op = opWrite
	return q.gather() // that one cannot be written to is no failure of what was read
}

// take makes q.v what the copies of a class have. A request of several pieces has to be read again.
func (q *request) take(class int, piece int64) (err error) {
	for i := class; i < len(q.shares); i++ {
		s := &q.shares[i]
		if s.err != nil || s.class != class {
			continue
		}
		if q.n <= piece {
			q.v.CopyIn(s.buf.B[:q.n])
			return nil
		}
		if err = s.e.ReadAt(&s.req, q.v, q.off, 0); err == nil {
			return nil
		}
		if stop := stopped(q.r); stop != nil {
			return stop
		}
		q.d.reportBad(types.QuorumOpTypeRead, s.e, q.off, q.n, err)
	}
	return q.fail(err)
}

// wrong ends a quorum that is there to find a difference. QEMU ends its process.
func (q *request) wrong() error {
	if !q.d.differ.Swap(true) {
		slog.Error("quorum: contents differ", "node", q.d.node.Name(), "offset", q.off, "bytes", q.n)
	}
	return syscall.EIO
}
