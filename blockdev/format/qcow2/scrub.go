package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// A repair that somebody has asked for first puts right what tables refer to: what leads to where
// it cannot lead is dropped, and reads as zeroes from then on. It writes to tables where they are,
// and only there, so it needs no free cluster. Then refcounts and flags are made to agree with the
// tables (check.go), and snapshots and bitmaps that lead nowhere go.
//
// Of two that claim one cluster, tables win over data and what the header names over what tables
// name. An L2 table that is contested counts only if it reads as one.

// scrubber puts right what the tables of an image refer to.
type scrubber struct {
	*image
	c     *counter
	meta  ranges             // what the header and the table of snapshots name
	gone  map[int64]struct{} // clusters of L2 tables that are none
	fixed int
}

// scrub puts right the tables that c has counted, and returns how many entries it has changed.
// +checklocks:s.mu
func (s *image) scrub(c *counter) (int, error) {
	x := &scrubber{image: s, c: c, gone: map[int64]struct{}{}}
	if err := x.judgeSnapshots(); err != nil { // +checklocksignore: of the same image
		return 0, err
	}
	x.meta = x.named() // +checklocksignore: of the same image
	buf := make([]byte, s.cs)
	for _, f := range []func(k int64, buf []byte) error{x.judge, x.table} {
		for _, k := range c.tabs {
			if err := ended(c.r); err != nil {
				return x.fixed, err
			}
			if err := f(k, buf); err != nil {
				return x.fixed, err
			}
		}
	}
	if err := x.snapshotL1s(); err != nil { // +checklocksignore: of the same image
		return x.fixed, err
	}
	for li, e := s.l1.next(0); e != 0; li, e = s.l1.next(li + 1) {
		now := x.l1Entry(e)
		if now == e {
			continue
		}
		if tab := int64(e & layout.OffsetMask); tab != 0 && now == 0 {
			s.own(tab, ownL2, -1)
			s.l2.dropRange(s.geo.RoundDown(tab), s.cs)
		}
		s.setL1(li, now)
		x.fixed++
	}
	return x.fixed, s.flush(c.r)
}

// named are the places of all contiguous tables.
// +checklocks:s.mu
func (s *scrubber) named() ranges {
	l := []span{
		{0, s.cs},
		{int64(s.hdr.L1TableOffset), int64(s.hdr.L1TableOffset) + int64(s.hdr.L1Size)*8},
		{s.reftOffset(), s.reftOffset() + s.reftSize*8},
	}
	if len(s.snaps) > 0 {
		l = append(l, span{int64(s.hdr.SnapshotsOffset), s.snapEnd})
	}
	for i := range s.snaps {
		if sn := &s.snaps[i]; !s.c.badSnaps[i] {
			l = append(l, span{int64(sn.L1TableOffset), int64(sn.L1TableOffset) + int64(sn.L1Size)*8})
		}
	}
	if k := s.ext.Crypto; k != nil {
		l = append(l, span{int64(k.Offset), int64(k.Offset + k.Length)})
	}
	for i := range l {
		l[i].end = s.geo.RoundUp(l[i].end)
	}
	return makeRanges(l)
}

// judgeSnapshots finds snapshots whose L1 tables are none: others claim their place, too, and what
// is there makes no sense.
// +checklocks:s.mu
func (s *scrubber) judgeSnapshots() error {
	for i := range s.snaps {
		off, n := int64(s.snaps[i].L1TableOffset), int64(s.snaps[i].L1Size)
		if s.c.badSnaps[i] || !s.contested(off, n*8) {
			continue
		}
		l1, err := s.readTable(s.c.r, off, n)
		if err != nil {
			return err
		}
		for k, e := l1.next(0); e != 0; k, e = l1.next(k + 1) {
			if s.l1Entry(e) != e {
				s.c.badSnaps[i] = true
				break
			}
		}
	}
	return nil
}

// contested tells whether a contiguous table shares its place with something else.
func (s *scrubber) contested(off, n int64) bool {
	for k := off >> s.cb; n > 0 && k <= (off+n-1)>>s.cb; k++ {
		if s.c.t.get(k) > 1 {
			return true
		}
	}
	return false
}

// l1Entry is what becomes of entry e of an L1 table.
func (s *scrubber) l1Entry(e uint64) uint64 {
	off := int64(e & layout.OffsetMask)
	if off == 0 || off&(s.cs-1) != 0 || s.c.beyond(off, s.cs) {
		return 0
	}
	if _, no := s.gone[off>>s.cb]; no {
		return 0
	}
	return e & (layout.OffsetMask | layout.Copied)
}

