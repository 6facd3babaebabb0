package qcow2

import (
	"context"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// patient is r for what has to be done even if its client has gone: the end of what has begun, and
// taking back what came to nothing.
func patient(r *blk.Req) *blk.Req {
	if r.Ctx == nil || r.Ctx.Done() == nil {
		return r
	}
	q := *r
	q.Ctx = context.WithoutCancel(r.Ctx)
	return &q
}

// enter writes to the header and waits until that is on stable storage. It does not end with the
// context of r: nobody would know then whether the image has the old or the new.
// +checklocks:s.mu
func (s *imageFile) enter(r *blk.Req, b []byte, off int64) error {
	r = patient(r)
	if err := s.writeMeta(r, b, off, olMainHeader); err != nil {
		return err
	}
	return s.barrier(r)
}

// enter64 is enter for a field of 8 bytes.
// +checklocks:s.mu
func (s *imageFile) enter64(r *blk.Req, v uint64, off int64) error {
	return s.enter(r, be.AppendUint64(nil, v), off)
}

// swap is enter for the place of a table that is written to from then on. After an error the header
// has the old value, was. An image whose header may have either is given up: what was written to
// one table would be lost with the other.
// +checklocks:s.mu
func (s *imageFile) swap(r *blk.Req, now, was []byte, off int64) error {
	err := s.enter(r, now, off)
	if err != nil && s.enter(r, was, off) != nil {
		_ = s.corrupt(r, -1, -1, "Which table the header refers to is not known")
	}
	return err
}

// peekHeader reads the header, and returns the first cluster.
// +checklocks:s.mu
func peekHeader(s *imageFile, r *blk.Req) (h *layout.Header, first []byte, err error) {
	first = make([]byte, layout.HeaderSize)
	if err := s.readFile(r, blk.Buf(first), 0); err != nil {
		return nil, nil, wrap("Could not read qcow2 header", err)
	}
	cs, err := layout.Peek(first)
	if err != nil {
		return nil, nil, err
	}
	// Most headers are short; the rest of the first cluster is zeroes beyond the file's end.
	first = make([]byte, cs)
	if err := s.readFile(r, blk.Buf(first), 0); err != nil {
		return nil, nil, wrap("Could not read unknown qcow2 header fields", err)
	}
	if openedForCheck(s) {
		s.badTable = layout.ForgetSnapshots(first)
	}
	h, err = layout.Parse(first, !s.readOnly)
	return h, first, err
}

// setHeader takes over a header that may change.
// +checklocks:s.mu
func (s *imageFile) setHeader(h *layout.Header, first []byte) {
	s.hdr = h
	for s.hdrUsed = len(first); s.hdrUsed > 0 && first[s.hdrUsed-1] == 0; {
		s.hdrUsed--
	}
	s.size.Store(int64(h.Size) &^ (blk.SectorSize - 1))
}

// readHeader reads the header, and returns the first cluster.
// +checklocks:s.mu
func (s *imageFile) readHeader(r *blk.Req) (first []byte, err error) {
	h, first, err := peekHeader(s, r)
	if err != nil {
		return nil, err
	}
	s.setHeader(h, first)
	s.version, s.compression = s.hdr.Version, s.hdr.CompressionType
	s.geo = s.hdr.Geometry()
	s.rawBit = s.hdr.Raw()
	s.raw = s.rawBit && s.hdr.CryptMethod == layout.CryptNone && !s.sealing
	s.cb, s.cs = s.geo.ClusterBits, s.geo.ClusterSize()
	s.sb, s.eb = s.geo.SubBits(), s.geo.EntryBits()
	return first, nil
}

// openedForCheck tells whether the image is opened although its snapshots are lost.
func openedForCheck(s *imageFile) bool { return s.readOnly && pick(s.options.XQblockdForCheck, false) }

// lazy tells whether refcounts need not be kept accurate on disk.
// +checklocks:s.mu
func (s *imageFile) lazy() bool {
	return s.set.lazy && s.hdr.IncompatibleFeatures&layout.IncompatDirty != 0
}

// writeIncompat changes the incompatible feature bits on disk and then in memory.
// +checklocks:s.mu
func (s *imageFile) writeIncompat(r *blk.Req, v uint64) error {
	if err := s.enter64(r, v, layout.OffIncompatFeatures); err != nil {
		return err
	}
	s.hdr.IncompatibleFeatures = v
	s.publish()
	return nil
}

// writeAutoclear changes the autoclear feature bits on disk and then in memory.
// +checklocks:s.mu
func (s *imageFile) writeAutoclear(r *blk.Req, v uint64) error {
	if err := s.enter64(r, v, layout.OffAutoclearFeatures); err != nil {
		return err
	}
	s.hdr.AutoclearFeatures = v
	return nil
}

// setDirtyBit sets the dirty bit before the first change under lazy refcounts.
// +checklocks:s.mu
func (s *imageFile) setDirtyBit(r *blk.Req) error {
	if !s.set.lazy || s.hdr.IncompatibleFeatures&layout.IncompatDirty != 0 {
		return nil
	}
	return s.writeIncompat(r, s.hdr.IncompatibleFeatures|layout.IncompatDirty)
}
