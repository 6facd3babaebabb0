package hostile

import (
	"fmt"
	"io"

	"qblockd/blockdev/format/qcow2/layout"
)

// use is what a cluster of the file is used as.
type use uint16

const (
	useHeader use = 1 << iota
	useReftable
	useRefblock
	useL1
	useL2
	useSnapshots
	useDirectory
	useSnapshotL1
	useSnapshotL2
	useBitmap
	useData
	useSnapshotData

	shared = useData | useSnapshotData
	tables = useL2 | useSnapshotL2
)

// Health is what can be expected of a part of the disk.
type Health int

const (
	Sound     Health = iota
	Uncounted        // sound but for a refcount of 0, or a place behind the end of the file
	Tangled          // less is counted than refers to it
	Unusable         // a table lies there, too, or the entry cannot be followed
)

// Report is what an inspection of an image says. It is a second opinion: simple, slow, and made
// without the driver.
type Report struct {
	Parsed      bool
	Dirty       bool
	Corruptions []string // as check counts them; some of them, if there are many

	h      *layout.Header
	g      layout.Geometry
	f      io.ReaderAt
	length int64
	refs   map[int64]int
	uses   map[int64]use
	reft   []uint64
	lost   bool // nothing can be expected: what everything rests on is damaged
	least  Health
	walked int
	looked int64
	disk   map[int64]Health // by guest cluster; those not there are sound
	blocks map[int64][]byte
}

const (
	mostTables  = 3000    // L2 tables that are looked at
	mostJudged  = 8       // L2 tables of the disk that are judged entry by entry: what the cases read is in the first few
	mostEntries = 1 << 22 // of a table
	mostLooked  = 3 << 20 // of all tables
)

// Inspect looks at an image.
func Inspect(f io.ReaderAt, length int64) *Report {
	r := &Report{f: f, length: length, refs: map[int64]int{}, uses: map[int64]use{}, disk: map[int64]Health{},
		blocks: map[int64][]byte{}}
	head := r.read(0, layout.HeaderSize)
	cs, err := layout.Peek(head)
	if err != nil {
		return r
	}
	cluster := r.read(0, int64(cs))
	h, err := layout.Parse(cluster, false)
	if err != nil {
		return r
	}
	x, err := h.ParseExtensions(cluster)
	if err != nil {
		return r
	}
	r.h, r.g, r.Parsed = h, h.Geometry(), true
	r.Dirty = h.IncompatibleFeatures&layout.IncompatDirty != 0
	r.walk(x)
	r.judge()
	return r
}

// read returns n bytes at off, zeroes behind the end.
func (r *Report) read(off, n int64) []byte {
	p := make([]byte, n)
	if off >= 0 && off < r.length {
		if _, err := r.f.ReadAt(p[:min(n, r.length-off)], off); err != nil && err != io.EOF {
			r.lost = true
		}
	}
	return p
}

func (r *Report) bad(format string, args ...any) {
	if len(r.Corruptions) < 20 {
		r.Corruptions = append(r.Corruptions, fmt.Sprintf(format, args...))
	}
}

// add counts a reference to n bytes at off.
func (r *Report) add(off, n int64, u use) {
	if n <= 0 {
		return
	}
	for c := off >> r.g.ClusterBits; c <= (off+n-1)>>r.g.ClusterBits; c++ {
		r.refs[c]++
		r.uses[c] |= u
	}
}

// entries reads a table of n entries; what lies behind the end of the file are zeroes and left out.
func (r *Report) entries(off, n int64) []uint64 {
	n = min(n, (r.length-off+7)/8, mostEntries)
	if n <= 0 || off < 0 {
		return nil
	}
	if r.looked += n; r.looked > mostLooked {
		r.lost = true
		return nil
	}
	b := r.read(off, n*8)
	t := make([]uint64, n)
	for i := range t {
		t[i] = be.Uint64(b[i*8:])
	}
	return t
}

func (r *Report) aligned(off uint64) bool { return off&uint64(r.g.ClusterSize()-1) == 0 }

func (r *Report) walk(x *layout.Extensions) {
	cs := r.g.ClusterSize()
	r.add(0, cs, useHeader)
	r.add(int64(r.h.RefcountTableOffset), int64(r.h.RefcountTableClusters)*cs, useReftable)
	r.reft = r.entries(int64(r.h.RefcountTableOffset), int64(r.h.RefcountTableClusters)*cs/8)
	for i, e := range r.reft {
		off := e & layout.ReftMask
		switch {
		case off == 0:
		case !r.aligned(off) || off >= 1<<layout.MaxHostBits || e&^layout.ReftMask != 0:
			r.bad("refcount table entry %d is %#x", i, e)
			r.reft[i] = 0
		default:
			r.add(int64(off), cs, useRefblock)
			if int64(off) >= r.length {
				r.bad("refcount block %d lies behind the end", i)
			}
		}
	}
	r.l1(int64(r.h.L1TableOffset), int64(r.h.L1Size), useL1, useL2, useData)
	r.snapshots()
	if x.Bitmaps != nil {
		r.bitmaps(x.Bitmaps)
	}
}

