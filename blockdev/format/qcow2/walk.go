package qcow2

import (
	"fmt"
	"maps"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// counter counts all references of an image: first those of the header and of contiguous tables
// (fixed), then, table by table, those of L2 tables. What it does is bounded by the file: a table
// counts once, however many name it.
type counter struct {
	s   *surveyor
	r   *blk.Req
	t   tally
	res *CheckResult
	end int64 // of the file
	all bool  // references beyond the end count, too

	l2   map[int64]l2ref // by cluster
	tabs []int64         // the keys, in order; made by countMeta
	pos  int             // so many of them are walked
	left int64           // clusters that tables may still take: they cannot lie over each other
	most int64           // bytes that contiguous tables may take, and the tally
	buf  []byte

	tables int64 // bytes that contiguous tables take
	// badSnaps and badBitmaps are snapshots, by index, and bitmaps that lead nowhere.
	badSnaps   map[int]bool
	badBitmaps map[*stored]bool
	// stray are L2 tables with entries that point beyond the end, which a repair has to put right.
	stray map[int64]struct{}
}

// maxTally is what counting references may take in memory: enough for 48 TiB of data in clusters of
// the default size.
const maxTally = 1 << 30

// errTables: the file has no room for all contiguous tables, or one that is needed is not in it.
var errTables error = fmt.Errorf("tables of metadata lie over each other, or beyond the end of the file: %w", errIO)

// l2ref is what refers to an L2 table.
type l2ref struct {
	n      uint64 // L1 entries
	of     int32  // the L1 table of the last one: 0 the active one, i+1 that of snapshot i
	active bool
	walked bool
}

// +checklocks:s.mu
func (s *surveyor) newCounter(r *blk.Req, res *CheckResult) *counter {
	c := &counter{s: s, r: r, res: res, t: newTally(), l2: map[int64]l2ref{}, stray: map[int64]struct{}{}}
	c.badSnaps, c.badBitmaps = map[int]bool{}, map[*stored]bool{}
	c.end = s.end()
	c.left, c.most = s.geo.Clusters(c.end)+16, maxTally
	return c
}

// ref counts n references to the clusters that [off, off+size) touches. It returns false if that is
// a cluster or more beyond the end of the file, which is impossible; then it counts only if all do.
func (c *counter) ref(off, size int64, n uint64, sole bool, what string) bool {
	if size == 0 {
		return true
	}
	ok := true
	if off < 0 || size < 0 || c.beyond(off, size) {
		c.res.fault(what+" beyond the end of the file at", uint64(off))
		if !c.all {
			return false
		}
		ok = false
	}
	for k := off >> c.s.cb; k <= (off+size-1)>>c.s.cb; k++ {
		c.t.add(k, n, sole)
	}
	return ok
}

// beyond tells whether a cluster or more of [off, off+n) lies beyond the end of the file.
func (c *counter) beyond(off, n int64) bool { return off+n-c.end >= c.s.cs }

// fixed counts a contiguous table, which nothing else may lie in. One that lies beyond the end does
// not count: ok is false then.
func (c *counter) fixed(off, size int64, what string) (ok bool, err error) {
	if size == 0 {
		return true, nil
	}
	if off < 0 || size < 0 || off > c.end || size > c.end-off+c.s.cs-1 {
		c.res.fault(what+" beyond the end of the file at", uint64(off))
		return false, nil
	}
	first, last := off>>c.s.cb, (off+size-1)>>c.s.cb
	if c.left -= last - first + 1; c.left < 0 {
		c.res.fault("tables lie over each other, one of them at", uint64(off))
		return false, errTables
	}
	if c.tables += size; c.tables > c.most {
		return false, errTooBig
	}
	for k := first; k <= last; k++ {
		c.t.add(k, 1, true)
	}
	return true, nil
}

// active is fixed for tables that are written in place: before a write they must be there.
func (c *counter) active(off, size int64, what string) error {
	ok, err := c.fixed(off, size, what)
	if err == nil && !ok && c.all {
		err = errTables
	}
	return err
}

// countMeta counts all but what L2 tables refer to.
// +checklocks:s.mu
func (s *surveyor) countMeta(c *counter) error {
	if err := c.active(0, s.cs, "header"); err != nil {
		return err
	}
	if err := s.above.countL1(c); err != nil {
		return err
	}
	if err := c.active(s.reftOffset(), s.reftSize*8, "refcount table"); err != nil {
		return err
	}
	for _, e := range s.reft {
		if off := int64(e & layout.ReftMask); off != 0 && !s.badBlock(c, off) {
			if c.t.add(off>>s.cb, 1, true); c.crowded() {
				return errTooBig
			}
		}
	}
	if k := s.ext.Crypto; k != nil {
		if err := c.active(int64(k.Offset), int64(k.Length), "encryption header"); err != nil {
			return err
		}
	}
	if err := s.above.countSnapshots(c); err != nil {
		return err
	}
	if err := s.above.countBitmaps(c); err != nil {
		return err
	}
	c.tabs = slices.Sorted(maps.Keys(c.l2))
	return nil
}

// badBlock tells that there cannot be a refcount block at off.
// +checklocks:s.mu
func (s *surveyor) badBlock(c *counter, off int64) bool {
	return off&(s.cs-1) != 0 || off < 0 || off >= max(c.end, s.fileEnd)
}

// crowded tells whether what is known of references takes more memory than it may.
func (c *counter) crowded() bool {
	const each = 64 // bytes in l2 and tabs
	return max(int64(len(c.l2))*each, c.t.bytes()) > c.most
}

// l1Entry counts the L2 table that entry e of an L1 table refers to; of is as in l2ref.
func (c *counter) l1Entry(e uint64, of int32) {
	tab := int64(e & layout.OffsetMask)
	if e&^(layout.OffsetMask|layout.Copied) != 0 || tab == 0 {
		c.res.fault("impossible L1 entry", e)
	}
	if tab == 0 {
		return
	}
	if tab&(c.s.cs-1) != 0 {
		c.res.fault("unaligned L2 table at", uint64(tab))
		return
	}
	k := tab >> c.s.cb
	x := c.l2[k]
	// An L1 table refers to an L2 table once at most.
	sole := of == 0 && e&layout.Copied != 0 || x.n > 0 && x.of == of || of == 0 && x.active
	if !c.ref(tab, c.s.cs, 1, sole, "L2 table") {
		if of != 0 {
			c.res.Errors++ // a repair cannot drop it
		}
		if !c.all {
			return
		}
	}
	x.n++
	x.of, x.active = of, x.active || of == 0
	c.l2[k] = x
}

// step walks up to n further L2 tables; done tells that none is left.
func (c *counter) step(n int) (done bool, err error) {
	for ; n > 0 && c.pos < len(c.tabs); n-- {
		if err := ended(c.r); err != nil {
			return false, err
		}
		if err := c.walkTable(c.tabs[c.pos]); err != nil {
			return false, err
		}
		c.pos++
	}
	return c.pos >= len(c.tabs), nil
}

// walkTable counts what the entries of the L2 table in cluster k refer to.
func (c *counter) walkTable(k int64) error {
	x := c.l2[k]
	if x.walked {
		return nil
	}
	if c.crowded() {
		return errTooBig
	}
	if c.buf == nil {
		c.buf = make([]byte, c.s.cs)
	}
	if err := c.s.above.readL2(c.r, k<<c.s.cb, c.buf); err != nil {
		return err
	}
	x.walked = true
	c.l2[k] = x
	next := int64(0)
	for i := 0; i < len(c.buf); i += 1 << c.s.eb {
		e := be.Uint64(c.buf[i:])
		if e != 0 && !c.entry(e, x.n, x.active) {
			c.stray[k] = struct{}{}
		}
		if x.active {
			next = c.layOut(e, next)
		}
		if c.s.geo.Extended && !c.s.geo.Possible(e, be.Uint64(c.buf[i+8:])) {
			c.res.fault("impossible bitmap of subclusters, entry", e)
		}
	}
	return nil
}

// layOut notes, of entry e of the active disk, where its cluster lies: behind next, where the one
// before it in the table ends, or not. It returns where its own ends.
func (c *counter) layOut(e uint64, next int64) int64 {
	off := int64(e & layout.OffsetMask)
	switch k := c.s.geo.KindOf(e); {
	case k == layout.CompressedKind: // in pieces by nature
		c.res.Allocated++
		c.res.Compressed++
		c.res.Fragmented++
		return next
	case !k.HasHost():
		return next
	}
	c.res.Allocated++
	if next != 0 && off != next {
		c.res.Fragmented++
	}
	return off + c.s.cs
}

// entry counts n times what an L2 entry refers to. It returns false if that is beyond the end of
// the file.
func (c *counter) entry(e uint64, n uint64, active bool) bool {
	sole := active && e&layout.Copied != 0
	off, size := c.s.geo.HostRange(e)
	switch {
	case c.s.geo.External && e&layout.Compressed != 0:
		c.res.fault("compressed entry where data are in another file:", e)
		return true
	case e&layout.Compressed == 0 && e&c.s.geo.Reserved() != 0:
		c.res.fault("entry with reserved bits", e)
	}
	switch {
	case size == 0:
		return true
	case e&layout.Compressed != 0:
		if sole {
			c.res.fault("compressed entry with the copied flag", e)
		}
		return c.ref(off, size, n, false, "compressed cluster")
	case off&(c.s.cs-1) != 0:
		c.res.fault("unaligned cluster at", uint64(off))
		return true
	}
	return c.ref(off, size, n, sole, "cluster")
}
