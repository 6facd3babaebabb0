package qcow2

import (
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// tables are the L1 table and the L2 tables of the disk, of which slices are cached. Their methods
// need mu.
type tables struct {
	allocator

	l1 entries // +checklocks:mu
	// l1Dirty are the groups of 64 entries that are to be written.
	l1Dirty map[int64]struct{} // +checklocks:mu
	l2      *cache             // +checklocks:mu
	// slice is the length of an L2 slice in bytes.
	slice int64 // +checklocks:mu
}

// countL1 counts the L1 table and the L2 tables that it refers to.
// +checklocks:s.mu
func (s *tables) countL1(c *counter) error {
	if err := c.active(int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size)*8, "L1 table"); err != nil {
		return err
	}
	for i, e := s.l1.next(0); e != 0; i, e = s.l1.next(i + 1) {
		if c.l1Entry(e, 0); c.crowded() {
			return errTooBig
		}
	}
	return nil
}

// readL2 is that of references.
// +checklocks:s.mu
func (s *tables) readL2(r *blk.Req, tab int64, buf []byte) error {
	if err := s.readFile(r, blk.Buf(buf), tab); err != nil {
		return err
	}
	for o := int64(0); o < s.cs; o += s.slice {
		if t := s.l2.m[tab+o]; t != nil {
			copy(buf[o:], t.data)
		}
	}
	return nil
}

// takeL2 copies the dirty L2 slices and pins them.
// +checklocks:s.mu
func (s *tables) takeL2() []copied {
	out := make([]copied, 0, s.l2.ndirty)
	all := make([]byte, 0, s.l2.ndirty*s.l2.size)
	for _, t := range s.l2.dirty() {
		t.pins++
		n := len(all)
		all = append(all, t.data...)
		out = append(out, copied{off: t.off, data: all[n:len(all):len(all)], t: t, gen: t.gen})
	}
	return out
}

// takeL1 copies the dirty groups of L1 entries.
// +checklocks:s.mu
func (s *tables) takeL1() []copied {
	var out []copied
	for k := range s.l1Dirty {
		out = append(out, copied{
			off:  int64(s.hdr.L1TableOffset) + k*512,
			data: encodeEntries(s.l1.at, k, int64(s.hdr.L1Size)),
			l1:   k,
		})
	}
	clear(s.l1Dirty)
	return out
}

// +checklocks:s.mu
func (s *tables) checkCopies(r *blk.Req, l []copied, own overlap) error {
	for _, c := range l {
		if err := s.mayWrite(r, c.off, int64(len(c.data)), own); err != nil {
			return err
		}
		s.noteEnd(c.off + int64(len(c.data)))
	}
	return nil
}

// writeCopies writes them in the order of the package doc; due tells that a barrier is due before.
// It runs without mu.
func (s *tables) writeCopies(r *blk.Req, l2, l1 []copied, due bool) error {
	if err := s.flushData(r); err != nil {
		return err
	}
	if due && len(l2)+len(l1) > 0 {
		if err := s.file.Flush(r); err != nil {
			return err
		}
	}
	for i := 0; i < len(l2); {
		j, bufs := i+1, [][]byte{l2[i].data}
		for j < len(l2) && l2[j].off == l2[j-1].off+int64(len(l2[j-1].data)) {
			bufs = append(bufs, l2[j].data)
			j++
		}
		s.step(r, blk.EvL2Update)
		if err := s.file.WriteAt(r, blk.Bufs(bufs), l2[i].off, 0); err != nil {
			return err
		}
		i = j
	}
	if len(l1) > 0 {
		if err := s.file.Flush(r); err != nil {
			return err
		}
		for _, c := range l1 {
			s.step(r, blk.EvL1Update)
			if err := s.file.WriteAt(r, blk.Buf(c.data), c.off, 0); err != nil {
				return err
			}
		}
	}
	return s.file.Flush(r)
}

// clustersOf appends to list the clusters that entry e of an L1 table refers to: what the entries
// of its L2 table refer to, and then the table. It ends with the context of r.
// +checklocks:s.mu
func (s *tables) clustersOf(r *blk.Req, e uint64, list []int64) ([]int64, error) {
	tab := int64(e & layout.OffsetMask)
	if tab == 0 {
		return list, nil
	}
	buf := blk.GetBuf(int(s.cs), 0)
	defer blk.PutBuf(buf)
	if err := s.readL2(r, tab, buf.B); err != nil {
		return list, err
	}
	for k := int64(0); k < s.cs; k += 1 << s.eb {
		if k%(8*lookEvery) == 0 {
			if err := ended(r); err != nil {
				return list, err
			}
		}
		e := be.Uint64(buf.B[k:])
		off, n := s.geo.HostRange(e)
		if e&layout.Compressed == 0 && off&(s.cs-1) != 0 {
			continue // it refers to nothing, for a survey and a check, too
		}
		for c := off >> s.cb; c<<s.cb < off+n; c++ {
			list = append(list, c)
		}
	}
	return append(list, tab>>s.cb), nil
}

// vetL1 is called before all that an L1 table refers to is walked: each L2 table must lie in the
// file, and be referred to once. A survey finds others, but some images are too large for one, and
// a table to which 4 million entries refer would be walked for weeks.
// +checklocks:s.mu
func (s *tables) vetL1(r *blk.Req, l1 *entries) error {
	end := s.end()
	var tabs []int64
	for i, e := l1.next(0); e != 0; i, e = l1.next(i + 1) {
		tab := int64(e & layout.OffsetMask)
		switch {
		case tab == 0:
			continue
		case tab&(s.cs-1) != 0:
			return s.corrupt(r, tab, -1, "L2 table offset %s unaligned", hex(tab))
		case tab >= end:
			return s.corrupt(r, tab, s.cs, "L2 table offset %s beyond the end of the file", hex(tab))
		}
		tabs = append(tabs, tab)
	}
	slices.Sort(tabs)
	for i := 1; i < len(tabs); i++ {
		if tab := tabs[i]; tab == tabs[i-1] {
			return s.corrupt(r, tab, s.cs, "L2 table at %s is named by several entries of one L1 table", hex(tab))
		}
	}
	return nil
}

// allFits tells whether the L2 cache has place for the slices of the whole disk, as it does by
// default up to 256 GiB with clusters of 64 KiB: nothing has to be evicted then, however much is
// changed.
// +checklocks:s.mu
func (s *tables) allFits() bool {
	return int64(s.l2.max)*s.slice>>s.eb >= s.geo.Clusters(s.size.Load())
}

// +checklocks:s.mu
func (s *tables) makeCaches() {
	s.slice = s.set.slice
	s.l2 = newCache(int(s.slice), s.set.l2Tables)
	s.rb = newCache(int(s.cs), s.set.rbTables)
}
