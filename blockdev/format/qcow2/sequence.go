package qcow2

import "qblockd/graph/blk"

// sequence reads a part of the file from its beginning to its end, in large pieces.
type sequence struct {
	s   *imageFile
	r   *blk.Req
	off int64 // of what peek returns
	end int64
	buf *blk.Buffer
	b   []byte // read and not yet used
	ask int    // bytes to read next, unless more is needed: few at first, as most tables are short
}

// sequence begins at off and ends at end. close has to be called.
func (s *imageFile) sequence(r *blk.Req, off, end int64) *sequence {
	const window = 256 << 10 // more than any entry of a table takes
	return &sequence{s: s, r: r, off: off, end: end, buf: blk.GetBuf(window, 0), ask: 4 << 10}
}

func (q *sequence) close() { blk.PutBuf(q.buf) }

// peek returns the next n bytes, zeroes beyond the end of the file; they hold until the next call.
func (q *sequence) peek(n int) ([]byte, error) {
	if n > len(q.b) {
		if err := ended(q.r); err != nil {
			return nil, err
		}
		have := copy(q.buf.B, q.b)
		left := max(q.end-q.off-int64(have), 0)
		more := q.buf.B[have:]
		more = more[:max(n-have, int(min(left, int64(q.ask), int64(len(more)))))]
		q.ask *= 4
		if err := q.s.readFile(q.r, blk.Buf(more), q.off+int64(have)); err != nil {
			return nil, err
		}
		q.b = q.buf.B[:have+len(more)]
	}
	return q.b[:n], nil
}

// skip goes on behind n bytes, which peek has returned.
func (q *sequence) skip(n int) {
	q.b, q.off = q.b[n:], q.off+int64(n)
}
