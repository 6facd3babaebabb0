package qcow2

import (
	"qblockd/blockdev/qcow2/layout"
	"qblockd/graph/blk"
)

// CheckResult is what a check of the whole image found.
type CheckResult struct {
	Corruptions int // references without a refcount, wrong flags, impossible entries
	Leaks       int // clusters that are counted but not referenced
	Fixed       int // of both
	Errors      int // places that could not be read or repaired
	// Messages describe the first faults, for tests and logs.
	Messages []string
}

func (c *CheckResult) say(text string, v ...uint64) {
	if len(c.Messages) < 16 {
		m := text
		for _, x := range v {
			m += " " + hex(x)
		}
		c.Messages = append(c.Messages, m)
	}
}

// tally counts references per cluster; pages are made where references are.
type tally struct{ pages map[int64]*[1024]uint32 }

func (t *tally) get(c int64) uint64 {
	if p := t.pages[c>>10]; p != nil {
		return uint64(p[c&1023])
	}
	return 0
}

func (t *tally) inc(c int64) {
	p := t.pages[c>>10]
	if p == nil {
		p = new([1024]uint32)
		t.pages[c>>10] = p
	}
	p[c&1023]++
}

// checker is one run over an image.
type checker struct {
	s   *image
	r   *blk.Req
	t   tally
	res *CheckResult
	end int64 // of the file
}

// ref counts the references of [off, off+n). Places more than a cluster beyond the end of
// the file are impossible, which also bounds the memory that a check takes.
func (c *checker) ref(off, n int64, what string) bool {
	if n == 0 {
		return true
	}
	if off < 0 || n < 0 || off+n-c.end >= c.s.cs {
		c.res.Corruptions++
		c.res.say(what+" beyond the end of the file at", uint64(off))
		return false
	}
	for k := off >> c.s.cb; k <= (off+n-1)>>c.s.cb; k++ {
		c.t.inc(k)
	}
	return true
}

// walk counts all references.
func (c *checker) walk() error {
	s := c.s
	c.t.pages = map[int64]*[1024]uint32{}
	c.end = max(s.file.Size(), s.fileEnd) // clusters may be allocated but not written yet
	c.ref(0, s.cs, "header")
	if err := c.walkL1(&s.l1, int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size), true); err != nil {
		return err
	}
	for i := range s.snaps {
		sn := &s.snaps[i]
		if layout.CheckTable(sn.L1TableOffset, uint64(sn.L1Size), 8, layout.MaxL1Bytes, uint64(s.cs), "") != nil {
			c.res.Corruptions++
			c.res.say("snapshot's L1 table at", sn.L1TableOffset)
			continue
		}
		l1, err := s.readTable(c.r, int64(sn.L1TableOffset), int64(sn.L1Size))
		if err != nil {
			return err
		}
		if err := c.walkL1(&l1, int64(sn.L1TableOffset), int64(sn.L1Size), false); err != nil {
			return err
		}
	}
	c.ref(int64(s.hdr.SnapshotsOffset), s.snapEnd-int64(s.hdr.SnapshotsOffset), "snapshot table")
	c.ref(s.reftOffset(), s.reftSize*8, "refcount table")
	for _, e := range s.reft {
		if off := int64(e & layout.ReftMask); off != 0 && !c.badBlock(off) {
			c.t.inc(off >> s.cb)
		}
	}
	return c.walkBitmaps()
}

// badBlock tells whether the refcount block at off cannot be one.
func (c *checker) badBlock(off int64) bool {
	return off&(c.s.cs-1) != 0 || off < 0 || off >= c.end
}

func (c *checker) walkL1(l1 *entries, off, n int64, active bool) error {
	c.ref(off, n*8, "L1 table")
	buf := make([]byte, c.s.cs)
	for _, e := range l1.all() {
		tab := int64(e & layout.OffsetMask)
		if tab == 0 {
			continue
		}
		if tab&(c.s.cs-1) != 0 {
			c.res.Corruptions++
			c.res.say("unaligned L2 table at", uint64(tab))
			continue
		}
		if !c.ref(tab, c.s.cs, "L2 table") {
			continue
		}
		if err := c.s.readL2(c.r, tab, buf); err != nil {
			return err
		}
		for k := 0; k < len(buf); k += 8 {
			c.entry(be.Uint64(buf[k:]), active)
		}
	}
	return nil
}

