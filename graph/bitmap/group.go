package bitmap

import (
	"math/bits"
	"sync/atomic"
)

// Group are bitmaps that record the same writes. Most writes find everything set that they touch; a
// group lets them see that at one look, however many bitmaps there are. It remembers regions in
// which all granules of all bitmaps are set: those of guests' working sets, in a fixed amount of
// memory, not of whole disks. What it does not remember is found out for each bitmap. Writes that
// hardly ever come to the same place again make it remember nothing.
//
// A word holds the flags of 32 regions and a count of the times that flags of it were taken back.
// Who has set everything in a region enters the flag only if the word is still what it was before;
// who clears a bitmap takes flags back afterwards. So a flag never outlives the granules for longer
// than the call that clears them, and who sees it in that time has nothing to tell that the caller
// would not find. A chunk of flags that has lost its place never comes back: who still has it has
// begun before that, and before anything was cleared that it does not know of.
type Group struct {
	l      []*Bitmap
	shift  uint          // log2 of the bytes of a region
	whole  bool          // no granule is smaller than a region: whatever is set covers it
	misses atomic.Uint32 // of writes that came again and did not find their chunk
	chunks [groupChunks]atomic.Pointer[flags]
}

// flags are those of regionsOfChunk regions.
type flags struct {
	chunk uint64 // which regions
	w     [groupWords]atomic.Uint64
}

const (
	groupChunks    = 128
	groupWords     = 256
	flagsOfWord    = 32
	regionsOfChunk = groupWords * flagsOfWord
	minRegion      = 4 << 10
	// missesToMake is after how many misses a chunk is made in an empty place, missesToMove in that
	// of another one: writes all over a disk must make neither many of them nor garbage.
	missesToMake = 256
	missesToMove = 4096
)

// NewGroup makes a group of bitmaps of one size. Each is in one group at a time, the last that was
// made with it; before the group is used.
func NewGroup(l []*Bitmap) *Group {
	g := &Group{l: l, shift: l[0].shift}
	for _, b := range l {
		g.shift = min(g.shift, b.shift)
	}
	smallest := g.shift
	g.shift = max(g.shift, uint(bits.TrailingZeros(minRegion)))
	g.whole = smallest >= g.shift
	for _, b := range l {
		b.group.Store(g)
	}
	return g
}

// Has tells whether all bitmaps have all granules that [off, off+n) touches, as far as one look
// shows: n is above 0, and false may be wrong. It is small enough to be inlined where writes end.
func (g *Group) Has(off, n int64) bool {
	region := uint64(off) >> g.shift
	if uint64(off+n-1)>>g.shift != region {
		return false
	}
	c := g.chunks[region/regionsOfChunk%groupChunks].Load()
	return c != nil && c.w[region/flagsOfWord%groupWords].Load()>>(region%flagsOfWord)&1 != 0 &&
		c.chunk == region/regionsOfChunk
}

// Set is Bitmap.Set on all bitmaps except but, which may be nil.
func (g *Group) Set(off, n int64, but *Bitmap) {
	region := uint64(off) >> g.shift
	if n <= 0 || but != nil || uint64(off+n-1)>>g.shift != region {
		g.setEach(off, n, but)
		return
	}
	w, flag := g.word(region), uint64(1)<<(region%flagsOfWord)
	if w == nil {
		again := g.l[0].Get(off)
		g.setEach(off, n, nil)
		if again {
			g.missed(region)
		}
		return
	}
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

// word has the flag of a region; nil: there is no place for it.
func (g *Group) word(region uint64) *atomic.Uint64 {
	chunk := region / regionsOfChunk
	c := g.chunks[chunk%groupChunks].Load()
	if c == nil || c.chunk != chunk {
		return nil
	}
	return &c.w[region/flagsOfWord%groupWords]
}

// missed counts a write that came to a region again and found no chunk of flags. Some of them make
// one.
func (g *Group) missed(region uint64) {
	chunk := region / regionsOfChunk
	p := &g.chunks[chunk%groupChunks]
	c, due := p.Load(), uint32(missesToMake)
	if c != nil {
		due = missesToMove
	}
	if g.misses.Add(1)%due == 0 && (c == nil || c.chunk != chunk) {
		p.CompareAndSwap(c, &flags{chunk: chunk})
	}
}

// cleared takes flags back, after granules of [off, off+n) were cleared.
func (g *Group) cleared(off, n int64) {
	if n <= 0 {
		return
	}
	first, last := uint64(off)>>g.shift, uint64(off+n-1)>>g.shift
	if last/regionsOfChunk-first/regionsOfChunk >= groupChunks {
		g.forget()
		return
	}
	for region := first; region <= last; {
		i := region / regionsOfChunk
		c := g.chunks[i%groupChunks].Load()
		if c == nil || c.chunk != i {
			region = (i + 1) * regionsOfChunk
			continue
		}
		k := min(last-region+1, flagsOfWord-region%flagsOfWord)
		mask := (uint64(1)<<k - 1) << (region % flagsOfWord)
		for w := &c.w[region/flagsOfWord%groupWords]; ; {
			was := w.Load()
			if w.CompareAndSwap(was, (was+1<<flagsOfWord)&^mask) {
				break
			}
		}
		region += k
	}
}

// forget takes all flags back. Flags that are entered at the same time go to words that nobody
// looks at any more.
func (g *Group) forget() {
	for i := range g.chunks {
		g.chunks[i].Store(nil)
	}
}
