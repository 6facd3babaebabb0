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
	s := &e.node.Load().io
	if err := e.writable(s, off, size, f); err != nil || size == 0 {
		return err
	}
	if f&blk.MayUnmap != 0 && !s.n.opts.Load().Discard {
		f &^= blk.MayUnmap
	}
	if f&blk.NoFallback != 0 && (s.drv.zeroer == nil || s.drv.caps.ZeroFlags&blk.NoFallback == 0 ||
		!blk.IsAligned(off, size, s.drv.align) || s.drv.zeroRagged(off, size)) {
		return blk.ErrNotSupported
	}
	if r.NoWait && s.drv.zeroSteps(off, size, f) {
		return blk.ErrWouldBlock
	}
	w, err := s.beginWrite(e, r, off, size, f)
	if err != nil {
		return err
	}
	// driverZero flushes itself, as drivers may know FUA for zeroes and not for data or the other
	// way round.
	w.flush = false
	if w.padded {
		err = s.zeroPadded(r, off, size, f)
	} else {
		err = s.driverZero(r, off, size, f)
	}
	return s.endWrite(r, &w, off, size, f, err)
}

// zeroPadded zeroes blocks that are covered in part by reading and writing them.
func (s *IO) zeroPadded(r *blk.Req, off, size int64, f blk.Flags) error {
	a := s.drv.align
	p := blk.Pad(off, size, a)
	wf := f &^ (blk.MayUnmap | blk.FUA)
	head := min((a-p.Head)&(a-1), size)
	if p.N == a {
		head = size
	}
	if head > 0 {
		if err := s.modify(r, blk.Vec{}, off, head, wf); err != nil {
			return err
		}
	}
	off, size = off+head, size-head
	if mid := blk.AlignDown(size, a); mid > 0 {
		if err := s.driverZero(r, off, mid, f&^blk.FUA); err != nil {
			return err
		}
		off, size = off+mid, size-mid
	}
	if size > 0 {
		if err := s.modify(r, blk.Vec{}, off, size, wf); err != nil {
			return err
		}
	}
	if f&blk.FUA != 0 {
		return s.flushWritten(r)
	}
	return nil
}

// driverZero zeroes whole blocks: natively where the driver can, else by writing, unless
// NoFallback. The bulk is aligned as the driver prefers it.
func (s *IO) driverZero(r *blk.Req, off, size int64, f blk.Flags) error {
	s.statusData.dropRange(off, size)
	if s.drv.debug != nil {
		s.drv.debug.DebugEvent(r, blk.EvPwritevZero)
		defer s.drv.debug.DebugEvent(r, blk.EvPwritevDone)
	}
	flush := false
	for size > 0 {
		k := s.drv.zeroes.next(off, size)
		err := error(blk.ErrNotSupported)
		if s.drv.zeroer != nil {
			err = s.drv.Zero(r, off, k, f&s.drv.caps.ZeroFlags)
			if err == nil && f&blk.FUA&^s.drv.caps.ZeroFlags != 0 {
				flush = true
			}
		}
		if f&blk.NoFallback == 0 && err != nil && isNotSupported(err) {
			// Written in chunks of what one shared buffer of zeroes gives; FUA is left to one flush
			// at the end if the driver does not know it.
			k = min(k, s.drv.maxIO, max(blk.AlignDown(blk.ZeroMax, s.drv.align), s.drv.align))
			err = s.drv.writeZeroes(r, off, k, f&s.drv.caps.WriteFlags&^blk.Compressed)
			if f&blk.FUA&^s.drv.caps.WriteFlags != 0 {
				flush = true
			}
		}
		if err != nil {
			return err
		}
		if off, size = off+k, size-k; size > 0 {
			if err := r.Stopped(); err != nil {
				return err
			}
		}
	}
	if flush {
		return s.flushWritten(r)
	}
	return nil
}

// flushWritten flushes within a write: the write counts first, so that the flush is not skipped.
func (s *IO) flushWritten(r *blk.Req) error {
	s.flush.written.Add(1)
	return s.flushNode(r)
}

func isNotSupported(err error) bool {
	return errors.Is(err, blk.ErrNotSupported) || errors.Is(err, syscall.ENOTSUP)
}

// TakesDiscard tells whether Discard does anything at the node.
func (e *Edge) TakesDiscard() bool {
	n := e.node.Load()
	return n.io.drv.discard != nil && n.opts.Load().Discard
}

// Discard tells that the content of [off, off+size) is not needed any more. It is a hint: nothing
// happens if the node has not discard=unmap, if the driver cannot, or to blocks that are covered in
// part. The range is cut at the end of the node, except through roots. Errors: blk.ErrOutOfRange,
// blk.ErrReadOnly, blk.ErrWouldBlock, blk.ErrNoMedium also of a node that would do nothing, those
// of the driver.
func (e *Edge) Discard(r *blk.Req, off, size int64) error {
	s := &e.node.Load().io
	if err := e.discardable(s, off, size); err != nil || size == 0 {
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
	lo, hi := blk.AlignUp(off, s.drv.align), blk.AlignDown(off+size, s.drv.align)
	if s.drv.discard == nil || !s.n.opts.Load().Discard || lo >= hi {
		if x, ok := s.n.drv.(Ejecter); ok && x.Ejected() {
			return blk.ErrNoMedium
		}
		return nil
	}
	if off, size = lo, hi-lo; r.NoWait && s.drv.discards.next(off, size) < size {
		return blk.ErrWouldBlock
	}
	return s.discardTracked(r, off, size)
}

// discardTracked discards whole blocks in parts that the driver likes.
func (s *IO) discardTracked(r *blk.Req, off, size int64) error {
	k, err := s.track.begin(r, off, size, false)
	if err != nil {
		return err
	}
	sh := s.track.shard(r)
	sh.inFlight.Add(1)
	s.statusData.dropRange(off, size)
	begin, end := off, off+size
	for size > 0 && err == nil {
		p := s.drv.discards.next(off, size)
		if err = s.drv.Discard(r, off, p); err != nil && isNotSupported(err) {
			err = nil
		}
		if off, size = off+p, size-p; size > 0 && err == nil {
			err = r.Stopped()
		}
	}
	if err == nil || !errors.Is(err, blk.ErrWouldBlock) {
		s.flush.written.Add(1)
		s.n.bitmaps.written(r, begin, end-begin)
		if t := s.threshold.Load(); t != 0 && uint64(end) > t {
			s.thresholdExceeded(uint64(end))
		}
	}
	s.track.end(k)
	sh.inFlight.Add(-1)
	return err
}
