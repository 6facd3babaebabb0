package qcow2

import (
	"fmt"
	"math"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// nextL1 is the first guest cluster, from that of L1 entry i on, for which there is an L2 table, or
// one beyond all.
// +checklocks:s.mu
func (s *tables) nextL1(i int64) int64 {
	for k, e := s.l1.next(i); e != 0; k, e = s.l1.next(k + 1) {
		if e&layout.OffsetMask != 0 { // not only flags
			return k << s.geo.L2Bits()
		}
	}
	return math.MaxInt64 >> s.cb
}

// +checklocks:s.mu
func (s *tables) setL1(i int64, v uint64) {
	s.l1.set(i, v)
	s.l1Dirty[i>>6] = struct{}{}
}

// l2Offset is the file offset of the L2 slice that maps guest cluster gc, given its table's.
// +checklocks:s.mu
func (s *tables) l2Offset(table, gc int64) int64 {
	idx := gc & (1<<s.geo.L2Bits() - 1)
	return table + idx<<s.eb&^(s.slice-1)
}

// l2Index is the index of gc's entry in its slice, sliceLeft the number of entries from there on.
// +checklocks:s.mu
func (s *tables) l2Index(gc int64) int64 { return gc & (s.slice>>s.eb - 1) }

// +checklocks:s.mu
func (s *tables) sliceLeft(gc int64) int64 { return s.slice>>s.eb - s.l2Index(gc) }

// loadSlice returns the L2 slice that maps guest cluster gc, nil if there is no L2 table. A request
// that must not wait gets ErrWouldBlock if the slice is not cached.
// +checklocks:s.mu
func (s *tables) loadSlice(r *blk.Req, gc int64) (*table, error) {
	li := gc >> s.geo.L2Bits()
	tab := int64(s.l1.at(li) & layout.OffsetMask)
	if tab == 0 {
		return nil, nil
	}
	off := s.l2Offset(tab, gc)
	if t := s.l2.get(off); t != nil {
		return t, nil
	}
	if tab&(s.cs-1) != 0 {
		return nil, s.corrupt(r, -1, -1, "L2 table offset %s unaligned (L1 index: %s)", hex(tab), hex(li))
	}
	if r.NoWait {
		return nil, blk.ErrWouldBlock
	}
	s.evict()
	s.step(r, blk.EvL2Load)
	t := s.l2.alloc(off)
	if err := s.readFile(r, blk.Buf(t.data), off); err != nil {
		return nil, err
	}
	s.l2.insert(t)
	return t, nil
}

// warm loads the L2 slice that maps guest cluster gc with mu dropped, so that requests whose slices
// are cached go on meanwhile. It tells whether mu was dropped. It may fail: the caller's loadSlice
// then does it with mu held and reports what is wrong.
// +checklocks:s.mu
func (s *tables) warm(r *blk.Req, gc int64) (dropped bool) {
	tab := int64(s.l1.at(gc>>s.geo.L2Bits()) & layout.OffsetMask)
	off := s.l2Offset(tab, gc)
	if tab == 0 || tab&(s.cs-1) != 0 || r.NoWait || s.l2.get(off) != nil {
		return false
	}
	t, epoch := s.l2.alloc(off), s.l2.epoch
	var err error
	s.unlocked(func() {
		s.step(r, blk.EvL2Load)
		err = s.readFile(r, blk.Buf(t.data), off)
	})
	// What was read is right unless something was written or the table freed meanwhile.
	if err == nil && s.l2.epoch == epoch && s.l2.m[off] == nil {
		s.evict()
		s.l2.insert(t)
	}
	return true
}

// evict makes room in the L2 cache if something clean can go.
// +checklocks:s.mu
func (s *tables) evict() {
	if s.l2.full() {
		if t := s.l2.victim(func(t *table) bool { return !t.dirty }); t != nil {
			s.l2.drop(t)
		}
	}
}

// sliceForWrite is loadSlice for changing entries: the L2 table is made if there is none, and
// copied if a snapshot shares it.
// +checklocks:s.mu
func (s *tables) sliceForWrite(r *blk.Req, gc int64) (*table, error) {
	li := gc >> s.geo.L2Bits()
	e := s.l1.at(li)
	if s.survey != nil {
		if err := s.vetTable(r, int64(e&layout.OffsetMask)); err != nil {
			return nil, err
		}
	}
	if e&layout.OffsetMask != 0 && e&layout.Copied != 0 {
		if err := s.checkOwner(r, int64(e&layout.OffsetMask), s.cs); err != nil {
			return nil, err
		}
		return s.loadSlice(r, gc)
	}
	if r.NoWait {
		return nil, blk.ErrWouldBlock
	}
	if li >= int64(s.hdr.L1Size) {
		return nil, errInval
	}
	old := int64(e & layout.OffsetMask)
	if old&(s.cs-1) != 0 {
		return nil, s.corrupt(r, -1, -1, "L2 table offset %s unaligned (L1 index: %s)", hex(old), hex(li))
	}
	if old != 0 {
		if err := s.canFreeRange(r, old, s.cs); err != nil {
			return nil, err
		}
	}
	if err := s.newL2Table(r, li, old); err != nil {
		return nil, err
	}
	return s.loadSlice(r, gc)
}

// newL2Table gives L1 entry li an L2 table of its own: a copy of the one at old, unless that is 0.
// +checklocks:s.mu
func (s *tables) newL2Table(r *blk.Req, li, old int64) error {
	c, _, err := s.allocate(r, 1, 1, "L2 table")
	if err != nil {
		return err
	}
	off := c << s.cb
	b := make([]byte, s.cs)
	if old != 0 {
		// A shared table is never dirty in the cache: it would have been copied before.
		s.step(r, blk.EvL2AllocCowRead)
		err = s.readFile(r, blk.Buf(b), old)
	}
	if err == nil {
		// On disk it is complete from the beginning; the L1 entry follows after a barrier.
		s.step(r, blk.EvL2AllocWrite)
		err = s.writeMeta(r, b, off, 0)
	}
	if err != nil {
		_ = s.addRef(r, c, -1)
		return err
	}
	s.l2.dropRange(off, s.cs)
	s.own(off, ownL2, 1)
	s.copiesTable(c)
	s.setL1(li, uint64(off)|layout.Copied)
	if old != 0 {
		s.own(old, ownL2, -1)
		s.l2.dropRange(old, s.cs)
		s.free(old, s.cs, discardOther)
	}
	return nil
}

// entry reads entry i of an L2 slice.
func (s *tables) entry(t *table, i int64) uint64 { return be.Uint64(t.data[i<<s.eb:]) }

// +checklocks:s.mu
func (s *tables) setEntry(t *table, i int64, v uint64) {
	if s.survey != nil {
		s.linked(t.off, s.entry(t, i), v)
	}
	be.PutUint64(t.data[i<<s.eb:], v)
	s.l2.markDirty(t)
}

// mapping is a run of guest bytes of one kind.
type mapping struct {
	kind  layout.Kind
	entry uint64 // L2 entry of the first cluster
	host  int64  // file offset of the first byte; 0 for kinds without a host cluster, and compressed
	n     int64  // bytes
}

// lookup tells what is behind off: a run of at most n bytes, within one L2 slice or, where there
// are no L2 tables, up to the next one. Runs with host clusters are contiguous in the file; a
// compressed run is one cluster.
// +checklocks:s.mu
func (s *tables) lookup(r *blk.Req, off, n int64) (mapping, error) {
	gc := off >> s.cb
	in := off & (s.cs - 1)
	t, err := s.loadSlice(r, gc)
	if err != nil {
		return mapping{}, err
	}
	if t == nil {
		return mapping{kind: layout.Unallocated, n: min(n, s.nextL1(gc>>s.geo.L2Bits()+1)<<s.cb-off)}, nil
	}
	n = min(n, s.sliceLeft(gc)<<s.cb-in)
	if s.geo.Extended {
		return s.lookupSubs(r, t, gc, in, n)
	}
	i := s.l2Index(gc)
	e := s.entry(t, i)
	m := mapping{kind: s.geo.KindOf(e), entry: e}
	if err := s.checkEntry(r, m.kind, e, gc); err != nil {
		return mapping{}, err
	}
	if m.kind == layout.CompressedKind {
		m.n = min(n, s.cs-in)
		return m, nil
	}
	host := int64(e & layout.OffsetMask)
	if m.kind.HasHost() {
		m.host = host + in
	}
	left := s.geo.Clusters(in + n)
	k := int64(1)
	for ; k < left; k++ {
		x := s.entry(t, i+k)
		if s.geo.KindOf(x) != m.kind || m.kind.HasHost() && int64(x&layout.OffsetMask) != host+k<<s.cb {
			break
		}
	}
	m.n = min(n, k<<s.cb-in)
	return m, nil
}

// checkEntry reports entries that no sound image has.
// +checklocks:s.mu
func (s *tables) checkEntry(r *blk.Req, k layout.Kind, e uint64, gc int64) error {
	switch k {
	case layout.Unallocated:
		return nil
	case layout.Invalid:
		return s.corrupt(r, -1, -1, "Invalid cluster entry found  %s", s.entryPlace(gc))
	case layout.CompressedKind:
		if s.geo.External {
			return s.corrupt(r, -1, -1, "Compressed cluster entry found in image with external data file %s", s.entryPlace(gc))
		}
		return nil
	case layout.ZeroPlain, layout.ZeroAlloc:
		if s.version < 3 {
			return s.corrupt(r, -1, -1, "Zero cluster entry found in pre-v3 image %s", s.entryPlace(gc))
		}
	}
	if k == layout.ZeroPlain {
		return nil
	}
	host := int64(e & layout.OffsetMask)
	if host&(s.cs-1) != 0 {
		return s.corrupt(r, -1, -1, "Cluster allocation offset %s unaligned %s", hex(host), s.entryPlace(gc))
	}
	if s.geo.External && host != gc<<s.cb {
		return s.corrupt(r, -1, -1, "External data file host cluster offset %s does not match guest cluster offset: %s, L2 index: %s)",
			hex(host), hex(gc<<s.cb), hex(s.l2Index(gc)))
	}
	return nil
}

// +checklocks:s.mu
func (s *tables) entryPlace(gc int64) string {
	tab := s.l1.at(gc>>s.geo.L2Bits()) & layout.OffsetMask
	return fmt.Sprintf("(L2 offset: %s, L2 index: %s)", hex(tab), hex(s.l2Index(gc)))
}
