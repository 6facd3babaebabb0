package graph

import "qblockd/graph/blk"

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
	s := &e.node.Load().io
	size := v.Len()
	if !blk.ValidRange(off, size) {
		return blk.ErrOutOfRange
	}
	if s.drv.Driver == nil {
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
		err = s.readCopying(r, v, off, size)
	case s.track.reads.Load() != 0:
		var k *tracked
		if k, err = s.track.begin(r, off, size, false); err == nil {
			err = s.drv.read(r, v, off, size)
			s.track.end(k)
		}
	default:
		err = s.drv.read(r, v, off, size)
	}
	sh.inFlight.Add(-1)
	return err
}
