package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// requests are those for the guest disk. The exported ones take mu, the others need it where they
// do no I/O of data.
type requests struct {
	discarder

	// Memory of requests under way, taken with no lock held. Who waits for one of these may hold
	// parts of those before it.
	zipping   blk.Budget
	copying   blk.Budget
	unzipping blk.Budget
	decoding  blk.Budget

	unz unzipped // +checklocks:mu
}

// ReadAt fills v from off.
func (s *requests) ReadAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) error {
	n := v.Len()
	for done := int64(0); done < n; {
		k, err := s.readRun(r, v, off+done, done, n-done)
		if err != nil {
			return err
		}
		done += k
	}
	return nil
}

// readRun reads one run of at most n bytes at off into v, from byte at of v on.
func (s *requests) readRun(r *blk.Req, v blk.Vec, off, at, n int64) (int64, error) {
	m, e, err := s.findRun(r, off, n)
	if err != nil {
		return 0, err
	}
	if at != 0 || m.n != v.Len() {
		v = v.Slice(at, m.n)
	}
	switch m.kind {
	case layout.Normal:
		s.step(r, blk.EvReadAio)
		err = s.readData(r, v, m.host, off)
	case layout.CompressedKind:
		err = s.readCompressed(r, v, m.entry, off&(s.cs-1))
	case layout.Unallocated:
		err = s.readBacking(r, v, off)
	default:
		v.Zero()
	}
	if e != nil {
		e.Release()
	}
	return m.n, err
}

// findRun is lookup for reading. If the run has host clusters, the reader is in epoch e.
func (s *requests) findRun(r *blk.Req, off, n int64) (m mapping, e *epoch, err error) {
	if !s.lock(r) {
		return m, nil, blk.ErrWouldBlock
	}
	s.locked()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return m, nil, err
	}
	if s.l2.full() && !s.readOnly {
		if err := s.room(r); err != nil {
			return m, nil, err
		}
	}
	if s.warm(r, off>>s.cb) {
		if err := s.usable(); err != nil {
			return m, nil, err
		}
	}
	if m, err = s.lookup(r, off, n); err == nil && m.kind >= layout.Normal {
		e = s.quarantine.hold()
	}
	return m, e, err
}

// readBacking reads what the backing file shows; zeroes beyond its end.
func (s *requests) readBacking(r *blk.Req, v blk.Vec, off int64) error {
	b := s.back()
	if b == nil {
		v.Zero()
		return nil
	}
	end := b.Size()
	if off < end {
		s.step(r, blk.EvReadBackingAio)
	}
	return readPadded(r, b, end, v, off)
}