// entry counts what an L2 entry refers to.
func (c *checker) entry(e uint64, active bool) {
	s := c.s
	switch k := layout.KindOf(e); {
	case k == layout.CompressedKind:
		if e&layout.Copied != 0 && active {
			c.res.Corruptions++
			c.res.say("compressed entry with the copied flag", e)
		}
		off, n := s.geo.CompressedRange(e &^ layout.Copied)
		c.ref(off, n, "compressed cluster")
	case k.HasHost():
		off := int64(e & layout.OffsetMask)
		if off&(s.cs-1) != 0 {
			c.res.Corruptions++
			c.res.say("unaligned cluster at", uint64(off))
			return
		}
		c.ref(off, s.cs, "cluster")
	}
}

// readL2 reads a whole L2 table as it is now, changes in the cache included.
func (s *image) readL2(r *blk.Req, tab int64, buf []byte) error {
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

// walkBitmaps counts directory, tables and data of persistent bitmaps.
func (c *checker) walkBitmaps() error {
	b := c.s.ext.Bitmaps
	if b == nil {
		return nil
	}
	off, n := int64(b.DirectoryOffset), int64(b.DirectorySize)
	if !c.ref(off, n, "bitmap directory") {
		return nil
	}
	n = min(n, max(0, c.end-off))
	dir := make([]byte, n)
	if err := c.s.readFile(c.r, blk.Buf(dir), off); err != nil {
		return err
	}
	for i := uint32(0); i < b.NbBitmaps && len(dir) >= 24; i++ {
		tab, entries := int64(be.Uint64(dir)), int64(be.Uint32(dir[8:]))
		if c.ref(tab, entries*8, "bitmap table") {
			t, err := c.s.readTable(c.r, tab, entries)
			if err != nil {
				return err
			}
			for _, e := range t.all() {
				if o := int64(e & layout.OffsetMask); o != 0 {
					c.ref(o, c.s.cs, "bitmap data")
				}
			}
		}
		used := (24 + int64(be.Uint32(dir[20:])) + int64(be.Uint16(dir[18:])) + 7) &^ 7
		dir = dir[min(used, int64(len(dir))):]
	}
	return nil
}

// check counts all references and compares them with the refcounts. With fix, refcounts and
// copied flags are put right and, if nothing else is wrong, the dirty bit is cleared. No
// requests may run; mu is held.
func (s *image) check(r *blk.Req, fix bool) (*CheckResult, error) {
	res := &CheckResult{}
	c := &checker{s: s, r: r, res: res}
	if err := c.walk(); err != nil {
		return res, err
	}
	if fix {
		if err := c.makeBlocks(); err != nil {
			return res, err
		}
	} else {
		for _, e := range s.reft {
			if off := int64(e & layout.ReftMask); off != 0 && c.badBlock(off) {
				res.Corruptions++
				res.say("impossible refcount block at", uint64(off))
			}
		}
	}
	if err := c.compare(fix); err != nil {
		return res, err
	}
	if err := c.copiedFlags(fix); err != nil {
		return res, err
	}
	if !fix {
		return res, nil
	}
	s.freeIdx = 0
	if err := s.flush(r); err != nil {
		return res, err
	}
	if res.Errors > 0 || res.Corruptions > res.Fixed {
		return res, nil
	}
	return res, s.markClean(r)
}

// makeBlocks drops impossible refcount blocks and makes those that are missing, in clusters
// that nothing refers to.
func (c *checker) makeBlocks() error {
	s := c.s
	seen := map[int64]bool{}
	for i, e := range s.reft {
		off := int64(e & layout.ReftMask)
		if off == 0 {
			continue
		}
		if c.badBlock(off) || seen[off] || c.t.get(off>>s.cb) > 1 {
			c.res.Corruptions++
			c.res.Fixed++
			s.own(off, ownBlock, -1)
			s.rb.dropRange(s.geo.RoundDown(off), s.cs)
			s.setReft(int64(i), 0)
		}
		seen[off] = true
	}
	s.freeIdx = 0
	s.busy = func(k int64) bool { return c.t.get(k) > 0 }
	defer func() { s.busy = nil }()
	for again := true; again; {
		again = false
		quiet := CheckResult{}
		w := checker{s: s, r: c.r, res: &quiet}
		if err := w.walk(); err != nil {
			return err
		}
		c.t = w.t
		for p := range c.t.pages {
			for k := p << 10; k < (p+1)<<10; k++ {
				if c.t.get(k) == 0 {
					continue
				}
				made, err := s.coverRun(c.r, k, 1)
				if err != nil {
					return err
				}
				again = again || made
				if made {
					break
				}
			}
		}
	}
	return nil
}

// compare compares refcounts with references.
func (c *checker) compare(fix bool) error {
	s := c.s
	bits := s.geo.RefblockBits()
	for b := int64(0); b < int64(len(s.reft)); b++ {
		if off := int64(s.reftAt(b) & layout.ReftMask); off == 0 || c.badBlock(off) {
			continue
		}
		t, err := s.refblock(c.r, b)
		if err != nil {
			return err
		}
		for i := int64(0); i < 1<<bits; i++ {
			k := b<<bits + i
			have, want := s.geo.Refcount(t.data, i), c.t.get(k)
			if have == want {
				continue
			}
			if have > want {
				c.res.Leaks++
			} else {
				c.res.Corruptions++
				c.res.say("refcount too low: cluster, refcount, references", uint64(k), have, want)
			}
			if !fix {
				continue
			}
			if want > s.geo.RefcountMax() {
				c.res.Errors++
				continue
			}
			s.geo.SetRefcount(t.data, i, want)
			s.rb.markDirty(t)
			if have < want {
				c.res.Fixed++
			}
		}
	}
	if fix {
		return nil
	}
	for p := range c.t.pages {
		for k := p << 10; k < (p+1)<<10; k++ {
			off := int64(s.reftAt(k>>bits) & layout.ReftMask)
			if c.t.get(k) > 0 && (off == 0 || c.badBlock(off)) {
				c.res.Corruptions++
				c.res.say("no refcount block for cluster", uint64(k))
			}
		}
	}
	return nil
}

// copiedFlags compares the copied flags of the active tables with the refcounts.
func (c *checker) copiedFlags(fix bool) error {
	s := c.s
	buf := make([]byte, s.cs)
	for li, e := range s.l1.all() {
		tab := int64(e & layout.OffsetMask)
		if tab == 0 || tab&(s.cs-1) != 0 || tab >= c.end {
			continue
		}
		ok, err := c.copiedRight(e, tab)
		if err != nil {
			return err
		}
		if !ok {
			c.flagFault(fix, "L1 entry's copied flag is wrong", e)
			if fix {
				s.setL1(li, e^layout.Copied)
			}
		}
		if err := s.readL2(c.r, tab, buf); err != nil {
			return err
		}
		for i := int64(0); i < s.cs/8; i++ {
			x := be.Uint64(buf[8*i:])
			k := layout.KindOf(x)
			off := int64(x & layout.OffsetMask)
			if k != layout.Normal && k != layout.ZeroAlloc || off&(s.cs-1) != 0 {
				continue
			}
			ok, err := c.copiedRight(x, off)
			if err != nil {
				return err
			}
			if ok {
				continue
			}
			c.flagFault(fix, "L2 entry's copied flag is wrong", x)
			if fix {
				if err := s.room(c.r); err != nil {
					return err
				}
				gc := li<<s.geo.L2Bits() + i
				t, err := s.loadSlice(c.r, gc)
				if err != nil {
					return err
				}
				s.setEntry(t, s.l2Index(gc), x^layout.Copied)
			}
		}
	}
	return nil
}

func (c *checker) flagFault(fix bool, text string, e uint64) {
	c.res.Corruptions++
	if fix {
		c.res.Fixed++
	}
	c.res.say(text, e)
}

func (c *checker) copiedRight(e uint64, off int64) (bool, error) {
	n, err := c.s.refcount(c.r, off>>c.s.cb)
	return (n == 1) == (e&layout.Copied != 0), err
}
