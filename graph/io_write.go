package graph

import (
	"errors"

	"qblockd/graph/blk"
)

// WriteAt writes v at off. Flags: FUA, Compressed, WriteUnchanged, Serialising, Grow. Errors:
// blk.ErrOutOfRange, blk.ErrReadOnly, blk.ErrWouldBlock, blk.ErrNotSupported (compressed), those of
// the driver; then any part may have been written.
func (e *Edge) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	s := &e.node.Load().io
	size := v.Len()
	if err := e.writable(s, off, size, f); err != nil || size == 0 {
		return err
	}
	if f&blk.Compressed != 0 && s.drv.caps.WriteFlags&blk.Compressed == 0 {
		return blk.ErrNotSupported
	}
	if r.NoWait && (size > s.drv.maxIO || size > bounceMax && !v.Aligned(s.drv.memAlign, s.drv.align)) {
		return blk.ErrWouldBlock
	}
	w, err := s.beginWrite(e, r, off, size, f)
	if err != nil {
		return err
	}
	if w.padded {
		err = s.writePadded(r, v, off, size, f)
	} else {
		err = s.writeAligned(r, v, off, size, f)
	}
	return s.endWrite(r, &w, off, size, f, err)
}

// writing is a write, zero, discard or copy that has begun: what endWrite needs to know.
type writing struct {
	k      *tracked
	sh     *trackShard
	size   int64 // of the node at the beginning
	padded bool  // not whole blocks
	flush  bool  // FUA has to be emulated
}

// beginWrite registers the request and makes the checks that need it registered. After success
// endWrite must follow.
func (s *IO) beginWrite(e *Edge, r *blk.Req, off, size int64, f blk.Flags) (writing, error) {
	w := writing{padded: (off|size)&(s.drv.align-1) != 0, flush: f&blk.FUA != 0 && s.drv.caps.WriteFlags&blk.FUA == 0}
	if r.NoWait && (w.padded || w.flush) {
		return w, blk.ErrWouldBlock
	}
	lo, ln, serial := off, size, false
	if w.padded || f&blk.Serialising != 0 || s.drv.caps.Ordered {
		a := s.drv.align
		if f&blk.Serialising != 0 {
			a = max(a, s.drv.caps.Limits.ClusterSize)
		}
		p := blk.Pad(off, size, a)
		lo, ln, serial = p.Off, p.N, true
	}
	k, err := s.track.begin(r, lo, ln, serial)
	if err != nil {
		return w, err
	}
	// Only now the size holds still: a resize that takes the range away would have been waited for.
	w.size = s.drv.Size()
	if off+size > w.size && !e.mayGrow(f) {
		s.track.end(k)
		return w, blk.ErrOutOfRange
	}
	w.k, w.sh = k, s.track.shard(r)
	w.sh.inFlight.Add(1)
	return w, nil
}

// endWrite keeps the books of a write that ended with err, flushes if FUA has to be
// emulated, and ends the request. Requests that would have blocked leave no trace.
func (s *IO) endWrite(r *blk.Req, w *writing, off, size int64, f blk.Flags, err error) error {
	if err == nil || !errors.Is(err, blk.ErrWouldBlock) {
		s.flush.written.Add(1)
		// A copy of what lies below is none of the writes that clients ask about, as in
		// QEMU; what it makes of the node's file is.
		end := off + size
		if f&blk.WriteUnchanged != 0 && s.drv.caps.Backing {
			end = 0
		} else if g := s.n.bitmaps.recording.Load(); g != nil && (end > w.size || !g.Has(off, size)) {
			if end > w.size {
				s.n.bitmaps.resize()
			}
			g.Set(off, size, r.Unrecorded)
		}
		for h := s.wrHighest.Load(); end > h && !s.wrHighest.CompareAndSwap(h, end); {
			h = s.wrHighest.Load()
		}
		if t := s.threshold.Load(); t != 0 && uint64(end) > t {
			s.thresholdExceeded(uint64(end))
		}
	}
	if err == nil && w.flush {
		err = s.flushNode(r)
	}
	// Whole blocks are written: what ends within the last, incomplete one of a node may make it
	// complete.
	grown := blk.AlignUp(off+size, s.drv.align) > w.size && s.drv.Size() != w.size
	s.track.end(w.k)
	w.sh.inFlight.Add(-1)
	if grown {
		s.n.Resized()
	}
	return err
}

