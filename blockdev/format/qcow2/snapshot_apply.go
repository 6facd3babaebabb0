package qcow2

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// Going back to a snapshot, which stays. What its L1 table refers to, the state of a machine behind
// the end of the disk too, counts one reference more, and a copy of that table becomes the active
// one:
//
//	refcounts up -> | L1 copy -> | header: size and L1 table at once -> | refcounts of what was
//	active down -> | flags on
//
// After a crash in between, the disk is as before or as the snapshot, and clusters are leaked at
// worst.

// ApplySnapshot makes the disk what it was when the first snapshot was made that has both that ID
// and that name; so large, too. What the disk held is gone unless snapshots share it. The node is
// held quiet, and not resized; if it fails nothing has changed, or the error says so.
func (s *snapshots) ApplySnapshot(r *blk.Req, id, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.snaps, func(x layout.Snapshot) bool { return x.ID == id && x.Name == name })
	if i < 0 {
		return errNoSnapshot
	}
	if s.geo.External {
		return blk.ErrNotSupported
	}
	if err := s.beginChange(r); err != nil {
		return err
	}
	return s.endChange(r, s.goBack(r, &s.snaps[i]))
}

var errSnapshotShown = errors.New("Device is not readonly")

// showSnapshot makes an image that is not written to show the first snapshot with that ID or, if
// there is none, with that name.
// +checklocks:s.mu
func (s *snapshots) showSnapshot(r *blk.Req, which string) error {
	if !s.readOnly {
		return errSnapshotShown
	}
	i := slices.IndexFunc(s.snaps, func(x layout.Snapshot) bool { return x.ID == which })
	if i < 0 {
		i = slices.IndexFunc(s.snaps, func(x layout.Snapshot) bool { return x.Name == which })
	}
	if i < 0 {
		return fmt.Errorf("Can't find snapshot '%s'", which)
	}
	l1, _, err := s.snapshotTable(r, &s.snaps[i])
	if err != nil {
		return wrap(fmt.Sprintf("Could not read snapshot '%s'", which), err)
	}
	s.exchange(l1)
	s.size.Store(int64(s.snaps[i].DiskSize))
	return nil
}

// errSnapshotSize: a snapshot is of a disk that its L1 table is too short for.
var errSnapshotSize = errors.New("The snapshot's L1 table is too short for its disk")

// snapshotTable reads and checks the L1 table of sn, and gives the length that it needs as the
// active one.
// +checklocks:s.mu
func (s *snapshots) snapshotTable(r *blk.Req, sn *layout.Snapshot) (l1 entries, n int64, err error) {
	if err := s.checkL1(sn); err != nil {
		return l1, 0, err
	}
	if sn.DiskSize > maxLength || sn.DiskSize%blk.SectorSize != 0 {
		return l1, 0, errInval
	}
	// A table that ends early is one of a disk whose end was never written.
	n = max(int64(sn.L1Size), int64(s.geo.L1Entries(sn.DiskSize)), 1)
	if n > layout.MaxL1Bytes/8 {
		return l1, 0, errSnapshotSize
	}
	if l1, err = s.readTable(r, int64(sn.L1TableOffset), int64(sn.L1Size)); err != nil {
		return l1, 0, err
	}
	return l1, n, s.vetL1(r, &l1)
}

// goBack makes sn the active contents.
// +checklocks:s.mu
func (s *snapshots) goBack(r *blk.Req, sn *layout.Snapshot) error {
	l1, n, err := s.snapshotTable(r, sn)
	if err != nil {
		return undoneError{err}
	}
	if err := s.vetL1(r, &s.l1); err != nil {
		return err
	}
	gone, err := s.allOf(r, &s.l1)
	if err != nil {
		return undoneError{err}
	}
	if err := s.refer(r, &l1); err != nil {
		return err
	}
	q := patient(r) // what is left takes less than undoing it would
	for i, e := l1.next(0); e != 0; i, e = l1.next(i + 1) {
		l1.set(i, e&^layout.Copied)
	}
	if err := s.activate(q, l1, n, int64(sn.DiskSize)); err != nil {
		var unsure unsureError
		if errors.As(err, &unsure) || s.dead.Load() {
			return err
		}
		if _, e := s.addRefs(q, &l1, -1, math.MaxInt); e != nil {
			s.warnf("Leaking the clusters of a snapshot that could not be applied: %s", blk.ErrnoText(e))
			return err
		}
		return undoneError{err}
	}
	for _, g := range gone {
		s.dropRefs(q, g)
	}
	s.quarantine.turn()
	err = s.flush(q)
	s.reap(q, false)
	if _, e := s.fixFlags(r, 0); e != nil && ended(r) != nil {
		s.flagsDue = true // this can wait
	} else if err == nil {
		err = e
	}
	return err
}

