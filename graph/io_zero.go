package graph

import (
	"errors"
	"syscall"

	"qblockd/graph/blk"
)

// Zero makes [off, off+size) read as zeroes. Flags: FUA, MayUnmap (ignored unless the node has
// discard=unmap), NoFallback (blk.ErrNotSupported if writing zeroes would be no faster than writing
// data, also for ranges that are not whole blocks), WriteUnchanged, Serialising, Grow. Errors as
// for WriteAt.
func (e *Edge) Zero(r *blk.Req, off, size int64, f blk.Flags) error {
	n := e.node.Load()
	s := &n.io
	if err := e.writable(n, off, size, f); err != nil || size == 0 {
		return err
	}
	if f&blk.MayUnmap != 0 && !n.opts.Load().Discard {
		f &^= blk.MayUnmap
	}
	if f&blk.NoFallback != 0 && (s.zeroer == nil || s.caps.ZeroFlags&blk.NoFallback == 0 || !blk.IsAligned(off, size, s.align) || n.zeroRagged(off, size)) {
		return blk.ErrNotSupported
	}
	if r.NoWait && n.zeroSteps(off, size, f) {
		return blk.ErrWouldBlock
	}
	w, err := n.beginWrite(e, r, off, size, f)
	if err != nil {
		return err
	}
	// driverZero flushes itself, as drivers may know FUA for zeroes and not for data or the other
	// way round.
	w.flush = false
	if w.padded {
		err = n.zeroPadded(r, off, size, f)
	} else {
		err = n.driverZero(r, off, size, f)
	}
	return n.endWrite(r, &w, off, size, f, err)
}

// zeroSteps tells whether zeroing needs more than a single call of the driver.
func (n *Node) zeroSteps(off, size int64, f blk.Flags) bool {
	s := &n.io
	return s.zeroer == nil || f&blk.FUA&^s.caps.ZeroFlags != 0 ||
		blk.Piece(off, size, s.zeroAlign(), s.caps.Limits.MaxZero) < size
}

// zeroRagged tells whether zeroing takes several calls of the driver of which the outer ones cover
// blocks in part, so that it could fail half-way for lack of support.
func (n *Node) zeroRagged(off, size int64) bool {
	a, end := n.io.zeroAlign(), off+size
	return blk.Piece(off, size, a, n.io.caps.Limits.MaxZero) < size && (off&(a-1) != 0 || end&(a-1) != 0 && end != n.Size())
}

func (s *ioState) zeroAlign() int64 { return max(s.caps.Limits.ZeroAlign, s.align) }

// zeroPadded zeroes blocks that are covered in part by reading and writing them.
func (n *Node) zeroPadded(r *blk.Req, off, size int64, f blk.Flags) error {
	a := n.io.align
	p := blk.Pad(off, size, a)
	wf := f &^ (blk.MayUnmap | blk.FUA)
	head := min((a-p.Head)&(a-1), size)
	if p.N == a {
		head = size
	}
	if head > 0 {
		if err := n.modify(r, blk.Vec{}, off, head, wf); err != nil {
			return err
		}
	}
	off, size = off+head, size-head
	if mid := blk.AlignDown(size, a); mid > 0 {
		if err := n.driverZero(r, off, mid, f&^blk.FUA); err != nil {
			return err
		}
		off, size = off+mid, size-mid
	}
	if size > 0 {
		if err := n.modify(r, blk.Vec{}, off, size, wf); err != nil {
			return err
		}
	}
	if f&blk.FUA != 0 {
		return n.flushWritten(r)
	}
	return nil
}

// driverZero zeroes whole blocks: natively where the driver can, else by writing, unless
// NoFallback. The bulk is aligned as the driver prefers it.
func (n *Node) driverZero(r *blk.Req, off, size int64, f blk.Flags) error {
	s := &n.io
	align := s.zeroAlign()
	most := s.caps.Limits.MaxZero
	if most > 0 {
		most = max(blk.AlignDown(most, s.align), s.align)
	}
	s.statusData.dropRange(off, size)
	if s.debug != nil {
		s.debug.DebugEvent(r, blk.EvPwritevZero)
		defer s.debug.DebugEvent(r, blk.EvPwritevDone)
	}
	flush := false
	for size > 0 {
		k := blk.Piece(off, size, align, most)
		err := error(blk.ErrNotSupported)
		if s.zeroer != nil {
			err = s.zeroer.Zero(r, off, k, f&s.caps.ZeroFlags)
			if err == nil && f&blk.FUA&^s.caps.ZeroFlags != 0 {
				flush = true
			}
		}
		if f&blk.NoFallback == 0 && err != nil && isNotSupported(err) {
			// Written in chunks of what one shared buffer of zeroes gives; FUA is left to one flush
			// at the end if the driver does not know it.
			k = min(k, s.maxIO, max(blk.AlignDown(blk.ZeroMax, s.align), s.align))
			err = n.writeZeroes(r, off, k, f&s.caps.WriteFlags&^blk.Compressed)
			if f&blk.FUA&^s.caps.WriteFlags != 0 {
				flush = true
			}
		}
		if err != nil {
			return err
		}
		if off, size = off+k, size-k; size > 0 {
			if err := stopped(r); err != nil {
				return err
			}
		}
	}
	if flush {
		return n.flushWritten(r)
	}
	return nil
}