// writeAligned writes whole blocks, as zeroes where they are and that was asked for.
func (s *IO) writeAligned(r *blk.Req, v blk.Vec, off, size int64, f blk.Flags) error {
	if s.drv.zeroer != nil {
		if detect, unmap := s.detectZeroes(); detect && v.IsZero() {
			zf := f &^ blk.Compressed
			if unmap {
				zf |= blk.MayUnmap
			}
			if r.NoWait && s.drv.zeroSteps(off, size, zf) {
				return blk.ErrWouldBlock
			}
			return s.driverZero(r, off, size, zf)
		}
	}
	return s.drv.write(r, v, off, size, f)
}

// writePadded writes what does not cover whole blocks by reading the blocks at its ends
// first. The range, widened to blocks, is registered as serialising.
func (s *IO) writePadded(r *blk.Req, v blk.Vec, off, size int64, f blk.Flags) error {
	a := s.drv.align
	p := blk.Pad(off, size, a)
	if p.N <= max(bounceAll, a) {
		return s.modify(r, v, off, size, f)
	}
	head := (a - p.Head) & (a - 1)
	tail := (a - p.Tail) & (a - 1)
	if head > 0 {
		if err := s.modify(r, v.Slice(0, head), off, head, f); err != nil {
			return err
		}
	}
	mid := size - head - tail
	if err := s.writeAligned(r, v.Slice(head, mid), off+head, mid, f); err != nil {
		return err
	}
	if tail > 0 {
		return s.modify(r, v.Slice(head+mid, tail), off+head+mid, tail, f)
	}
	return nil
}

// modifySteps announces what happens with the first and the last block of a write where both are
// read at once.
func (s *IO) modifySteps(r *blk.Req, p blk.Padding, head, tail blk.DebugEvent) {
	if p.Head > 0 {
		s.drv.step(r, head)
	}
	if p.Tail > 0 {
		s.drv.step(r, tail)
	}
}

// modify reads the blocks around [off, off+size), puts v (all zeroes if it is empty) into them and
// writes them.
func (s *IO) modify(r *blk.Req, v blk.Vec, off, size int64, f blk.Flags) error {
	a := s.drv.align
	p := blk.Pad(off, size, a)
	buf := blk.GetBuf(int(p.N), s.drv.memAlign)
	defer blk.PutBuf(buf)
	b := buf.B
	switch {
	case p.N <= 2*a && p.Head > 0 && p.Tail > 0, p.N == a:
		s.modifySteps(r, p, blk.EvPwritevRmwHead, blk.EvPwritevRmwTail)
		if err := s.drv.readBlock(r, b, p.Off); err != nil {
			return err
		}
		s.modifySteps(r, p, blk.EvPwritevRmwAfterHead, blk.EvPwritevRmwAfterTail)
	default:
		if p.Head > 0 {
			s.drv.step(r, blk.EvPwritevRmwHead)
			if err := s.drv.readBlock(r, b[:a], p.Off); err != nil {
				return err
			}
			s.drv.step(r, blk.EvPwritevRmwAfterHead)
		}
		if p.Tail > 0 {
			s.drv.step(r, blk.EvPwritevRmwTail)
			if err := s.drv.readBlock(r, b[p.N-a:], p.Off+p.N-a); err != nil {
				return err
			}
			s.drv.step(r, blk.EvPwritevRmwAfterTail)
		}
	}
	if mid := b[p.Head : p.Head+size]; v.Len() == 0 {
		clear(mid)
	} else {
		v.CopyOut(mid)
	}
	return s.writeAligned(r, blk.Buf(b), p.Off, p.N, f)
}