func (r *Report) l1(off, n int64, u1, u2, ud use) {
	r.add(off, n*8, u1)
	for i, e := range r.entries(off, n) {
		l2 := e & layout.OffsetMask
		if l2 == 0 {
			continue
		}
		if r.walked++; r.walked > mostTables {
			r.lost = true
			return
		}
		if !r.aligned(l2) {
			r.bad("L1 entry %d is %#x", i, e)
			continue
		}
		r.add(int64(l2), r.g.ClusterSize(), u2)
		if int64(l2) >= r.length {
			r.bad("an L2 table lies behind the end")
		}
		for k, e := range r.entries(int64(l2), r.g.ClusterSize()/8) {
			if r.lost {
				return
			}
			if r.g.Extended && k%2 == 1 {
				continue // bits
			}
			switch k := r.g.KindOf(e); k {
			case layout.CompressedKind:
				at, n := r.g.CompressedRange(e)
				r.add(at, n, ud)
			case layout.Normal, layout.ZeroAlloc:
				if r.aligned(e & layout.OffsetMask) {
					r.add(int64(e&layout.OffsetMask), r.g.ClusterSize(), ud)
				} else {
					r.bad("an L2 entry is %#x", e)
				}
			}
		}
	}
}

func (r *Report) snapshots() {
	off := int64(r.h.SnapshotsOffset)
	start := off
	for i := range int(r.h.NbSnapshots) {
		if off >= r.length || i > 1000 {
			r.bad("the snapshot table is longer than the file")
			r.lost = true
			break
		}
		b := r.read(off, snapshotHeader)
		l1, entries, extra := be.Uint64(b), be.Uint32(b[8:]), int64(be.Uint32(b[36:]))
		if extra > 1024 {
			r.bad("snapshot %d is longer than it can be", i)
			r.lost = true
			break
		}
		if !r.aligned(l1) || l1 > 1<<62 || entries > layout.MaxL1Bytes/8 {
			r.bad("snapshot %d has no L1 table", i)
		} else {
			r.l1(int64(l1), int64(entries), useSnapshotL1, useSnapshotL2, useSnapshotData)
		}
		off += (snapshotHeader + extra + int64(be.Uint16(b[12:])) + int64(be.Uint16(b[14:])) + 7) &^ 7
	}
	r.add(start, off-start, useSnapshots)
}

func (r *Report) bitmaps(x *layout.Bitmaps) {
	if int64(x.DirectoryOffset) >= r.length || x.DirectorySize > layout.MaxBitmapDirectory {
		r.bad("the bitmap directory lies behind the end")
		return
	}
	r.add(int64(x.DirectoryOffset), int64(x.DirectorySize), useDirectory)
	dir := r.read(int64(x.DirectoryOffset), int64(x.DirectorySize))
	for i := range int(x.NbBitmaps) {
		if len(dir) < bitmapHeader {
			r.bad("the bitmap directory ends before entry %d", i)
			return
		}
		table, entries := be.Uint64(dir), int64(be.Uint32(dir[8:]))
		n := (bitmapHeader + int64(be.Uint16(dir[18:])) + int64(be.Uint32(dir[20:])) + 7) &^ 7
		if n > int64(len(dir)) {
			r.bad("entry %d of the bitmap directory is too long", i)
			return
		}
		dir = dir[n:]
		if !r.aligned(table) || table > 1<<62 || entries > mostEntries {
			r.bad("bitmap %d has no table", i)
			continue
		}
		r.add(int64(table), entries*8, useBitmap)
		for _, e := range r.entries(int64(table), entries) {
			if off := e & layout.OffsetMask; off != 0 && r.aligned(off) {
				r.add(int64(off), r.g.ClusterSize(), useBitmap)
			}
		}
	}
}

// refcount of a cluster, and whether its block can be relied on.
func (r *Report) refcount(c int64) (n uint64, ok bool) {
	per := int64(1) << r.g.RefblockBits()
	if c < 0 || c/per >= int64(len(r.reft)) || r.reft[c/per] == 0 {
		return 0, true
	}
	off := int64(r.reft[c/per] & layout.ReftMask)
	own := off >> r.g.ClusterBits
	b := r.blocks[off]
	if b == nil {
		b = r.read(off, r.g.ClusterSize())
		r.blocks[off] = b
	}
	return r.g.Refcount(b, c%per), r.refs[own] == 1 && r.uses[own] == useRefblock && off < r.length
}

