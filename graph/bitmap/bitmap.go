// Package bitmap holds sets of granules of an address space: which parts of a disk were written. It is pure: no I/O, no
// clock, no wait.
//
// A Bitmap is a directory of chunks, each with the words of chunkBits granules and the number of those that are set:
//
//	directory   chunk 0   chunk 1   nil (clean)   chunk 3 ...       replaced when the size changes; chunks stay what they are
//	chunk       n = 3     0100...0011                               made when a granule of it is first set
//
// Setting is one atomic operation on a word, none where the granule is set already, so that requests can do it side by side
// without a lock. Finding skips clean chunks.
package bitmap

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

const (
	wordBits   = 64
	chunkWords = 512
	chunkBits  = chunkWords * wordBits
)

type chunk struct {
	n atomic.Int64 // granules set
	w [chunkWords]atomic.Uint64
}

type directory struct {
	size   int64 // bytes
	chunks []atomic.Pointer[chunk]
}

// Bitmap is a set of granules of [0, Size()). Set, Clear and the methods that only read may run at the same time; those that change
// the size or the whole say what they need.
type Bitmap struct {
	shift uint // log2 of the granularity
	dir   atomic.Pointer[directory]
	group atomic.Pointer[Group] // that is to hear of granules that are cleared; nil: none
}

// New makes an empty bitmap of size bytes. granularity is in bytes, a power of two.
func New(size, granularity int64) *Bitmap {
	if size < 0 || granularity <= 0 || granularity&(granularity-1) != 0 {
		panic("bitmap: bad size or granularity")
	}
	b := &Bitmap{shift: uint(bits.TrailingZeros64(uint64(granularity)))}
	b.dir.Store(b.newDirectory(size))
	return b
}

func (b *Bitmap) newDirectory(size int64) *directory {
	n := (b.granules(size) + chunkBits - 1) / chunkBits
	return &directory{size: size, chunks: make([]atomic.Pointer[chunk], n)}
}

func (b *Bitmap) granules(size int64) int64 { return (size + 1<<b.shift - 1) >> b.shift }

// Size is the length of the address space in bytes.
func (b *Bitmap) Size() int64 { return b.dir.Load().size }

// Granularity is the length of a granule in bytes.
func (b *Bitmap) Granularity() int64 { return 1 << b.shift }

// Granules is the number of granules, the last one of which may be cut off by the end.
func (b *Bitmap) Granules() int64 { return b.granules(b.Size()) }

// Set sets every granule that [off, off+n) touches; what lies beyond the end is left out. It allocates at most when a chunk is touched for
// the first time.
func (b *Bitmap) Set(off, n int64) {
	d := b.dir.Load()
	first, end := b.span(d, off, n)
	if first+1 == end {
		// The usual small write: mostly a look at a granule that is set already.
		c := d.chunk(first / chunkBits)
		w, mask := &c.w[first%chunkBits/wordBits], uint64(1)<<(first%wordBits)
		if w.Load()&mask == 0 && w.Or(mask)&mask == 0 {
			c.n.Add(1)
		}
		return
	}
	for first < end {
		c := d.chunk(first / chunkBits)
		stop := min(end, (first/chunkBits+1)*chunkBits)
		c.set(first%chunkBits, stop-first)
		first = stop
	}
}

// span are the granules that [off, off+n) touches.
func (b *Bitmap) span(d *directory, off, n int64) (first, end int64) {
	if n <= 0 || off >= d.size {
		return 0, 0
	}
	return off >> b.shift, b.granules(min(off+n, d.size))
}

// chunk is the i-th one, made if need be.
func (d *directory) chunk(i int64) *chunk {
	p := &d.chunks[i]
	c := p.Load()
	if c == nil {
		c = new(chunk)
		if !p.CompareAndSwap(nil, c) {
			c = p.Load()
		}
	}
	return c
}

// masks calls f for the words of [first, first+n) within a chunk.
func masks(first, n int64, f func(word int64, mask uint64)) {
	for n > 0 {
		at := first % wordBits
		k := min(n, wordBits-at)
		f(first/wordBits, (^uint64(0)>>(wordBits-k))<<at)
		first, n = first+k, n-k
	}
}

func (c *chunk) set(first, n int64) {
	masks(first, n, func(i int64, mask uint64) {
		w := &c.w[i]
		if w.Load()&mask == mask {
			return
		}
		if fresh := mask &^ w.Or(mask); fresh != 0 {
			c.n.Add(int64(bits.OnesCount64(fresh)))
		}
	})
}

// Clear clears every granule that [off, off+n) touches. Callers that must lose nothing align the range.
func (b *Bitmap) Clear(off, n int64) {
	d := b.dir.Load()
	first, end := b.span(d, off, n)
	for first < end {
		stop := min(end, (first/chunkBits+1)*chunkBits)
		if c := d.chunks[first/chunkBits].Load(); c != nil {
			masks(first%chunkBits, stop-first, func(i int64, mask uint64) {
				if gone := c.w[i].And(^mask) & mask; gone != 0 {
					c.n.Add(-int64(bits.OnesCount64(gone)))
				}
			})
		}
		first = stop
	}
	if g := b.group.Load(); g != nil {
		// All of the granules that were cleared, not only what was asked for.
		first, end := b.span(d, off, n)
		g.cleared(first<<b.shift, (end-first)<<b.shift)
	}
}

// Get tells whether the granule at off is set; false beyond the end.
func (b *Bitmap) Get(off int64) bool {
	d := b.dir.Load()
	if off < 0 || off >= d.size {
		return false
	}
	g := off >> b.shift
	c := d.chunks[g/chunkBits].Load()
	return c != nil && c.w[g%chunkBits/wordBits].Load()>>(g%wordBits)&1 != 0
}

