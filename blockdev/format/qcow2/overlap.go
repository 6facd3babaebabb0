package qcow2

import (
	"fmt"
	"math/bits"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// overlap is a set of kinds of metadata that writes are checked against.
type overlap uint16

const (
	olMainHeader overlap = 1 << iota
	olActiveL1
	olActiveL2
	olRefcountTable
	olRefcountBlock
	olSnapshotTable
	olInactiveL1
	olInactiveL2
	olBitmapDirectory

	olConstant = olMainHeader | olActiveL1 | olRefcountTable | olSnapshotTable | olBitmapDirectory
	olCached   = olConstant | olActiveL2 | olRefcountBlock | olInactiveL1
	olAll      = olCached | olInactiveL2
)

var overlapNames = [...]string{
	"qcow2_header", "active L1 table", "active L2 table", "refcount table", "refcount block",
	"snapshot table", "inactive L1 table", "inactive L2 table", "bitmap directory",
}

// owner counts what metadata lie in a cluster. More than one owner means a corrupt image.
type owner struct{ l2, block int32 }

type ownKind uint8

const (
	ownL2 ownKind = iota
	ownBlock
)

// own notes that the cluster at off becomes (d = 1) or stops being (d = -1) metadata.
// +checklocks:s.mu
func (s *imageFile) own(off int64, k ownKind, d int32) {
	c := off >> s.cb
	o := s.owners[c]
	if k == ownL2 {
		o.l2 += d
	} else {
		o.block += d
	}
	if o == (owner{}) {
		delete(s.owners, c)
	} else {
		s.owners[c] = o
	}
}

// checkOverlap fails if a write of n bytes at off touches metadata of a kind that the options name
// and that is not in own. The image is given up then.
// +checklocks:s.mu
func (s *imageFile) checkOverlap(r *blk.Req, off, n int64, own overlap) error {
	hit := s.overlaps(off, n, s.set.overlap&^own)
	if hit == 0 {
		return nil
	}
	what := overlapNames[bits.TrailingZeros16(uint16(hit))]
	return s.corrupt(r, off, n, "Preventing invalid write on metadata (overlaps with %s)", what)
}

// checkOwner fails if others refer to clusters in [off, off+n) as far as is known, or if no
// refcount counts them. The image is given up then.
// +checklocks:s.mu
func (s *imageFile) checkOwner(r *blk.Req, off, n int64) error {
	if s.wrong.n == 0 && s.counted == nil || n <= 0 {
		return nil
	}
	for c := off >> s.cb; c <= (off+n-1)>>s.cb; c++ {
		if s.wrong.at(c) || s.counted.torn(c) {
			return s.corrupt(r, off, n,
				"Preventing invalid write on cluster %s, which has other references or is not counted", hex(c<<s.cb))
		}
	}
	return nil
}

// mayWrite is called before anything is written in place: see checkOverlap and checkOwner.
// +checklocks:s.mu
func (s *imageFile) mayWrite(r *blk.Req, off, n int64, own overlap) error {
	if err := s.checkOverlap(r, off, n, own); err != nil {
		return err
	}
	return s.checkOwner(r, off, n)
}

// meets tells whether n bytes at at share one with [off, end).
func meets(off, end, at, n int64) bool { return n > 0 && at < end && off < at+n }

// overlaps tells what metadata of the kinds check lie in clusters that [off, off+n) touches.
// +checklocks:s.mu
func (s *imageFile) overlaps(off, n int64, check overlap) overlap {
	if check == 0 || n == 0 {
		return 0
	}
	if check&olMainHeader != 0 && off < s.cs {
		return olMainHeader
	}
	end := s.geo.RoundUp(off + n)
	off = s.geo.RoundDown(off)
	snapshots := int64(s.hdr.SnapshotsOffset)
	if check&olActiveL1 != 0 && meets(off, end, int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size)*8) {
		return olActiveL1
	}
	if check&olRefcountTable != 0 && meets(off, end, s.reftOffset(), s.reftSize*8) {
		return olRefcountTable
	}
	if s.hdr.NbSnapshots > 0 {
		if check&olSnapshotTable != 0 && meets(off, end, snapshots, s.snapEnd-snapshots) {
			return olSnapshotTable
		}
		if check&olInactiveL1 != 0 && s.snapL1.touch(off, end) {
			return olInactiveL1
		}
	}
	if check&(olActiveL2|olRefcountBlock) != 0 {
		if hit := s.overlapsOwned(off, end, check); hit != 0 {
			return hit
		}
	}
	if check&olInactiveL2 != 0 && len(s.inactive) > 0 {
		for c := off >> s.cb; c < end>>s.cb; c++ {
			if _, ok := s.inactive[c]; ok {
				return olInactiveL2
			}
		}
	}
	if b := s.ext.Bitmaps; check&olBitmapDirectory != 0 && b != nil {
		if meets(off, end, int64(b.DirectoryOffset), int64(b.DirectorySize)) {
			return olBitmapDirectory
		}
	}
	return 0
}

// +checklocks:s.mu
func (s *imageFile) overlapsOwned(off, end int64, check overlap) overlap {
	for c := off >> s.cb; c < end>>s.cb; c++ {
		o, ok := s.owners[c]
		if !ok {
			continue
		}
		if check&olActiveL2 != 0 && o.l2 > 0 {
			return olActiveL2
		}
		if check&olRefcountBlock != 0 && o.block > 0 {
			return olRefcountBlock
		}
	}
	return 0
}

// corrupt reports fatal corruption found at run time, and returns the error for the request that
// met it. A writable image is marked corrupt on disk, and its use ends. off and n are -1 if
// unknown.
// +checklocks:s.mu
func (s *imageFile) corrupt(r *blk.Req, off, n int64, format string, args ...any) error {
	if s.passive {
		return errIO // as we remember it, it may make no sense
	}
	if s.readOnly {
		s.suspect(off, n, format, args...)
		return errIO
	}
	if s.dead.Load() && s.signaled {
		return errIO
	}
	msg := fmt.Sprintf(format, args...)
	if s.corrupted != nil {
		s.corrupted(msg, off, n, true)
	}
	s.signaled = true
	s.warnf("Marking image as corrupt: %s; further corruption events will be suppressed", msg)
	s.dead.Store(true)
	s.wake.Broadcast()
	if s.version >= 3 {
		s.hdr.IncompatibleFeatures |= layout.IncompatCorrupt
		s.publish()
		b := be.AppendUint64(nil, s.hdr.IncompatibleFeatures)
		q := *patient(r)
		q.NoWait = false
		// The request fails anyway.
		_ = s.file.WriteAt(&q, blk.Buf(b), layout.OffIncompatFeatures, 0)
	}
	return errIO
}

// suspect reports corruption that ends nothing, if none was reported before.
// +checklocks:s.mu
func (s *imageFile) suspect(off, n int64, format string, args ...any) {
	if s.signaled {
		return
	}
	s.signaled = true
	msg := fmt.Sprintf(format, args...)
	if s.corrupted != nil {
		s.corrupted(msg, off, n, false)
	}
	s.warnf("Image is corrupt: %s; further non-fatal corruption events will be suppressed", msg)
}

// hex prints as by C's %#x.
type hex uint64

func (v hex) String() string {
	if v == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", uint64(v))
}
