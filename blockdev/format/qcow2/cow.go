package qcow2

import (
	"errors"
	"syscall"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// bigZeroes is from how many bytes on zeroes around a write are made by Zero, if the file can do
// that faster than by writing.
const bigZeroes = 64 << 10

// smallCopy is how much around a write is copied without asking whether there is memory for it.
const smallCopy = 64 << 10

// writeAround writes w at off to the clusters of p, together with the old content of what w leaves
// out of what is to be written. It runs without mu.
func (s *requests) writeAround(r *blk.Req, p *plan, w blk.Vec, off int64) error {
	a := p.alloc
	end := off + p.n
	head, tail := off-p.from, p.to-end
	start := p.host - head
	if head == 0 && tail == 0 {
		s.step(r, blk.EvWriteAio)
		return s.writeData(r, w, p.host, off)
	}
	if n := head + tail; n > smallCopy {
		if err := s.copying.Take(r, n); err != nil {
			return err
		}
		defer s.copying.Give(n)
	}
	buf := blk.GetBuf(int(head+tail), 0)
	defer blk.PutBuf(buf)
	s.step(r, blk.EvCowRead)
	hb, tb := buf.B[:head], buf.B[head:]
	if err := s.readOld(r, p.head, a.first, p.from-a.first<<s.cb, hb); err != nil {
		return err
	}
	last := a.first + a.n - 1
	if err := s.readOld(r, p.tail, last, end-last<<s.cb, tb); err != nil {
		return err
	}
	s.step(r, blk.EvCowWrite)
	s.step(r, blk.EvWriteAio)
	if blk.IsZero(buf.B) {
		if a.fresh {
			return s.writeData(r, w, p.host, off)
		}
		if head+tail >= bigZeroes && s.seal == nil {
			err := s.data().Zero(r, start, p.to-p.from, blk.NoFallback)
			if err == nil {
				return s.writeData(r, w, p.host, off)
			}
			if !unsupported(err) {
				return err
			}
		}
	}
	bufs := make([][]byte, 0, 4)
	if head > 0 {
		bufs = append(bufs, hb)
	}
	bufs = w.AppendTo(bufs)
	if tail > 0 {
		bufs = append(bufs, tb)
	}
	return s.writeData(r, blk.Bufs(bufs), start, p.from)
}

// unsupported tells whether err says that a file cannot do that.
func unsupported(err error) bool {
	return errors.Is(err, blk.ErrNotSupported) || errors.Is(err, syscall.ENOTSUP)
}

// readOld fills b with the old content of guest cluster gc from its byte in on; beyond the end of
// the disk that is zeroes.
func (s *requests) readOld(r *blk.Req, c cell, gc, in int64, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	off := gc<<s.cb + in
	if n := s.size.Load() - off; n < int64(len(b)) {
		n = max(n, 0)
		clear(b[n:])
		if b = b[:n]; n == 0 {
			return nil
		}
	}
	if s.geo.Extended {
		return s.readOldSubs(r, c, gc, in, b)
	}
	return s.readOldRun(r, s.geo.KindOf(c.word), c.word, off, in, b)
}

// readOldRun fills b with what lies at off of the disk, of one kind, which is at in of the cluster
// with L2 entry e.
func (s *requests) readOldRun(r *blk.Req, kind layout.Kind, e uint64, off, in int64, b []byte) error {
	switch kind {
	case layout.Normal:
		return s.readData(r, blk.Buf(b), int64(e&layout.OffsetMask)+in, off)
	case layout.CompressedKind:
		return s.readCompressed(r, blk.Buf(b), e, in)
	case layout.Unallocated:
		return s.readBacking(r, blk.Buf(b), off)
	}
	clear(b)
	return nil
}