// Count is the number of set granules times the granularity, in bytes: the last granule counts in full.
func (b *Bitmap) Count() int64 {
	d := b.dir.Load()
	var n int64
	for i := range d.chunks {
		if c := d.chunks[i].Load(); c != nil {
			n += c.n.Load()
		}
	}
	return n << b.shift
}

// Empty tells whether no granule is set.
func (b *Bitmap) Empty() bool { return b.Count() == 0 }

// next is the first granule of [g, end) that is set (want) or clear (!want); end if there is none.
func (d *directory) next(g, end int64, want bool) int64 {
	for g < end {
		c := d.chunks[g/chunkBits].Load()
		if c == nil || c.n.Load() == 0 {
			if !want {
				return g
			}
			g = (g/chunkBits + 1) * chunkBits
			continue
		}
		w := c.w[g%chunkBits/wordBits].Load()
		if !want {
			w = ^w
		}
		if w >>= g % wordBits; w != 0 {
			return min(g+int64(bits.TrailingZeros64(w)), end)
		}
		g = (g/wordBits + 1) * wordBits
	}
	return end
}

// NextDirty is the first run of set granules in [off, end): where it begins, and its length, both cut to the range. ok is false if
// there is none.
func (b *Bitmap) NextDirty(off, end int64) (at, n int64, ok bool) {
	d := b.dir.Load()
	if end = min(end, d.size); off >= end {
		return 0, 0, false
	}
	last := b.granules(end)
	first := d.next(off>>b.shift, last, true)
	if first >= last {
		return 0, 0, false
	}
	stop := d.next(first, last, false)
	at = max(first<<b.shift, off)
	return at, min(stop<<b.shift, end) - at, true
}

// NextClean is the first byte of [off, end) whose granule is not set.
func (b *Bitmap) NextClean(off, end int64) (at int64, ok bool) {
	d := b.dir.Load()
	if end = min(end, d.size); off >= end {
		return 0, false
	}
	last := b.granules(end)
	g := d.next(off>>b.shift, last, false)
	if g >= last {
		return 0, false
	}
	return max(g<<b.shift, off), true
}

// SetAll sets all granules.
func (b *Bitmap) SetAll() { b.Set(0, b.Size()) }

// Take empties b and returns what it held. Granules that are set at the same time are in one of the two. Not for use beside Resize.
func (b *Bitmap) Take() *Bitmap {
	old := &Bitmap{shift: b.shift}
	size := b.Size()
	old.dir.Store(b.dir.Swap(b.newDirectory(size)))
	b.regroup()
	return old
}

// Clone is a copy of b.
func (b *Bitmap) Clone() *Bitmap {
	c := New(b.Size(), b.Granularity())
	c.Merge(b)
	return c
}

// Resize changes the size. What is new is clear, what is cut off is forgotten. Set may run at the same time, but not a second Resize.
func (b *Bitmap) Resize(size int64) {
	old := b.dir.Load()
	if size < old.size {
		// The rest of the last granule stays, as its beginning does.
		cut := b.granules(size) << b.shift
		b.Clear(cut, old.size-cut)
	}
	d := b.newDirectory(size)
	for i := range d.chunks {
		if i < len(old.chunks) {
			d.chunks[i].Store(old.chunk(int64(i)))
		}
	}
	b.dir.Store(d)
	b.regroup()
}

// regroup tells the group that anything may be clear now.
func (b *Bitmap) regroup() {
	if g := b.group.Load(); g != nil {
		g.forget()
	}
}

// Merge sets in b what is set in from, which may be of another granularity.
func (b *Bitmap) Merge(from *Bitmap) {
	src, dst := from.dir.Load(), b.dir.Load()
	if from.shift != b.shift || src.size != dst.size {
		for at, n, ok := from.NextDirty(0, src.size); ok; at, n, ok = from.NextDirty(at+n, src.size) {
			b.Set(at, n)
		}
		return
	}
	for i := range src.chunks {
		c := src.chunks[i].Load()
		if c == nil || c.n.Load() == 0 {
			continue
		}
		to := dst.chunk(int64(i))
		for k := range c.w {
			if w := c.w[k].Load(); w != 0 {
				if fresh := w &^ to.w[k].Or(w); fresh != 0 {
					to.n.Add(int64(bits.OnesCount64(fresh)))
				}
			}
		}
	}
}

// AppendBytes appends the granules from first on, a multiple of 8, as n bytes: bit 0 of a byte is the lowest granule, as qcow2 stores them.
// Beyond the end there are zeroes.
func (b *Bitmap) AppendBytes(dst []byte, first, n int64) []byte {
	d := b.dir.Load()
	for ; n > 0; n, first = n-1, first+8 {
		var x byte
		if i := first / chunkBits; i < int64(len(d.chunks)) {
			if c := d.chunks[i].Load(); c != nil {
				if at := first % chunkBits; at%wordBits == 0 && n >= 8 {
					dst = binary.LittleEndian.AppendUint64(dst, c.w[at/wordBits].Load())
					n, first = n-7, first+56
					continue
				} else {
					x = byte(c.w[at/wordBits].Load() >> (at % wordBits))
				}
			}
		}
		dst = append(dst, x)
	}
	return dst
}

// LoadBytes sets the granules from first on, a multiple of 8, that are set in src, which is as AppendBytes makes it.
func (b *Bitmap) LoadBytes(first int64, src []byte) {
	total := b.Granules()
	for i, x := range src {
		for x != 0 {
			g := first + int64(i)*8 + int64(bits.TrailingZeros8(x))
			if g >= total {
				return
			}
			b.Set(g<<b.shift, 1)
			x &= x - 1
		}
	}
}
