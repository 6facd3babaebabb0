package bitmap

import (
	"encoding/binary"
	"math/bits"
)

// Merge sets in b what is set in from, which may be of another granularity and size.
func (b *Bitmap) Merge(from *Bitmap) {
	src, dst := from.dir.Load(), b.dir.Load()
	switch {
	case from.shift > b.shift || src.size > dst.size:
		for at, n, ok := from.NextDirty(0, src.size); ok; at, n, ok = from.NextDirty(at+n, src.size) {
			b.Set(at, n)
		}
	case from.shift == b.shift:
		walk(src.sub, src.shift, 0, func(n *node, lo, k int64) {
			if n == full {
				b.set(dst.sub, dst.shift, 0, lo, lo+k)
			} else {
				b.orLeaf(dst, lo, n)
			}
		})
	default:
		b.fold(dst, src, b.shift-from.shift)
	}
}

// MergeNew is Merge, and returns what was not set before, and maybe more of what was not: where
// nothing was set in a leaf, all of it. What others set at the same time may be in it.
func (b *Bitmap) MergeNew(from *Bitmap) *Bitmap {
	src, dst := from.dir.Load(), b.dir.Load()
	if from.shift != b.shift || src.size != dst.size {
		same := New(dst.size, b.Granularity())
		same.Merge(from)
		src = same.dir.Load()
	}
	fresh := New(dst.size, b.Granularity())
	fd := fresh.dir.Load()
	walk(src.sub, src.shift, 0, func(n *node, lo, k int64) {
		if n == full {
			b.setNew(dst.sub, dst.shift, 0, lo, lo+k, fresh)
			return
		}
		p := b.leafFor(dst, lo, fresh)
		for {
			to := p.Load()
			switch {
			case to == full:
				return
			case to != nil:
				if got := to.take(n); got != nil {
					fresh.orLeaf(fd, lo, got)
				}
				return
			}
			c, _ := n.copied()
			if b.crowded(lo, leafShift) {
				c = full
			}
			if p.CompareAndSwap(nil, c) {
				b.bytes.Add(c.bytes())
				fresh.set(fd.sub, fd.shift, 0, lo, min(lo+leafGran, b.granules(dst.size)))
				return
			}
		}
	})
	return fresh
}

// take sets in n what is set in from and returns that which was not; nil: nothing.
func (n *node) take(from *node) (got *node) {
	var k int
	for i := range int64(leafWords) {
		w := from.w.load(i)
		if w&^n.w.load(i) == 0 {
			continue
		}
		if w = n.w.or(i, w); w != 0 {
			if got == nil {
				got = newLeaf()
			}
			got.w[i] = w
			k += bits.OnesCount64(w)
		}
	}
	if got != nil {
		got.n.Store(int64(k))
		n.n.Add(int64(k))
	}
	return got
}

// setNew sets the granules [first, end) and sets in fresh those that were not.
func (b *Bitmap) setNew(sub []slot, shift uint, base, first, end int64, fresh *Bitmap) {
	fd := fresh.dir.Load()
	each(sub, shift, base, first, end, func(p *slot, lo, first, end int64) {
		for {
			n := p.Load()
			switch {
			case n == full:
				return
			case n == nil && (end-first == 1<<shift || b.crowded(lo, shift)):
				if p.CompareAndSwap(nil, full) {
					fresh.set(fd.sub, fd.shift, 0, lo, lo+1<<shift)
					return
				}
			case n == nil:
				b.put(p, nil, shift)
			case n.sub != nil:
				b.setNew(n.sub[:], shift-fanShift, lo, first, end, fresh)
				return
			default:
				all := newLeaf()
				all.set(first-lo, end-first)
				if got := n.take(all); got != nil {
					fresh.orLeaf(fd, lo, got)
				}
				return
			}
		}
	})
}

// Subtract clears in b what is set in x, which is of the same granularity.
func (b *Bitmap) Subtract(x *Bitmap) {
	if x.shift != b.shift {
		panic("bitmap: subtraction of another granularity")
	}
	d := x.dir.Load()
	walk(d.sub, d.shift, 0, func(n *node, lo, k int64) {
		if n == full {
			b.Clear(lo<<b.shift, k<<b.shift)
			return
		}
		for i := int64(0); i < leafGran; {
			at := n.next(i, leafGran, true)
			i = n.next(at, leafGran, false)
			if at < i {
				b.Clear((lo+at)<<b.shift, (i-at)<<b.shift)
			}
		}
	})
}

// orLeaf sets what is set in n, a leaf of another bitmap of the same granularity.
func (b *Bitmap) orLeaf(d *directory, lo int64, n *node) {
	p := b.leafFor(d, lo, nil)
	for {
		switch to := p.Load(); {
		case to == full:
			return
		case to == nil && b.crowded(lo, leafShift):
			p.CompareAndSwap(nil, full)
		case to == nil:
			// Nobody else has it yet: no atomic operations, and none set at all where it is full.
			c, k := n.copied()
			if k == leafGran {
				c = full
			}
			if p.CompareAndSwap(nil, c) {
				b.bytes.Add(c.bytes())
				return
			}
		default:
			var k int
			src, dst := n.w, to.w
			for i := range int64(leafWords) {
				if w := src.load(i); w&^dst.load(i) != 0 {
					k += bits.OnesCount64(dst.or(i, w))
				}
			}
			if k != 0 {
				to.n.Add(int64(k))
			}
			return
		}
	}
}