// snapshotL1s puts the L1 tables of snapshots right.
// +checklocks:s.mu
func (s *scrubber) snapshotL1s() error {
	for i := range s.snaps {
		if s.c.badSnaps[i] {
			continue
		}
		off := int64(s.snaps[i].L1TableOffset)
		l1, err := s.readTable(s.c.r, off, int64(s.snaps[i].L1Size))
		for k, e := l1.next(0); err == nil && e != 0; k, e = l1.next(k + 1) {
			if now := s.l1Entry(e); now != e {
				err = s.overwrite(be.AppendUint64(nil, now), off+8*k)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// overwrite writes to a table where it is.
// +checklocks:s.mu
func (s *scrubber) overwrite(b []byte, off int64) error {
	s.fixed++
	s.wrote++
	return s.file.WriteAt(s.c.r, blk.Buf(b), off, 0)
}

// judge finds out whether what lies in cluster k is an L2 table. One in another table is none, and
// one that others claim too is none if most of it makes no sense.
// +checklocks:s.mu
func (s *scrubber) judge(k int64, buf []byte) error {
	off := k << s.cb
	named, contested := s.meta.touch(off, off+s.cs), s.c.t.get(k) > s.c.l2[k].n
	if s.c.beyond(off, s.cs) || !named && !contested {
		return nil
	}
	bad, all := 0, 0
	if !named {
		if err := s.readL2(s.c.r, off, buf); err != nil {
			return err
		}
	}
	for i := int64(0); i < s.cs && !named; i += 1 << s.eb {
		now, was := s.cellAt(buf[i:], false)
		if was != (cell{}) {
			all++
		}
		if now != was {
			bad++
		}
	}
	if named || 2*bad > all {
		s.gone[k] = struct{}{}
	}
	return nil
}

// table puts the L2 table in cluster k right.
// +checklocks:s.mu
func (s *scrubber) table(k int64, buf []byte) error {
	off := k << s.cb
	if _, no := s.gone[k]; no || s.c.beyond(off, s.cs) {
		return nil // the entries that lead there are dropped
	}
	if err := s.readL2(s.c.r, off, buf); err != nil {
		return err
	}
	changed := 0
	for i := int64(0); i < s.cs; i += 1 << s.eb {
		now, was := s.cellAt(buf[i:], true)
		if now == was {
			continue
		}
		changed++
		be.PutUint64(buf[i:], now.word)
		if s.geo.Extended {
			be.PutUint64(buf[i+8:], now.bits)
		}
	}
	if changed == 0 {
		return nil
	}
	s.fixed += changed - 1 // overwrite counts one
	s.l2.dropRange(off, s.cs)
	return s.overwrite(buf, off)
}

// cellAt is the entry at the beginning of b as it is, and what becomes of it. With apart, it must
// not refer to tables.
func (s *scrubber) cellAt(b []byte, apart bool) (now, was cell) {
	was.word = be.Uint64(b)
	if s.geo.Extended {
		was.bits = be.Uint64(b[8:])
	}
	now = was
	compressed := was.word&layout.Compressed != 0
	if compressed {
		now.word &^= layout.Copied
	} else {
		now.word &^= s.geo.Reserved()
	}
	off, n := s.geo.HostRange(now.word)
	switch {
	case compressed && s.geo.External, n > 0 && s.c.beyond(off, n), apart && s.onTable(off, n):
		return s.zeroCell(), was
	case !compressed && int64(now.word&layout.OffsetMask)&(s.cs-1) != 0:
		return s.zeroCell(), was
	}
	if s.geo.Extended && !s.geo.Possible(now.word, now.bits) {
		now.bits = possible(s.geo.KindOf(now.word), now.bits)
	}
	return now, was
}

// possible makes the bitmap of an extended entry one that can be: of a subcluster that has data and
// is zero the data count; one that has data where there is no cluster is zero.
func possible(k layout.Kind, bits uint64) uint64 {
	alloc := bits & layout.AllAlloc
	switch k {
	case layout.CompressedKind:
		return 0
	case layout.Normal:
		return bits &^ (alloc << layout.Subclusters)
	}
	return bits&layout.AllZero | alloc<<layout.Subclusters
}

// zeroCell is an entry that refers to nothing and reads as zeroes, or, in images of version 2,
// which know no such thing, as the backing file.
func (s *scrubber) zeroCell() cell {
	switch {
	case s.version < 3:
		return cell{}
	case s.geo.Extended:
		return cell{bits: layout.AllZero}
	}
	return cell{word: layout.ZeroFlag}
}

// onTable tells whether [off, off+n) has a cluster in which there are tables.
func (s *scrubber) onTable(off, n int64) bool {
	if n == 0 {
		return false
	}
	if s.meta.touch(off, off+n) {
		return true
	}
	for k := off >> s.cb; k <= (off+n-1)>>s.cb; k++ {
		if _, is := s.c.l2[k]; !is {
			continue
		}
		if _, no := s.gone[k]; !no {
			return true
		}
	}
	return false
}

// dropLost drops snapshots and bitmaps that lead nowhere. Refcounts are right.
// +checklocks:s.mu
func (s *image) dropLost(c *counter) error {
	if n := len(c.badSnaps); n > 0 || s.badTable != nil {
		var list []layout.Snapshot
		for i := range s.snaps {
			if !c.badSnaps[i] {
				list = append(list, s.snaps[i])
			}
		}
		if err := s.writeSnapshots(c.r, list); err != nil {
			return err
		}
		s.badTable = nil
		s.publishSnapshots()
	}
	if len(c.badBitmaps) > 0 {
		var list []*stored
		for _, m := range s.stored {
			if !c.badBitmaps[m] {
				list = append(list, m)
			}
		}
		defer s.giveBack(c.r)
		// What they take is not given back here: a count finds what of it is nobody else's.
		if err := s.switchDirectory(c.r, list, nil); err != nil {
			return err
		}
	}
	return s.flush(c.r)
}