// health of one cluster of the file that an entry with the flag copied leads to.
func (r *Report) health(c int64, copied bool) Health {
	n, ok := r.refcount(c)
	u, refs := r.uses[c], r.refs[c]
	mixed := u&(u-1) != 0 && u&^shared != 0 && u&^tables != 0
	switch {
	case mixed:
		return Unusable
	case !ok:
		return Tangled
	case r.Dirty && n < uint64(refs):
		n = uint64(refs) // the repair will count
	}
	switch {
	case refs == 1 && n == 0, c<<r.g.ClusterBits >= r.length:
		return Uncounted
	case uint64(refs) > n, copied && (n != 1 || refs != 1) && !r.Dirty:
		return Tangled
	}
	return Sound
}

// judge says what is wrong with each cluster and what follows for the disk.
func (r *Report) judge() {
	for c, refs := range r.refs {
		n, _ := r.refcount(c)
		u := r.uses[c]
		if uint64(refs) > n {
			r.bad("cluster %d: refcount %d, references %d (%#x)", c, n, refs, u)
		}
		if c<<r.g.ClusterBits >= r.length {
			r.bad("cluster %d lies behind the end (%#x)", c, u)
		}
		h := r.health(c, false)
		if h == Uncounted && u&(useHeader|useReftable|useL1) != 0 {
			r.least = Uncounted
		}
		if h >= Tangled {
			if u&(u-1) != 0 {
				r.bad("cluster %d has several uses (%#x)", c, u)
			}
			r.lost = r.lost || h == Unusable && u&(useHeader|useReftable|useL1) != 0
		}
	}
	per := int64(1) << r.g.L2Bits()
	words := r.g.ClusterSize() / 8 / per
	for i, e := range r.entries(int64(r.h.L1TableOffset), min(int64(r.h.L1Size), mostJudged)) {
		if r.lost {
			return
		}
		l2 := int64(e & layout.OffsetMask)
		if l2 == 0 {
			continue
		}
		h := Unusable
		if r.aligned(uint64(l2)) {
			h = r.health(l2>>r.g.ClusterBits, e&layout.Copied != 0)
		}
		if e&^(layout.OffsetMask|layout.Copied) != 0 {
			r.bad("L1 entry %d is %#x", i, e)
		}
		if h == Unusable {
			r.disk[-int64(i)-1] = h // the whole table
			continue
		}
		t := r.entries(l2, per*words)
		t = append(t, make([]uint64, per*words-int64(len(t)))...)
		for j := range per {
			g := max(h, r.entry(t[j*words]))
			if r.g.Extended && !r.possible(t[j*2], t[j*2+1]) {
				r.bad("the bits of L2 entry %#x are %#x", t[j*2], t[j*2+1])
				g = Unusable
			}
			if g != Sound {
				r.disk[int64(i)*per+j] = g
			}
		}
	}
}

// possible tells whether an extended L2 entry can have these bits.
func (r *Report) possible(e, bits uint64) bool {
	alloc, zero := bits&(1<<32-1), bits>>32
	switch r.g.KindOf(e) {
	case layout.CompressedKind:
		return bits == 0
	case layout.Normal:
		return alloc&zero == 0
	case layout.Unallocated:
		return alloc == 0
	}
	return false
}

// entry judges an L2 entry.
func (r *Report) entry(e uint64) Health {
	copied := e&layout.Copied != 0
	switch r.g.KindOf(e) {
	case layout.Normal, layout.ZeroAlloc:
		off := e & layout.OffsetMask
		if !r.aligned(off) {
			return Unusable
		}
		n, _ := r.refcount(int64(off) >> r.g.ClusterBits)
		if copied != (n == 1) && !r.Dirty {
			r.bad("L2 entry %#x, refcount %d", e, n)
		}
		return r.health(int64(off)>>r.g.ClusterBits, copied)
	case layout.CompressedKind:
		off, n := r.g.CompressedRange(e)
		worst := Sound
		if copied {
			r.bad("compressed L2 entry %#x", e)
		}
		for c := off >> r.g.ClusterBits; c <= (off+n-1)>>r.g.ClusterBits; c++ {
			worst = max(worst, r.health(c, false))
		}
		return worst
	}
	return Sound
}

// At tells what can be expected of the byte at off of the disk.
func (r *Report) At(off int64) Health {
	if !r.Parsed || r.lost {
		return Unusable
	}
	c := off >> r.g.ClusterBits
	per := int64(1) << r.g.L2Bits()
	if h, ok := r.disk[-(c/per)-1]; ok {
		return max(r.least, h)
	}
	return max(r.least, r.disk[c])
}
