package graph

import (
	"qblockd/graph/blk"
)

// Map appends to m the host ranges behind a prefix of [off, off+size), possibly nothing: see
// blk.Mapping for how long they are valid. It replaces a read. Nothing is mapped through filters
// that are not transparent nor while reads of the node are tracked, as somebody needs to see them.
// Errors: blk.ErrOutOfRange (roots only; elsewhere zeroes are mapped beyond the end),
// blk.ErrWouldBlock, those of the driver.
func (e *Edge) Map(r *blk.Req, off, size int64, m *blk.Mapping) error {
	s := &e.node.Load().io
	if !blk.ValidRange(off, size) {
		return blk.ErrOutOfRange
	}
	if s.drv.Driver == nil {
		return blk.ErrClosed
	}
	in := size
	if end := s.drv.Size(); off+size > end {
		if e.root != nil {
			return blk.ErrOutOfRange
		}
		in = max(end-off, 0)
	}
	if s.track.reads.Load() != 0 || off&(s.drv.align-1) != 0 {
		return nil
	}
	if in == size {
		// A descriptor that wants whole blocks (O_DIRECT) wants them from whoever reads the
		// mapping, too.
		size = blk.AlignDown(size, s.drv.align)
		in = size
	}
	before := m.N()
	if in > 0 {
		sh := s.track.shard(r)
		sh.inFlight.Add(1)
		err := s.driverMap(r, off, in, m)
		sh.inFlight.Add(-1)
		if err != nil {
			return err
		}
	}
	switch got := m.N() - before; {
	case got > in:
		panic("graph: driver " + s.n.DriverName() + " maps more than was asked for")
	case got == in && size > in:
		m.Add(blk.HostRange{FD: -1, N: size - in})
	}
	return nil
}

func (s *IO) driverMap(r *blk.Req, off, size int64, m *blk.Mapping) error {
	if s.n.Kind() == Filter {
		if !s.drv.caps.Transparent {
			return nil
		}
		if c := s.n.FilteredChild(); s.drv.mapper == nil && c != nil {
			return c.Map(r, off, size, m)
		}
	}
	if s.drv.mapper == nil {
		return nil
	}
	return s.drv.Map(r, off, size, m)
}

// CopyFrom writes the host ranges src, one after the other, to off without passing them through
// memory. It replaces a write: flags and errors are those of WriteAt. blk.ErrNotSupported (or EXDEV
// from the driver): copy by hand; anything may have been written by then. Not supported where
// somebody needs to see the bytes: filters that are not transparent, detect-zeroes, blocks covered
// in part.
func (e *Edge) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	s := &e.node.Load().io
	size := blk.Total(src)
	if err := e.writable(s, off, size, f); err != nil || size == 0 {
		return err
	}
	detect, _ := s.detectZeroes()
	forward := s.n.Kind() == Filter && s.drv.copier == nil && s.n.FilteredChild() != nil
	if detect || f&blk.Compressed != 0 || s.n.Kind() == Filter && !s.drv.caps.Transparent ||
		s.drv.copier == nil && !forward ||
		!blk.IsAligned(off, size, s.drv.align) {
		return blk.ErrNotSupported
	}
	if r.NoWait && len(src) > 1 {
		return blk.ErrWouldBlock
	}
	w, err := s.beginWrite(e, r, off, size, f)
	if err != nil {
		return err
	}
	if forward {
		w.flush = false
		err = s.n.FilteredChild().CopyFrom(r, off, src, f)
	} else {
		err = s.driverCopy(r, off, src, f)
	}
	return s.endWrite(r, &w, off, size, f, err)
}

// driverCopy carries out runs of data by the driver's copy and runs of zeroes by zeroing.
func (s *IO) driverCopy(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	for len(src) > 0 {
		k, size := 0, int64(0)
		zero := src[0].FD < 0
		for k < len(src) && (src[k].FD < 0) == zero {
			size += src[k].N
			k++
		}
		var err error
		switch {
		case !blk.IsAligned(off, size, s.drv.align):
			err = blk.ErrNotSupported
		case zero:
			err = s.driverZero(r, off, size, f)
		default:
			err = s.drv.CopyFrom(r, off, src[:k], f&s.drv.caps.WriteFlags)
		}
		if err != nil {
			return err
		}
		src, off = src[k:], off+size
	}
	return nil
}
