package qcow2

import (
	"fmt"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// CheckResult is what a check of the whole image found.
type CheckResult struct {
	Corruptions int // references without a refcount, wrong flags, impossible entries
	Leaks       int // clusters that are counted but not referenced
	Fixed       int // of the corruptions
	LeaksFixed  int // of the leaks
	Errors      int // places that could not be repaired
	// Messages describe the first faults, for tests and logs.
	Messages []string
	// End is where the last cluster ends that is counted or referred to.
	End int64
	// Of the clusters of the disk: those that are allocated, do not lie behind the one before, and
	// are compressed.
	Allocated, Fragmented, Compressed int64
}

// mend is what a check repairs.
type mend uint8

const (
	mendNothing mend = iota
	mendLeaks        // refcounts that are too high
	mendAll
)

func (c *CheckResult) say(text string, v ...uint64) {
	if len(c.Messages) < 16 {
		m := text
		for _, x := range v {
			m += " " + hex(x).String()
		}
		c.Messages = append(c.Messages, m)
	}
}

// fault notes a corruption, stuck one that cannot be repaired.
func (c *CheckResult) fault(text string, v ...uint64) {
	c.Corruptions++
	c.say(text, v...)
}

func (c *CheckResult) stuck(text string, v ...uint64) {
	c.Errors++
	c.say(text, v...)
}

// Check looks the whole image over and changes nothing. On an image that is being written to,
// clusters that wait for a flush to be freed count as leaks. Requests that need metadata wait
// meanwhile; memory is bounded by the size of the file. Errors: what the file says where the check
// cannot go on.
func (d *Driver) Check(r *blk.Req) (*CheckResult, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.check(r, false)
}

// check counts all references and compares them with the refcounts. With fix, refcounts and copied
// flags are put right, what refers to places beyond the end of the file is dropped and, if nothing
// else is wrong, the dirty bit is cleared. An image whose header or tables lie over anything is
// left as it is (Errors). No requests may run. It ends with the context of r.
// +checklocks:s.mu
func (s *flusher) check(r *blk.Req, fix bool) (*CheckResult, error) {
	m := mendNothing
	if fix {
		m = mendAll
	}
	return s.checkAndMend(r, m, nil)
}

// checkAndMend is check that mends what m says; told, if not nil, hears how many bytes of tables
// were looked at, and of how many. Refcounts that are too high go down even if there is more that
// is wrong: nothing that can be found refers to those clusters so often.
// +checklocks:s.mu
func (s *flusher) checkAndMend(r *blk.Req, m mend, told func(done, all int64)) (*CheckResult, error) {
	res := &CheckResult{}
	c := s.newCounter(r, res)
	if err := s.countAll(c, told); err != nil {
		return res, err
	}
	fix := m == mendAll
	drop := s.badBlocks(c, fix)
	if fix {
		if s.cannotRepair(c); res.Errors > 0 {
			return res, nil
		}
		if err := s.makeBlocks(c, drop); err != nil {
			return res, err
		}
	}
	if err := s.compare(c, m); err != nil {
		return res, err
	}
	if fix {
		if err := s.dropStray(c); err != nil {
			return res, err
		}
	}
	// Where leaks were all that was wrong, flags that have become wrong with them are put right, too.
	flags := fix || m == mendLeaks && res.Corruptions+res.Errors == 0
	if _, err := s.copiedFlags(c, flags, 0); err != nil {
		return res, err
	}
	if m == mendNothing {
		return res, nil
	}
	s.freeIdx = 0
	if err := s.flush(r); err != nil {
		return res, err
	}
	if res.Errors > 0 || res.Corruptions > res.Fixed {
		return res, nil
	}
	return res, s.markSound(r)
}

// countAll counts all that the image refers to.
// +checklocks:s.mu
func (s *flusher) countAll(c *counter, told func(done, all int64)) error {
	if err := s.countMeta(c); err != nil {
		return err
	}
	// What waits to be freed is still counted.
	for _, f := range s.quarantine.limbo {
		for k, end := f.clusters(s.cb); k < end; k++ {
			c.t.add(k, 1, false)
		}
	}
	for done := false; !done; {
		if told != nil {
			told(int64(c.pos)<<s.cb, int64(len(c.tabs))<<s.cb)
		}
		var err error
		if done, err = c.step(16); err != nil {
			return err
		}
	}
	return nil
}

// markSound writes accurate refcounts and clears the bits that say that something is, or may be,
// wrong with the image. All else is flushed.
// +checklocks:s.mu
func (s *flusher) markSound(r *blk.Req) error {
	if err := s.syncRefcounts(r); err != nil {
		return err
	}
	const wrong = layout.IncompatDirty | layout.IncompatCorrupt
	if s.hdr.IncompatibleFeatures&wrong == 0 {
		return nil
	}
	return s.writeIncompat(r, s.hdr.IncompatibleFeatures&^wrong)
}

// cannotRepair notes what a repair could not write without writing over something else, or not
// drop.
// +checklocks:s.mu
func (s *flusher) cannotRepair(c *counter) {
	c.alone(0, s.cs, "header")
	c.alone(int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size)*8, "L1 table")
	c.alone(s.reftOffset(), s.reftSize*8, "refcount table")
	if s.hdr.NbSnapshots > 0 {
		off := int64(s.hdr.SnapshotsOffset)
		c.alone(off, s.snapEnd-off, "snapshot table")
	}
	for k, x := range c.l2 {
		_, stray := c.stray[k]
		switch {
		case c.t.get(k) > x.n:
			c.res.stuck("L2 table lies over something else at", uint64(k<<s.cb))
		case stray && (!x.active || x.n > 1):
			c.res.stuck("a shared L2 table has entries that point beyond the end of the file:", uint64(k<<s.cb))
		}
	}
}

