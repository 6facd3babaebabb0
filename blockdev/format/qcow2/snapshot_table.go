package qcow2

import (
	"errors"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// badTableError is what is wrong with a table that was read.
type badTableError struct{ error }

func (e badTableError) Unwrap() error { return e.error }

// knowSnapshots reads the table of snapshots. Of one that makes no sense an image that is opened
// for a check has what comes before.
// +checklocks:s.mu
func (s *snapshots) knowSnapshots(r *blk.Req) error {
	err := s.readSnapshots(r)
	var bad badTableError
	if errors.As(err, &bad) {
		err = bad.error
		if openedForCheck(&s.imageFile) {
			s.badTable, err = err, nil
			s.snapL1 = s.snapshotTables(s.snaps)
		}
	}
	return err
}

// +checklocks:s.mu
func (s *snapshots) readSnapshots(r *blk.Req) error {
	start := int64(s.hdr.SnapshotsOffset)
	if s.snapEnd = start; s.hdr.NbSnapshots == 0 {
		return nil
	}
	q := s.sequence(r, start, s.file.Size())
	defer q.close()
	names := 0
	for i := range int(s.hdr.NbSnapshots) {
		if q.off >= q.end {
			// Zeroes would count as entries: 65536 of them for a few bytes of header.
			return badTableError{wrap("Failed to read snapshot table", errInval)}
		}
		h, err := q.peek(layout.SnapshotHeaderSize)
		if err != nil {
			return wrap("Failed to read snapshot table", err)
		}
		n, err := layout.SnapshotNeed(h, i)
		if err != nil {
			return badTableError{err}
		}
		b, err := q.peek(n)
		if err != nil {
			return wrap("Failed to read snapshot table", err)
		}
		sn := layout.ParseSnapshot(b, s.hdr.Size)
		s.snaps = append(s.snaps, sn)
		names += len(sn.ID) + len(sn.Name)
		if q.skip(n); layout.SnapshotTableTooBig(q.off-start) || names > layout.MaxNames {
			return badTableError{errors.New("Snapshot table is too big")}
		}
		s.snapEnd = q.off
		pad := int(-q.off & 7)
		if _, err := q.peek(pad); err != nil {
			return wrap("Failed to read snapshot table", err)
		}
		q.skip(pad)
	}
	s.snapL1 = s.snapshotTables(s.snaps)
	return nil
}

// snapshotTables is where snapshots have their L1 tables. What cannot be one is never used.
func (s *snapshots) snapshotTables(l []layout.Snapshot) ranges {
	all := make([]span, 0, len(l))
	for i := range l {
		if s.checkL1(&l[i]) == nil {
			off := int64(l[i].L1TableOffset)
			all = append(all, span{off, off + int64(l[i].L1Size)*8})
		}
	}
	return makeRanges(all)
}

// checkL1 checks where a snapshot says that its L1 table is.
func (s *snapshots) checkL1(sn *layout.Snapshot) error {
	n, cs := uint64(sn.L1Size), uint64(s.cs)
	return layout.CheckTable(sn.L1TableOffset, n, 8, layout.MaxL1Bytes, cs, "Snapshot L1 table")
}

// findInactive finds the L2 tables of snapshots for overlap-check=all. L1 tables that lie over each
// other are read once.
// +checklocks:s.mu
func (s *snapshots) findInactive(r *blk.Req) (map[int64]struct{}, error) {
	for i := range s.snaps {
		if err := s.checkL1(&s.snaps[i]); err != nil {
			return nil, err
		}
	}
	inactive := map[int64]struct{}{}
	for _, t := range s.snapL1 {
		l1, err := s.readTable(r, t.off, (t.end-t.off)/8)
		if err != nil {
			return nil, wrap("Could not read L1 table", err)
		}
		for i, e := l1.next(0); e != 0; i, e = l1.next(i + 1) {
			if e&layout.OffsetMask != 0 {
				inactive[int64(e&layout.OffsetMask)>>s.cb] = struct{}{}
			}
		}
	}
	return inactive, nil
}

// writeSnapshots makes list the table of snapshots.
// +checklocks:s.mu
func (s *snapshots) writeSnapshots(r *blk.Req, list []layout.Snapshot) error {
	var b []byte
	names := 0
	for i := range list {
		b = list[i].AppendTo(b)
		names += len(list[i].ID) + len(list[i].Name)
	}
	if layout.SnapshotTableTooBig(int64(len(b))) || names > layout.MaxNames {
		return errTooBig
	}
	off := int64(0)
	if len(list) > 0 {
		var err error
		if off, err = s.writeNew(r, b, "snapshot table"); err != nil {
			return err
		}
	}
	if err := s.syncRefcounts(r); err != nil {
		return err
	}
	var h [12]byte
	be.PutUint32(h[:], uint32(len(list)))
	be.PutUint64(h[4:], uint64(off))
	s.fresh = nil // from here on the image may refer to them, also after an error
	if err := s.enter(r, h[:], layout.OffSnapshots); err != nil {
		return unsureError{err}
	}
	old, oldEnd := int64(s.hdr.SnapshotsOffset), s.snapEnd
	s.hdr.NbSnapshots, s.hdr.SnapshotsOffset = uint32(len(list)), uint64(off)
	s.snaps, s.snapEnd, s.snapL1 = list, off+int64(len(b)), s.snapshotTables(list)
	if s.set.overlap&olInactiveL2 != 0 {
		// Nil after an error: what was known would accuse the innocent.
		s.inactive, _ = s.findInactive(r)
	}
	if oldEnd > old {
		s.free(old, oldEnd-old, discardOther)
	}
	return nil
}

// countSnapshots counts the table of snapshots, their L1 tables and what those refer to.
// +checklocks:s.mu
func (s *snapshots) countSnapshots(c *counter) error {
	if s.badTable != nil && s.lostSnaps == nil {
		c.res.fault("snapshot table: " + s.badTable.Error())
	}
	if len(s.snaps) == 0 {
		return nil
	}
	start := int64(s.hdr.SnapshotsOffset)
	if _, err := c.fixed(start, s.snapEnd-start, "snapshot table"); err != nil {
		return err
	}
	for i := range s.snaps {
		sn := &s.snaps[i]
		if s.lostSnaps[i] {
			continue
		}
		if s.checkL1(sn) != nil {
			c.res.fault("snapshot's L1 table at", sn.L1TableOffset)
			c.badSnaps[i] = true
			continue
		}
		off, n := int64(sn.L1TableOffset), int64(sn.L1Size)
		var l1 entries
		ok, err := c.fixed(off, n*8, "snapshot's L1 table")
		if ok {
			l1, err = s.readTable(c.r, off, n)
		} else {
			c.badSnaps[i] = true
		}
		if err != nil {
			return err
		}
		for k, e := l1.next(0); e != 0; k, e = l1.next(k + 1) {
			if c.l1Entry(e, int32(i)+1); c.crowded() {
				return errTooBig
			}
		}
	}
	return nil
}

// addSnapshot writes the L1 copy and a new table of snapshots, and makes the header refer to that.
// +checklocks:s.mu
func (s *snapshots) addSnapshot(r *blk.Req, sn *layout.Snapshot) error {
	l1 := make([]byte, int64(sn.L1Size)*8)
	for i, e := s.l1.next(0); e != 0; i, e = s.l1.next(i + 1) {
		be.PutUint64(l1[8*i:], e&^layout.Copied)
	}
	defer s.giveBack(r)
	off, err := s.writeNew(r, l1, "snapshot L1 table")
	if err != nil {
		return err
	}
	sn.L1TableOffset = uint64(off)
	return s.writeSnapshots(r, append(s.snaps[:len(s.snaps):len(s.snaps)], *sn))
}
