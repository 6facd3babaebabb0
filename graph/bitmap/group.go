package bitmap

import (
	"math/bits"
	"sync/atomic"
)

// Group are bitmaps that record the same writes. Most writes find everything set that they touch; a group lets them see that at one look,
// however many bitmaps there are. It remembers regions in which all granules of all bitmaps are set.
//
// A word holds the flags of 32 regions and a count of the times that flags of it were taken back. Who has set everything in a region enters the flag only if
// the word is still what it was before; who clears a bitmap takes flags back afterwards. So a flag never outlives the granules for longer than the call that
// clears them, and who sees it in that time has nothing to tell that the caller would not find.
type Group struct {
	l      []*Bitmap
	shift  uint // log2 of the bytes of a region
	whole  bool // no granule is smaller than a region: whatever is set covers it
	chunks []atomic.Pointer[[groupWords]atomic.Uint64]
}

const (
	groupWords     = 512
	flagsOfWord    = 32
	regionsOfChunk = groupWords * flagsOfWord
	minRegion      = 4 << 10
)

// NewGroup makes a group of bitmaps of one size. Each is in one group at a time, the last that was made with it; before the group is used.
func NewGroup(l []*Bitmap) *Group {
	g := &Group{l: l, shift: l[0].shift}
	for _, b := range l {
		g.shift = min(g.shift, b.shift)
	}
	smallest := g.shift
	g.shift = max(g.shift, uint(bits.TrailingZeros(minRegion)))
	g.whole = smallest >= g.shift
	regions := l[0].Size()>>g.shift + 1
	g.chunks = make([]atomic.Pointer[[groupWords]atomic.Uint64], regions/regionsOfChunk+1)
	for _, b := range l {
		b.group.Store(g)
	}
	return g
}

// Has tells whether all bitmaps have all granules that [off, off+n) touches, as far as one look shows: n is above 0, and false may be wrong.
// It is small enough to be inlined where writes end.
func (g *Group) Has(off, n int64) bool {
	region := uint64(off) >> g.shift
	if uint64(off+n-1)>>g.shift != region || region/regionsOfChunk >= uint64(len(g.chunks)) {
		return false
	}
	c := g.chunks[region/regionsOfChunk].Load()
	return c != nil && c[region/flagsOfWord%groupWords].Load()>>(region%flagsOfWord)&1 != 0
}

// Set is Bitmap.Set on all bitmaps except but, which may be nil.
func (g *Group) Set(off, n int64, but *Bitmap) {
	region := uint64(off) >> g.shift
	if n <= 0 || but != nil || uint64(off+n-1)>>g.shift != region || region/regionsOfChunk >= uint64(len(g.chunks)) {
		g.setEach(off, n, but)
		return
	}
	w, flag := g.word(region), uint64(1)<<(region%flagsOfWord)
	was := w.Load()
	if was&flag != 0 {
		return
	}
	g.setEach(off, n, nil)
	if g.whole || n == 1<<g.shift {
		w.CompareAndSwap(was, was|flag) // if not, a later write will
	}
}

func (g *Group) setEach(off, n int64, but *Bitmap) {
	for _, b := range g.l {
		if b != but {
			b.Set(off, n)
		}
	}
}

// word has the flag of a region.
func (g *Group) word(region uint64) *atomic.Uint64 {
	p := &g.chunks[region/regionsOfChunk]
	c := p.Load()
	if c == nil {
		c = new([groupWords]atomic.Uint64)
		if !p.CompareAndSwap(nil, c) {
			// Another one made it, or it was taken back already: then it is as good as any.
			if now := p.Load(); now != nil {
				c = now
			}
		}
	}
	return &c[region/flagsOfWord%groupWords]
}

// cleared takes flags back, after granules of [off, off+n) were cleared.
func (g *Group) cleared(off, n int64) {
	if n <= 0 {
		return
	}
	for region, last := off>>g.shift, (off+n-1)>>g.shift; region <= last; {
		i := region / regionsOfChunk
		if i >= int64(len(g.chunks)) {
			return
		}
		c := g.chunks[i].Load()
		if c == nil {
			region = (i + 1) * regionsOfChunk
			continue
		}
		k := min(last-region+1, flagsOfWord-region%flagsOfWord)
		mask := (uint64(1)<<k - 1) << (region % flagsOfWord)
		for w := &c[region/flagsOfWord%groupWords]; ; {
			was := w.Load()
			if w.CompareAndSwap(was, (was+1<<flagsOfWord)&^mask) {
				break
			}
		}
		region += k
	}
}

// forget takes all flags back. Flags that are entered at the same time go to words that nobody looks at any more.
func (g *Group) forget() {
	for i := range g.chunks {
		g.chunks[i].Store(nil)
	}
}
