package bitmap

import (
	"math/bits"
	"sync/atomic"
)

const (
	wordBits  = 64
	wordMask  = wordBits - 1
	leafWords = 64
	leafGran  = leafWords * wordBits
	leafMask  = leafGran - 1
	leafShift = 12 // log2 of leafGran
	fan       = 64 // slots of a branch
	fanShift  = 6
	fanMask   = fan - 1
	maxRoot   = 4096 // slots of a directory, which are always whole branches: there may be one above them some day

	nodeBytes   = 24 // as allocated, as the other two
	leafBytes   = nodeBytes + leafWords*8
	branchBytes = nodeBytes + fan*8

	allOnes = ^uint64(0)
)

// slot is a place for a node, or says what is true of all granules below it: nil, none is set;
// full, all are.
//
//	nil  --> node   Set of some, which makes an empty node first
//	nil  --> full   Set of all of them, or of some where the bitmap may take no more memory
//	full --> node   Clear of some, which makes a node that has all set first
//	any  --> full   Set of all
//	any  --> nil    Clear of all
//
// A node that has left its slot never comes back. Who found it there before that and sets or clears
// some of it afterwards has begun before the call that took the node away, which concerned the same
// granules: it counts as having come first.
type slot struct{ atomic.Pointer[node] }

// node is a leaf, with the words of leafGran granules, or a branch, with slots. It does not have
// them in itself: as objects of their own they have a length that is allocated without loss, and
// words are nothing that a collector looks into.
type node struct {
	n   atomic.Int64 // of a leaf: granules set
	sub *[fan]slot   // of a branch
	w   *words       // of a leaf
}

// words are those of a leaf. Who has made a leaf that nobody else has yet writes to them as they
// are; from then on load, or and andNot are the only ways to them.
type words [leafWords]uint64

func (w *words) load(i int64) uint64 { return atomic.LoadUint64(&w[i]) }

// or returns the bits that were not set before.
func (w *words) or(i int64, mask uint64) (fresh uint64) { return mask &^ atomic.OrUint64(&w[i], mask) }

// andNot returns the bits that were set before.
func (w *words) andNot(i int64, mask uint64) (gone uint64) {
	return mask & atomic.AndUint64(&w[i], ^mask)
}

func newLeaf() *node { return &node{w: new(words)} }

// full stands for nodes with all granules set. Nobody writes to it.
var full = new(node)

// directory is the upper end of a tree. Trees of several directories share slots when the size has
// changed.
type directory struct {
	size  int64 // bytes
	shift uint  // log2 of the granules of one of its slots
	sub   []slot
}

func newDirectory(size, granules int64) *directory {
	d := &directory{size: size, shift: leafShift}
	for (granules-1)>>d.shift >= maxRoot {
		d.shift += fanShift
	}
	d.sub = make([]slot, slotsFor(granules, d.shift))
	return d
}

func slotsFor(granules int64, shift uint) int64 {
	return ((max(granules, 1)-1)>>shift)/fan*fan + fan
}

// grown is a directory with the slots of d, and room for more granules.
func (d *directory) grown(size, granules int64) *directory {
	g := *d
	g.size = size
	for (granules-1)>>g.shift >= int64(len(g.sub)) {
		below := g.sub
		g.shift += fanShift
		g.sub = make([]slot, max(int64(len(below))/fan, min(slotsFor(granules, g.shift), maxRoot)))
		for i := range len(below) / fan {
			// All of them, also those with nothing set: who has the old directory may be about to
			// set something.
			g.sub[i].Store(&node{sub: (*[fan]slot)(below[i*fan:])})
		}
	}
	return &g
}

// at is the leaf that has granule g, or nil or full.
func (d *directory) at(g int64) *node {
	n := d.sub[g>>d.shift].Load()
	if n == nil || n.sub == nil {
		return n
	}
	return n.below(g, d.shift)
}

// below is at below a branch of so many granules.
func (n *node) below(g int64, shift uint) *node {
	for n != nil && n.sub != nil {
		shift -= fanShift
		n = n.sub[g>>shift&fanMask].Load()
	}
	return n
}

// each calls f for the slots of sub that have granules of [first, end), with those; base is the
// first granule of sub, shift the length of a slot.
func each(sub []slot, shift uint, base, first, end int64, f func(p *slot, lo, first, end int64)) {
	for i := (first - base) >> shift; first < end; i++ {
		lo := base + i<<shift
		stop := min(end, lo+1<<shift)
		f(&sub[i], lo, first, stop)
		first = stop
	}
}

// set sets the granules [first, end).
func (b *Bitmap) set(sub []slot, shift uint, base, first, end int64) {
	each(sub, shift, base, first, end, func(p *slot, lo, first, end int64) {
		for {
			n := p.Load()
			switch {
			case n == full:
				return
			case end-first == 1<<shift || n == nil && b.crowded(lo, shift):
				if p.CompareAndSwap(n, full) {
					b.drop(n)
					return
				}
			case n == nil:
				b.put(p, nil, shift)
			case n.sub != nil:
				b.set(n.sub[:], shift-fanShift, lo, first, end)
				return
			default:
				n.set(first-lo, end-first)
				return
			}
		}
	})
}

// clear clears the granules [first, end).
func (b *Bitmap) clear(sub []slot, shift uint, base, first, end int64) {
	each(sub, shift, base, first, end, func(p *slot, lo, first, end int64) {
		for {
			n := p.Load()
			switch {
			case n == nil:
				return
			case end-first == 1<<shift:
				if p.CompareAndSwap(n, nil) {
					b.drop(n)
					return
				}
			case n == full:
				b.put(p, full, shift)
			case n.sub != nil:
				b.clear(n.sub[:], shift-fanShift, lo, first, end)
				return
			default:
				n.clear(first-lo, end-first)
				return
			}
		}
	})
}