// allOf are the clusters that an L1 table refers to, each once for each reference that can be told
// from its neighbours.
// +checklocks:s.mu
func (s *snapshots) allOf(r *blk.Req, l1 *entries) (all []span, err error) {
	var list []int64
	for i, e := l1.next(0); e != 0; i, e = l1.next(i + 1) {
		if list, err = s.clustersOf(r, e, list[:0]); err != nil {
			return nil, err
		}
		for _, c := range list {
			all = with(all, span{c, c + 1})
		}
	}
	return all, nil
}

// refer adds one reference to all that l1 refers to, and writes the refcounts.
// +checklocks:s.mu
func (s *snapshots) refer(r *blk.Req, l1 *entries) error {
	done, err := s.addRefs(r, l1, 1, math.MaxInt)
	if err == nil {
		err = s.flush(r)
	}
	if err == nil {
		return nil
	}
	if _, e := s.addRefs(patient(r), l1, -1, done); e != nil {
		s.warnf("Leaking clusters: %s", blk.ErrnoText(e))
		return err
	}
	return undoneError{err}
}

// activate makes l1, with n entries, the active L1 table of a disk of size bytes.
// +checklocks:s.mu
func (s *snapshots) activate(r *blk.Req, l1 entries, n, size int64) error {
	release := s.claimFlush()
	defer release()
	need := s.geo.Clusters(n * 8)
	c, _, err := s.allocate(r, need, need, "L1 table")
	if err != nil {
		return err
	}
	off := c << s.cb
	if err := s.writeL1(r, &l1, off, n); err != nil {
		s.unref(r, freed{off: off, n: need << s.cb})
		return err
	}
	now := diskFields(uint64(size), s.hdr.CryptMethod, uint32(n), uint64(off))
	was := diskFields(s.hdr.Size, s.hdr.CryptMethod, s.hdr.L1Size, s.hdr.L1TableOffset)
	if err := s.swap(r, now, was, layout.OffSize); err != nil {
		if !s.dead.Load() {
			s.unref(r, freed{off: off, n: need << s.cb})
		}
		return err
	}
	s.exchange(l1)
	if old := int64(s.hdr.L1Size); old > 0 {
		s.quarantine.retire(int64(s.hdr.L1TableOffset), s.geo.RoundUp(old*8))
	}
	s.hdr.Size, s.hdr.L1Size, s.hdr.L1TableOffset = uint64(size), uint32(n), uint64(off)
	s.size.Store(size)
	s.tellChanged()
	return nil
}

// diskFields are the fields of the header from the size to the place of the L1 table.
func diskFields(size uint64, crypt, n uint32, off uint64) []byte {
	b := be.AppendUint32(be.AppendUint64(nil, size), crypt)
	return be.AppendUint64(be.AppendUint32(b, n), off)
}

// exchange makes l1 the active table in memory, where nothing has been changed since it was
// written.
// +checklocks:s.mu
func (s *tables) exchange(l1 entries) {
	for _, t := range []struct {
		l1 *entries
		d  int32
	}{{&s.l1, -1}, {&l1, 1}} {
		for i, e := t.l1.next(0); e != 0; i, e = t.l1.next(i + 1) {
			if off := int64(e & layout.OffsetMask); off != 0 {
				s.own(off, ownL2, t.d)
				s.l2.dropRange(off, s.cs)
			}
		}
	}
	s.l1 = l1
	clear(s.l1Dirty)
	s.l2.epoch++
}
