package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// maxJoined is how many L2 slices more than one Status looks into.
const maxJoined = 256

// Status tells about a run from off of at most n bytes.
func (s *requests) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	if !s.lock(r) {
		return blk.Extent{}, blk.ErrWouldBlock
	}
	s.locked()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return blk.Extent{}, err
	}
	if err := s.room(r); err != nil {
		return blk.Extent{}, err
	}
	if s.prealloc == 0 && !r.NoWait {
		s.detectPrealloc(r)
	}
	m, err := s.lookup(r, off, n)
	if err != nil {
		return blk.Extent{}, err
	}
	// Runs go on over slices of the same kind while that costs no I/O. Others wait meanwhile, and
	// an image may use one L2 table for all of a huge disk.
	for k := 0; k < maxJoined && m.n < n && m.kind != layout.CompressedKind; k++ {
		q := *r
		q.NoWait = true
		x, err := s.lookup(&q, off+m.n, n-m.n)
		if err != nil || x.kind != m.kind || m.kind.HasHost() && x.host != m.host+m.n {
			break
		}
		m.n += x.n
	}
	e := blk.Extent{N: m.n}
	switch m.kind {
	case layout.Unallocated:
		// That nothing lies below is the node's to add: zeroes told here would count as allocated.
	case layout.ZeroPlain, layout.ZeroAlloc:
		e.Allocated, e.Zero = true, true
	case layout.CompressedKind:
		e.Allocated, e.Data, e.Compressed = true, true, true
	default:
		e.Allocated, e.Data = true, true
		e.Recurse = (s.prealloc == 2 || s.geo.External) && s.seal == nil
	}
	if (m.kind == layout.Normal || m.kind == layout.ZeroAlloc) && s.seal == nil {
		e.OffValid, e.MapOff = true, m.host
		e.In, _ = s.data().(blk.Child)
	}
	return e, nil
}

// Map appends the host ranges behind a prefix of [off, off+n). Clusters of this image stay where
// they are until m is released.
func (s *requests) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	for n > 0 {
		x, err := s.findMapped(r, off, n, m)
		if err != nil {
			return err
		}
		before := m.N()
		switch x.kind {
		case layout.CompressedKind:
			return nil
		case layout.Normal:
			if s.seal != nil {
				return nil // what is there is not what the disk has
			}
			if k := min(x.n, s.data().Size()-x.host); k > 0 {
				err = s.data().Map(r, x.host, k, m)
			}
		case layout.Unallocated:
			err = s.mapBacking(r, off, x.n, m)
		default:
			m.Add(blk.HostRange{FD: -1, N: x.n})
		}
		if err != nil {
			return err
		}
		if m.N()-before != x.n {
			return nil
		}
		off, n = off+x.n, n-x.n
	}
	return nil
}

// findMapped is lookup for mapping; m holds what the run refers to.
func (s *requests) findMapped(r *blk.Req, off, n int64, m *blk.Mapping) (x mapping, err error) {
	if !s.lock(r) {
		return x, blk.ErrWouldBlock
	}
	s.locked()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return x, err
	}
	if x, err = s.lookup(r, off, n); err == nil && x.kind == layout.Normal {
		m.Hold(s.quarantine.hold())
	}
	return x, err
}

func (s *requests) mapBacking(r *blk.Req, off, n int64, m *blk.Mapping) error {
	if end := s.backSize(); off < end {
		k := min(n, end-off)
		before := m.N()
		if err := s.back().Map(r, off, k, m); err != nil || m.N()-before != k {
			return err
		}
		n -= k
	}
	if n > 0 {
		m.Add(blk.HostRange{FD: -1, N: n})
	}
	return nil
}

// CopyFrom writes host ranges to off by the file's own copying. It fails with ErrNotSupported,
// maybe after a part was copied, if old content would be needed around the new.
func (s *requests) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	return s.retry(r, func() error { return s.copyFrom(r, off, src, f) })
}

func (s *requests) copyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	if s.seal != nil {
		return blk.ErrNotSupported
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	var n int64
	for _, h := range src {
		if h.FD < 0 {
			return blk.ErrNotSupported
		}
		n += h.N
	}
	if err := s.mark(r, off, n, f); err != nil {
		return err
	}
	for n > 0 {
		p, err := s.planWrite(r, off, n)
		if err != nil {
			return err
		}
		var part []blk.HostRange
		part, src = cut(src, p.n)
		switch {
		case p.alloc == nil:
			err = s.data().CopyFrom(r, p.host, part, f)
			p.epoch.Release()
		case off != p.from || off+p.n != min(p.to, s.size.Load()):
			return s.finish(r, p.alloc, blk.ErrNotSupported)
		default:
			err = s.copyAlloc(r, &p, off+p.n, part, f)
		}
		if err != nil {
			return err
		}
		off, n = off+p.n, n-p.n
	}
	return nil
}

// copyAlloc copies src to the clusters of p; end is where on the disk that ends.
func (s *requests) copyAlloc(r *blk.Req, p *plan, end int64, src []blk.HostRange, f blk.Flags) error {
	a := p.alloc
	err := s.data().CopyFrom(r, p.host, src, f)
	if rest := p.to - end; err == nil && rest > 0 && !a.fresh {
		err = s.data().Zero(r, p.host+p.n, rest, 0) // beyond the end of the disk
	}
	return s.finish(r, a, err)
}

// cut splits ranges after n bytes; the second part shares no memory with the first.
func cut(src []blk.HostRange, n int64) (head, rest []blk.HostRange) {
	for i, h := range src {
		if h.N >= n {
			head = append(append(head, src[:i]...), h)
			head[i].N = n
			if h.N > n {
				h.Off, h.N = h.Off+n, h.N-n
				rest = append(rest, h)
			}
			return head, append(rest, src[i+1:]...)
		}
		n -= h.N
	}
	return src, nil
}
