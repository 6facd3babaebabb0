package graph

import (
	"qblockd/graph/blk"
)

// bounceAll is up to which length an unaligned request is made through one bounce buffer as a
// whole, and bounceMax the largest bounce buffer, in bytes.
const (
	bounceAll = 64 << 10
	bounceMax = 1 << 20
	// copyingMax is what the copy-on-reads of a node may have in memory together.
	copyingMax = 32 << 20
)

// ReadAt fills v from off. Flags: CopyOnRead. Errors: blk.ErrOutOfRange (roots only; below other
// nodes zeroes are read beyond the end), blk.ErrWouldBlock, those of the driver. v's content is
// undefined after an error.
func (e *Edge) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := e.node.Load()
	s := &n.io
	size := v.Len()
	if !blk.ValidRange(off, size) {
		return blk.ErrOutOfRange
	}
	if s.drv == nil {
		return blk.ErrClosed
	}
	if size == 0 {
		return nil
	}
	if end := s.drv.Size(); off+size > end {
		if e.root != nil {
			return blk.ErrOutOfRange
		}
		in := max(end-off, 0)
		v.Slice(in, size-in).Zero()
		if in == 0 {
			return nil
		}
		v, size = v.Slice(0, in), in
	}
	sh := s.track.shard(r)
	sh.inFlight.Add(1)
	var err error
	switch {
	case f&blk.CopyOnRead != 0:
		err = n.readCopying(r, v, off, size)
	case s.track.reads.Load() != 0:
		var k *tracked
		if k, err = s.track.begin(r, off, size, false); err == nil {
			err = n.driverRead(r, v, off, size, f)
			s.track.end(k)
		}
	default:
		err = n.driverRead(r, v, off, size, f)
	}
	sh.inFlight.Add(-1)
	return err
}

// driverRead reads [off, off+size), which is inside the node, in one go if the driver can take it
// so.
func (n *Node) driverRead(r *blk.Req, v blk.Vec, off, size int64, f blk.Flags) error {
	s := &n.io
	if (off|size)&(s.align-1) == 0 && size <= s.maxIO && (s.memAlign == 1 || v.Aligned(s.memAlign, s.align)) {
		return s.drv.ReadAt(r, v, off, 0)
	}
	return n.readPieces(r, v, off, size)
}

// readPieces reads what the driver cannot take as it is: whole blocks into well-placed memory
// directly, the rest through bounce buffers.
func (n *Node) readPieces(r *blk.Req, v blk.Vec, off, size int64) error {
	s := &n.io
	whole := size <= bounceAll && (off|size)&(s.align-1) != 0
	for done := int64(0); done < size; {
		pos := off + done
		k := min(blk.Piece(pos, size-done, s.align, s.maxIO), size-done)
		if !whole && blk.IsAligned(pos, k, s.align) {
			if p := v.Slice(done, k); p.Aligned(s.memAlign, s.align) {
				if err := s.drv.ReadAt(r, p, pos, 0); err != nil {
					return err
				}
				done += k
				continue
			}
		}
		lo := blk.AlignDown(pos, s.align)
		most := min(max(blk.AlignDown(bounceMax, s.align), s.align), s.maxIO)
		end := pos + k
		if whole {
			end = off + size
		}
		hi := min(blk.AlignUp(end, s.align), lo+most)
		b := blk.GetBuf(int(hi-lo), s.memAlign)
		err := s.drv.ReadAt(r, blk.Buf(b.B), lo, 0)
		if err == nil {
			k = min(hi-pos, size-done)
			v.Slice(done, k).CopyIn(b.B[pos-lo:])
			done += k
		}
		blk.PutBuf(b)
		if err != nil {
			return err
		}
	}
	return nil
}

// readBlock fills b with whole blocks at lo for a read-modify-write; beyond the end there are
// zeroes.
func (n *Node) readBlock(r *blk.Req, b []byte, lo int64) error {
	if lo >= n.io.drv.Size() {
		clear(b)
		return nil
	}
	return n.driverRead(r, blk.Buf(b), lo, int64(len(b)), 0)
}
