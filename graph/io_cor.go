package graph

import (
	"qblockd/graph/blk"
)

// readCopying reads [off, off+size), which is inside the node, and writes to the node what it has
// not allocated in the blocks touched, so that later reads need nothing from below. The blocks are
// registered as serialising: no write comes between the copy's read and its write.
func (n *Node) readCopying(r *blk.Req, v blk.Vec, off, size int64) error {
	s := &n.io
	p := n.copyRange(off, size)
	k, err := s.track.begin(r, p.Off, p.N, true)
	if err != nil {
		return err
	}
	defer s.track.end(k)
	return n.copyUp(r, p, func(at, k int64, content []byte) error {
		lo, hi := max(at, off), min(at+k, off+size)
		if lo >= hi {
			return nil
		}
		dst := v.Slice(lo-off, hi-lo)
		if content == nil {
			return n.driverRead(r, dst, lo, hi-lo, 0)
		}
		dst.CopyIn(content[lo-at:])
		return nil
	})
}

// Prefetch writes to the node what it has not allocated of [off, off+size), cut at its end and
// widened to its allocation units: a copy-on-read that nobody reads. Needs the write-unchanged
// permission. Errors as for ReadAt and WriteAt.
func (e *Edge) Prefetch(r *blk.Req, off, size int64) error {
	n := e.node.Load()
	if err := e.writable(n, off, size, blk.WriteUnchanged); err != nil {
		return err
	}
	if size = min(size, n.io.drv.Size()-off); size <= 0 {
		return nil
	}
	p := n.copyRange(off, size)
	k, err := n.io.track.begin(r, p.Off, p.N, true)
	if err != nil {
		return err
	}
	defer n.io.track.end(k)
	return n.copyUp(r, p, func(int64, int64, []byte) error { return nil })
}

// copyRange widens a range to allocation units, cut at the end of the node.
func (n *Node) copyRange(off, size int64) blk.Padding {
	s := &n.io
	p := blk.Pad(off, size, max(s.caps.Limits.ClusterSize, s.align))
	p.N = min(p.N, blk.AlignUp(s.drv.Size(), s.align)-p.Off)
	return p
}

// copyUp goes through p. Of each part it calls give with the content if it had to be copied, else
// with nil.
func (n *Node) copyUp(r *blk.Req, p blk.Padding, give func(at, k int64, content []byte) error) error {
	if r.NoWait {
		// Several calls of the driver at least; a part that is allocated as a whole could go on,
		// but then status would be asked twice.
		return blk.ErrWouldBlock
	}
	readOnly := n.readOnly.Load() || n.io.writer == nil
	for at, end := p.Off, p.Off+p.N; at < end; {
		k := end - at
		allocated := readOnly
		if !readOnly {
			x, err := n.statusOf(r, at, k)
			if err != nil {
				return err
			}
			if x.N == 0 {
				x.N = k
			}
			k, allocated = blk.AlignUp(x.N, n.io.align), x.Allocated
		}
		if allocated {
			if err := give(at, k, nil); err != nil {
				return err
			}
			at += k
			continue
		}
		k = min(k, max(blk.AlignDown(bounceMax, n.io.align), n.io.align), n.io.maxIO)
		if err := n.copyChunk(r, at, k, give); err != nil {
			return err
		}
		at += k
	}
	return nil
}

// copyChunk copies whole blocks that are not allocated.
func (n *Node) copyChunk(r *blk.Req, at, k int64, give func(at, k int64, content []byte) error) error {
	s := &n.io
	if err := s.copying.Take(r, k); err != nil {
		return err
	}
	defer s.copying.Give(k)
	b := blk.GetBuf(int(k), s.memAlign)
	defer blk.PutBuf(b)
	if err := s.drv.ReadAt(r, blk.Buf(b.B), at, 0); err != nil {
		return err
	}
	// Copied to memory of our own first: a client may scribble over its buffer.
	var err error
	s.step(r, blk.EvCorWrite)
	if s.zeroer != nil && blk.IsZero(b.B) {
		err = n.driverZero(r, at, k, blk.WriteUnchanged)
	} else {
		err = n.driverWrite(r, blk.Buf(b.B), at, k, blk.WriteUnchanged)
	}
	s.flush.written.Add(1)
	if err != nil {
		return err
	}
	return give(at, k, b.B)
}