// alone notes a table that lies over something else: a repair could not write to it.
func (c *counter) alone(off, size int64, what string) {
	for k := off >> c.s.cb; size > 0 && k <= (off+size-1)>>c.s.cb; k++ {
		if c.t.get(k) != 1 {
			c.res.stuck(what+" lies over something else, or beyond the end of the file, at", uint64(k<<c.s.cb))
			return
		}
	}
}

// badBlocks lists the entries of the refcount table whose blocks are impossible or lie over
// something else; with fix it takes them out of the count.
// +checklocks:s.mu
func (s *flusher) badBlocks(c *counter, fix bool) (drop []int64) {
	for i, e := range s.reft {
		off := int64(e & layout.ReftMask)
		if off == 0 {
			continue
		}
		bad := s.badBlock(c, off)
		if !bad && c.t.get(off>>s.cb) == 1 {
			continue
		}
		c.res.fault("impossible refcount block at", uint64(off))
		drop = append(drop, int64(i))
		if fix && !bad {
			c.t.take(off >> s.cb)
		}
	}
	return drop
}

// makeBlocks drops refcount blocks and makes those that are missing, in clusters that nothing
// refers to.
// +checklocks:s.mu
func (s *flusher) makeBlocks(c *counter, drop []int64) error {
	for _, i := range drop {
		off := int64(s.reftAt(i) & layout.ReftMask)
		c.res.Fixed++
		s.own(off, ownBlock, -1)
		s.rb.dropRange(s.geo.RoundDown(off), s.cs)
		s.setReft(i, 0)
	}
	s.freeIdx, s.mending = 0, c
	defer func() { s.mending = nil }()
	bits := s.geo.RefblockBits()
	last := int64(-1)
	for _, p := range c.t.order() {
		if err := ended(c.r); err != nil {
			return err
		}
		for k := p << tallyBits; k < (p+1)<<tallyBits; k++ {
			if k>>bits == last || c.t.get(k) == 0 {
				continue
			}
			if err := s.cover(c.r, k, 1); err != nil {
				return err
			}
			last = k >> bits
		}
	}
	return nil
}

// compare compares refcounts with references.
// +checklocks:s.mu
func (s *flusher) compare(c *counter, m mend) error {
	fix := m == mendAll
	bits := s.geo.RefblockBits()
	for b := int64(0); b < int64(len(s.reft)); b++ {
		if err := ended(c.r); err != nil {
			return err
		}
		off := int64(s.reftAt(b) & layout.ReftMask)
		if off == 0 || s.badBlock(c, off) || !fix && c.t.get(off>>s.cb) > 1 {
			continue
		}
		t, err := s.refblock(c.r, b)
		if err != nil {
			return err
		}
		if err := s.compareBlock(c, t, b<<bits, 1<<bits, m); err != nil {
			return err
		}
	}
	if fix {
		return nil
	}
	for _, p := range c.t.order() {
		for k := p << tallyBits; k < (p+1)<<tallyBits; k++ {
			off := int64(s.reftAt(k>>bits) & layout.ReftMask)
			if c.t.get(k) > 0 && (off == 0 || s.badBlock(c, off)) {
				c.res.fault("no refcount block for cluster", uint64(k))
				c.sees(k)
			}
		}
	}
	return nil
}

// compareBlock compares what refcount block t says of n clusters from first.
// +checklocks:s.mu
func (s *flusher) compareBlock(c *counter, t *table, first, n int64, m mend) error {
	for i := range n {
		have, want := s.geo.Refcount(t.data, i), c.t.get(first+i)
		if have|want != 0 {
			c.sees(first + i)
		}
		if have == want {
			continue
		}
		if have > want {
			c.res.Leaks++
			c.res.say("leaked cluster, refcount, references", uint64(first+i), have, want)
		} else {
			c.res.fault("refcount too low: cluster, refcount, references", uint64(first+i), have, want)
		}
		switch {
		case m == mendNothing || m == mendLeaks && have < want:
			continue
		case want > s.geo.RefcountMax():
			c.res.Errors++
			continue
		case have < want:
			c.res.Fixed++
		default:
			c.res.LeaksFixed++
		}
		s.geo.SetRefcount(t.data, i, want)
		s.rb.markDirty(t)
	}
	return nil
}

// sees notes that cluster k, if it lies in the file, is counted or referred to.
func (c *counter) sees(k int64) {
	if k<<c.s.cb < c.end {
		c.res.End = max(c.res.End, (k+1)<<c.s.cb)
	}
}