// writeZeroes writes k zero bytes, at most maxIO.
func (n *Node) writeZeroes(r *blk.Req, off, k int64, f blk.Flags) error {
	if k <= blk.ZeroMax && n.io.memAlign <= 4096 {
		return n.io.writer.WriteAt(r, blk.Buf(blk.Zeroes(int(k))), off, f)
	}
	b := blk.GetBuf(int(k), n.io.memAlign)
	defer blk.PutBuf(b)
	clear(b.B)
	return n.io.writer.WriteAt(r, blk.Buf(b.B), off, f)
}

// flushWritten flushes within a write: the write counts first, so that the flush is not skipped.
func (n *Node) flushWritten(r *blk.Req) error {
	n.io.flush.written.Add(1)
	return n.flushNode(r)
}

func isNotSupported(err error) bool {
	return errors.Is(err, blk.ErrNotSupported) || errors.Is(err, syscall.ENOTSUP)
}

// TakesDiscard tells whether Discard does anything at the node.
func (e *Edge) TakesDiscard() bool {
	n := e.node.Load()
	return n.io.discard != nil && n.opts.Load().Discard
}

// Discard tells that the content of [off, off+size) is not needed any more. It is a hint: nothing
// happens if the node has not discard=unmap, if the driver cannot, or to blocks that are covered in
// part. The range is cut at the end of the node, except through roots. Errors: blk.ErrOutOfRange,
// blk.ErrReadOnly, blk.ErrWouldBlock, blk.ErrNoMedium also of a node that would do nothing, those
// of the driver.
func (e *Edge) Discard(r *blk.Req, off, size int64) error {
	n := e.node.Load()
	s := &n.io
	if err := e.discardable(n, off, size); err != nil || size == 0 {
		return err
	}
	if end := s.drv.Size(); off+size > end {
		if e.root != nil {
			return blk.ErrOutOfRange
		}
		if size = end - off; size <= 0 {
			return nil
		}
	}
	lo, hi := blk.AlignUp(off, s.align), blk.AlignDown(off+size, s.align)
	if s.discard == nil || !n.opts.Load().Discard || lo >= hi {
		if x, ok := n.drv.(Ejecter); ok && x.Ejected() {
			return blk.ErrNoMedium
		}
		return nil
	}
	off, size = lo, hi-lo
	align := max(s.caps.Limits.DiscardAlign, s.align)
	most := s.caps.Limits.MaxDiscard
	if most > 0 {
		most = max(blk.AlignDown(most, s.align), s.align)
	}
	if r.NoWait && blk.Piece(off, size, align, most) < size {
		return blk.ErrWouldBlock
	}
	return n.discardTracked(e, r, off, size, align, most)
}

// discardTracked discards whole blocks in parts that the driver likes.
func (n *Node) discardTracked(e *Edge, r *blk.Req, off, size, align, most int64) error {
	s := &n.io
	k, err := s.track.begin(r, off, size, false)
	if err != nil {
		return err
	}
	sh := s.track.shard(r)
	sh.inFlight.Add(1)
	s.statusData.dropRange(off, size)
	begin, end := off, off+size
	for size > 0 && err == nil {
		p := blk.Piece(off, size, align, most)
		if err = s.discard.Discard(r, off, p); err != nil && isNotSupported(err) {
			err = nil
		}
		if off, size = off+p, size-p; size > 0 && err == nil {
			err = stopped(r)
		}
	}
	if err == nil || !errors.Is(err, blk.ErrWouldBlock) {
		s.flush.written.Add(1)
		s.dirty.written(r, begin, end-begin)
		if t := s.threshold.Load(); t != 0 && uint64(end) > t {
			n.thresholdExceeded(uint64(end))
		}
	}
	s.track.end(k)
	sh.inFlight.Add(-1)
	return err
}