// copied is a leaf as n is now, and the number of granules set.
func (n *node) copied() (*node, int64) {
	c, k := newLeaf(), 0
	src, dst := n.w, c.w
	for i := range int64(leafWords) {
		w := src.load(i)
		dst[i] = w
		k += bits.OnesCount64(w)
	}
	c.n.Store(int64(k))
	return c, int64(k)
}

// fold sets in dst, the directory of b, what is set in src, whose granules are 2^by times as small.
func (b *Bitmap) fold(dst, src *directory, by uint) {
	at, acc := int64(-1), uint64(0) // a word of dst that is being gathered
	put := func() {
		if acc != 0 {
			b.orWord(dst, at, acc)
		}
		acc = 0
	}
	first, end := int64(0), int64(0) // a run in src that is full: set as a whole, it takes no memory in dst either
	putRun := func() {
		if first < end {
			b.set(dst.sub, dst.shift, 0, first>>by, (end-1)>>by+1)
		}
	}
	walk(src.sub, src.shift, 0, func(n *node, lo, k int64) {
		if n == full {
			if lo != end {
				putRun()
				first = lo
			}
			end = lo + k
			return
		}
		for i := range int64(leafWords) {
			w := n.w.load(i)
			for w != 0 {
				bit := bits.TrailingZeros64(w)
				to := (lo + i*wordBits + int64(bit)) >> by
				if to&^wordMask != at {
					put()
					at = to &^ wordMask
				}
				acc |= 1 << (to & wordMask)
				// Go on behind the granule of dst.
				if next := bit>>by<<by + 1<<min(by, fanShift); next < wordBits {
					w = w >> next << next
				} else {
					w = 0
				}
			}
		}
	})
	put()
	putRun()
}

// orWord sets granules of the word that begins with granule g.
func (b *Bitmap) orWord(d *directory, g int64, mask uint64) {
	p := b.leafFor(d, g, nil)
	for {
		switch n := p.Load(); {
		case n == full:
			return
		case n == nil && b.crowded(g, leafShift):
			p.CompareAndSwap(nil, full)
		case n == nil:
			b.put(p, nil, leafShift)
		default:
			n.or(g/wordBits%leafWords, mask)
			return
		}
	}
}

// AppendBytes appends the granules from first on, a multiple of 8, as n bytes: bit 0 of a byte is
// the lowest granule, as qcow2 stores them. Beyond the end there are zeroes.
func (b *Bitmap) AppendBytes(dst []byte, first, n int64) []byte {
	d := b.dir.Load()
	total := b.granules(d.size)
	for n > 0 && first < total {
		at := first & leafMask
		k := min(n, (leafGran-at)/8) // bytes within the leaf
		switch leaf := d.at(first); leaf {
		case nil, full:
			var x byte
			if leaf == full {
				x = 0xff
			}
			for range k {
				dst = append(dst, x)
			}
		default:
			for left := k; left > 0; {
				w := leaf.w.load(at/wordBits) >> (at % wordBits)
				if at%wordBits == 0 && left >= 8 {
					dst = binary.LittleEndian.AppendUint64(dst, w)
					at, left = at+wordBits, left-8
					continue
				}
				dst = append(dst, byte(w))
				at, left = at+8, left-1
			}
		}
		first, n = first+k*8, n-k
	}
	return append(dst, make([]byte, max(n, 0))...)
}

// LoadBytes sets the granules from first on, a multiple of 8, that are set in src, which is as
// AppendBytes makes it.
func (b *Bitmap) LoadBytes(first int64, src []byte) {
	d := b.dir.Load()
	total := b.granules(d.size)
	run := first // all of [run, first) are to be set, and are not yet
	put := func() {
		if run < first {
			b.set(d.sub, d.shift, 0, run, first)
		}
	}
	for len(src) > 0 && first < total {
		if first&leafMask == 0 && len(src) >= leafGran/8 && first+leafGran <= total {
			n := leafOf(src)
			if k := n.n.Load(); k != leafGran {
				put()
				if run = first + leafGran; k != 0 {
					b.orLeaf(d, first, n)
				}
			}
			src, first = src[leafGran/8:], first+leafGran
			continue
		}
		var w uint64
		k := int64(8) // bytes
		if at := first % wordBits; at == 0 && len(src) >= 8 {
			w = binary.LittleEndian.Uint64(src)
		} else {
			w, k = uint64(src[0])<<at, 1
		}
		src = src[k:]
		if first+k*8 > total {
			w &= allOnes >> (wordBits - (total-1)%wordBits - 1) // as far as there are granules
		} else if w == allOnes {
			first += k * 8
			continue
		}
		put()
		if w != 0 {
			b.orWord(d, first&^wordMask, w)
		}
		first += k * 8
		run = first
	}
	first = min(first, total)
	put()
}

// leafOf is a leaf with the granules of the beginning of src.
func leafOf(src []byte) *node {
	n, k := newLeaf(), 0
	for i := range n.w {
		n.w[i] = binary.LittleEndian.Uint64(src[i*8:])
		k += bits.OnesCount64(n.w[i])
	}
	n.n.Store(int64(k))
	return n
}