// put puts a node with the same granules in place of was, which is nil or full, unless somebody
// else has changed the slot.
func (b *Bitmap) put(p *slot, was *node, shift uint) {
	var n *node
	if shift > leafShift {
		n = &node{sub: new([fan]slot)}
	} else {
		n = newLeaf()
	}
	if was == full {
		n.fill()
	}
	if p.CompareAndSwap(was, n) {
		b.bytes.Add(n.bytes())
	}
}

// fill sets all granules of a node that nobody else has yet.
func (n *node) fill() {
	if n.sub != nil {
		for i := range n.sub {
			n.sub[i].Store(full)
		}
		return
	}
	for i := range n.w {
		n.w[i] = allOnes
	}
	n.n.Store(leafGran)
}

// bytes is the memory that n itself takes.
func (n *node) bytes() int64 {
	switch {
	case n == nil || n == full:
		return 0
	case n.sub != nil:
		return branchBytes
	}
	return leafBytes
}

// drop takes a node that has left its slot, and those below, off the account.
func (b *Bitmap) drop(n *node) {
	if k := n.bytes(); k != 0 {
		b.bytes.Add(-k)
		if n.sub != nil {
			for i := range n.sub {
				b.drop(n.sub[i].Load())
			}
		}
	}
}

// leafFor is the slot of the leaf that has granule g, or one further up that is full; made that for
// lack of memory, its granules are set in fresh, too, if that is not nil.
func (b *Bitmap) leafFor(d *directory, g int64, fresh *Bitmap) *slot {
	p, shift := &d.sub[g>>d.shift], d.shift
	for shift > leafShift {
		switch n := p.Load(); {
		case n == full:
			return p
		case n == nil && b.crowded(g, shift):
			if p.CompareAndSwap(nil, full) && fresh != nil {
				fd, lo := fresh.dir.Load(), g>>shift<<shift
				fresh.set(fd.sub, fd.shift, 0, lo, lo+1<<shift)
			}
		case n == nil:
			b.put(p, nil, shift)
		default:
			shift -= fanShift
			p = &n.sub[g>>shift&fanMask]
		}
	}
	return p
}

// masks calls f for the words of [first, first+n) within a leaf.
func masks(first, n int64, f func(word int64, mask uint64)) {
	for n > 0 {
		at := first % wordBits
		k := min(n, wordBits-at)
		f(first/wordBits, (allOnes>>(wordBits-k))<<at)
		first, n = first+k, n-k
	}
}

func (n *node) set(first, k int64) {
	masks(first, k, n.or)
}

// or sets granules of a word.
func (n *node) or(i int64, mask uint64) {
	if n.w.load(i)&mask == mask {
		return
	}
	if fresh := n.w.or(i, mask); fresh != 0 {
		n.n.Add(int64(bits.OnesCount64(fresh)))
	}
}

func (n *node) clear(first, k int64) {
	masks(first, k, func(i int64, mask uint64) {
		if n.w.load(i)&mask == 0 {
			return
		}
		if gone := n.w.andNot(i, mask); gone != 0 {
			n.n.Add(-int64(bits.OnesCount64(gone)))
		}
	})
}

// next is the first granule of [g, end) that is set (want) or clear (!want); end if there is none.
func next(sub []slot, shift uint, base, g, end int64, want bool) int64 {
	for i := (g - base) >> shift; g < end; i++ {
		lo := base + i<<shift
		stop := min(end, lo+1<<shift)
		switch n := sub[i].Load(); {
		case n == nil:
			if !want {
				return g
			}
		case n == full:
			if want {
				return g
			}
		case n.sub != nil:
			if at := next(n.sub[:], shift-fanShift, lo, g, stop, want); at < stop {
				return at
			}
		default:
			if at := n.next(g-lo, stop-lo, want); at < stop-lo {
				return lo + at
			}
		}
		g = stop
	}
	return end
}

func (n *node) next(g, end int64, want bool) int64 {
	if n.n.Load() == 0 {
		if want {
			return end
		}
		return g
	}
	flip := allOnes
	if want {
		flip = 0
	}
	for words := n.w; g < end; {
		if w := (words.load(g/wordBits) ^ flip) >> (g % wordBits); w != 0 {
			return min(g+int64(bits.TrailingZeros64(w)), end)
		}
		g = (g/wordBits + 1) * wordBits
	}
	return end
}

// count is how many granules are set.
func count(sub []slot, shift uint) (k int64) {
	for i := range sub {
		switch n := sub[i].Load(); {
		case n == nil:
		case n == full:
			k += 1 << shift
		case n.sub != nil:
			k += count(n.sub[:], shift-fanShift)
		default:
			k += n.n.Load()
		}
	}
	return k
}

// walk calls f for the nodes with granules set, in their order: leaves, and full with as many
// granules as k says.
func walk(sub []slot, shift uint, base int64, f func(n *node, lo, k int64)) {
	for i := range sub {
		lo := base + int64(i)<<shift
		switch n := sub[i].Load(); {
		case n == nil:
		case n != full && n.sub != nil:
			walk(n.sub[:], shift-fanShift, lo, f)
		case n == full || n.n.Load() != 0:
			f(n, lo, 1<<shift)
		}
	}
}