// dropStray drops what points beyond the end of the file: there is nothing, and what is allocated
// there later belongs to others.
// +checklocks:s.mu
func (s *flusher) dropStray(c *counter) error {
	for li, e := s.l1.next(0); e != 0; li, e = s.l1.next(li + 1) {
		tab := int64(e & layout.OffsetMask)
		if tab == 0 || tab&(s.cs-1) != 0 {
			continue
		}
		if c.beyond(tab, s.cs) {
			s.setL1(li, 0)
			s.own(tab, ownL2, -1)
			c.res.Fixed++
			continue
		}
		if _, ok := c.stray[tab>>s.cb]; !ok {
			continue
		}
		for gc := li << s.geo.L2Bits(); gc < (li+1)<<s.geo.L2Bits(); gc++ {
			err := ended(c.r)
			if err == nil && s.l2Index(gc) == 0 {
				err = s.room(c.r)
			}
			if err != nil {
				return err
			}
			t, err := s.loadSlice(c.r, gc)
			if err != nil {
				return err
			}
			if c.beyond(s.geo.HostRange(s.entry(t, s.l2Index(gc)))) {
				s.setCell(t, s.l2Index(gc), s.zeroed(0)) // only images of version 3 are dirty
				c.res.Fixed++
			}
		}
	}
	return nil
}

// copiedFlags compares the copied flags of the active tables with the refcounts: those of the L1
// entries before behind (0: of all), and of what they refer to. at is the entry behind the last one
// that it looked at.
// +checklocks:s.mu
func (s *flusher) copiedFlags(c *counter, fix bool, behind int64) (at int64, _ error) {
	buf := make([]byte, s.cs)
	seen := map[int64]struct{}{}
	for li, e := s.l1.next(0); e != 0; li, e = s.l1.next(li + 1) {
		if behind > 0 && li >= behind {
			break
		}
		tab := int64(e & layout.OffsetMask)
		if tab == 0 || tab&(s.cs-1) != 0 || tab >= c.end {
			continue
		}
		if err := ended(c.r); err != nil {
			return at, err
		}
		at = li + 1
		wrong, err := s.wrongFlag(c, e, tab, "L1 entry's copied flag is wrong")
		if err != nil {
			return at, err
		}
		if wrong && fix {
			s.setL1(li, e^layout.Copied)
			c.res.Fixed++
		}
		if _, twice := seen[tab]; twice {
			continue
		}
		seen[tab] = struct{}{}
		if err := s.readL2(c.r, tab, buf); err != nil {
			return at, err
		}
		if err := s.copiedFlagsOf(c, fix, buf, li<<s.geo.L2Bits()); err != nil {
			return at, err
		}
	}
	return at, nil
}

// copiedFlagsOf is copiedFlags for the L2 table in buf, which maps guest clusters from first on.
// +checklocks:s.mu
func (s *flusher) copiedFlagsOf(c *counter, fix bool, buf []byte, first int64) error {
	for i := int64(0); i < s.cs>>s.eb; i++ {
		if i%lookEvery == lookEvery-1 {
			if err := ended(c.r); err != nil {
				return err
			}
		}
		x := be.Uint64(buf[i<<s.eb:])
		k, off := s.geo.KindOf(x), int64(x&layout.OffsetMask)
		if k != layout.Normal && k != layout.ZeroAlloc || off&(s.cs-1) != 0 || s.geo.External {
			continue
		}
		wrong, err := s.wrongFlag(c, x, off, "L2 entry's copied flag is wrong")
		if err != nil {
			return err
		}
		if !wrong || !fix {
			continue
		}
		if err := s.room(c.r); err != nil {
			return err
		}
		t, err := s.loadSlice(c.r, first+i)
		if err != nil {
			return err
		}
		s.setEntry(t, s.l2Index(first+i), x^layout.Copied)
		c.res.Fixed++
	}
	return nil
}

// wrongFlag tells, and notes, that the copied flag of entry e, which refers to the cluster at off,
// is not as its refcount says.
// +checklocks:s.mu
func (s *flusher) wrongFlag(c *counter, e uint64, off int64, text string) (bool, error) {
	n, err := s.refcount(c.r, off>>s.cb)
	if err != nil || (n == 1) == (e&layout.Copied != 0) {
		return false, err
	}
	c.res.fault(text, e)
	return true, nil
}

// repair puts a dirty image right, and says in the log what that came to.
// +checklocks:s.mu
func (s *flusher) repair(r *blk.Req) (*CheckResult, error) {
	res, err := s.check(r, true)
	what := fmt.Sprintf("%d clusters were leaked, %d faults found, %d of them mended",
		res.Leaks, res.Corruptions, res.Fixed)
	if len(res.Messages) > 0 {
		what += "; the first: " + res.Messages[0]
	}
	switch {
	case err != nil:
		s.warnf("Repairing the image, which was not closed, has failed: %s", blk.ErrnoText(err))
	case res.Errors > 0:
		s.warnf("The image, which was not closed, cannot be repaired: %s", what)
	default:
		s.warnf("The image was not closed and has been repaired: %s", what)
	}
	return res, err
}
