package graph

import (
	"qblockd/graph/blk"
)

// readCopying reads [off, off+size), which is inside the node, and writes to the node what it has
// not allocated in the blocks touched, so that later reads need nothing from below. The blocks are
// registered as serialising: no write comes between the copy's read and its write.
func (s *IO) readCopying(r *blk.Req, v blk.Vec, off, size int64) error {
	p := s.copyRange(off, size)
	k, err := s.track.begin(r, p.Off, p.N, true)
	if err != nil {
		return err
	}
	defer s.track.end(k)
	return s.copyUp(r, p, func(at, k int64, content []byte) error {
		lo, hi := max(at, off), min(at+k, off+size)
		if lo >= hi {
			return nil
		}
		dst := v.Slice(lo-off, hi-lo)
		if content == nil {
			return s.drv.read(r, dst, lo, hi-lo)
		}
		dst.CopyIn(content[lo-at:])
		return nil
	})
}

// Prefetch writes to the node what it has not allocated of [off, off+size), cut at its end and
// widened to its allocation units: a copy-on-read that nobody reads. Needs the write-unchanged
// permission. Errors as for ReadAt and WriteAt.
func (e *Edge) Prefetch(r *blk.Req, off, size int64) error {
	s := &e.node.Load().io
	if err := e.writable(s, off, size, blk.WriteUnchanged); err != nil {
		return err
	}
	if size = min(size, s.drv.Size()-off); size <= 0 {
		return nil
	}
	p := s.copyRange(off, size)
	k, err := s.track.begin(r, p.Off, p.N, true)
	if err != nil {
		return err
	}
	defer s.track.end(k)
	return s.copyUp(r, p, func(int64, int64, []byte) error { return nil })
}

// copyRange widens a range to allocation units, cut at the end of the node.
func (s *IO) copyRange(off, size int64) blk.Padding {
	p := blk.Pad(off, size, max(s.drv.caps.Limits.ClusterSize, s.drv.align))
	p.N = min(p.N, blk.AlignUp(s.drv.Size(), s.drv.align)-p.Off)
	return p
}

// copyUp goes through p. Of each part it calls give with the content if it had to be copied, else
// with nil.
func (s *IO) copyUp(r *blk.Req, p blk.Padding, give func(at, k int64, content []byte) error) error {
	if r.NoWait {
		// Several calls of the driver at least; a part that is allocated as a whole could go on,
		// but then status would be asked twice.
		return blk.ErrWouldBlock
	}
	readOnly := s.n.readOnly.Load() || s.n.inactive.Load() || s.drv.writer == nil
	for at, end := p.Off, p.Off+p.N; at < end; {
		k := end - at
		allocated := readOnly
		if !readOnly {
			x, err := s.statusOf(r, at, k)
			if err != nil {
				return err
			}
			if x.N == 0 {
				x.N = k
			}
			k, allocated = blk.AlignUp(x.N, s.drv.align), x.Allocated
		}
		if allocated {
			if err := give(at, k, nil); err != nil {
				return err
			}
			at += k
			continue
		}
		k = min(k, s.drv.bounce())
		if err := s.copyChunk(r, at, k, give); err != nil {
			return err
		}
		at += k
	}
	return nil
}

// copyChunk copies whole blocks that are not allocated.
func (s *IO) copyChunk(r *blk.Req, at, k int64, give func(at, k int64, content []byte) error) error {
	if err := s.copying.Take(r, k); err != nil {
		return err
	}
	defer s.copying.Give(k)
	b := blk.GetBuf(int(k), s.drv.memAlign)
	defer blk.PutBuf(b)
	if err := s.drv.ReadAt(r, blk.Buf(b.B), at, 0); err != nil {
		return err
	}
	// Copied to memory of our own first: a client may scribble over its buffer.
	var err error
	s.drv.step(r, blk.EvCorWrite)
	if s.drv.zeroer != nil && blk.IsZero(b.B) {
		err = s.driverZero(r, at, k, blk.WriteUnchanged)
	} else {
		err = s.drv.write(r, blk.Buf(b.B), at, k, blk.WriteUnchanged)
	}
	s.flush.written.Add(1)
	if err != nil {
		return err
	}
	return give(at, k, b.B)
}
