// Package bitmap holds sets of granules of an address space: which parts of a disk were written. It
// is pure: no I/O, no clock, no wait.
//
// A Bitmap is a tree. Parts of it in which no granule is set, or all are, take no memory, however
// large they are:
//
//	directory   slot   slot   nil (none is set)   full (all are) ...  one level: up to 16 Mi granules
//	              |
//	branch      slot   nil   full ...                                 for each further factor of 64
//	              |
//	leaf        n = 3   0100...0011                             4096 granules, and how many are set
//
// Setting is one atomic operation on a word, none where the granule is set already, so that
// requests can do it side by side without a lock. Finding, counting, merging and copying take time
// for what is neither empty nor full.
//
// A bitmap with a limit (SetLimit) that has reached it sets more than it was asked for, the
// granules of a whole leaf at least, where that saves memory: nothing that was set is forgotten,
// only where exactly.
package bitmap

import (
	"math/bits"
	"sync/atomic"
)

// Bitmap is a set of granules of [0, Size()). Set, Clear and the methods that only read may run at
// the same time; those that change the size or the whole say what they need.
type Bitmap struct {
	shift uint // log2 of the granularity
	dir   atomic.Pointer[directory]
	group atomic.Pointer[Group] // that is to hear of granules that are cleared; nil: none
	limit atomic.Int64          // of bytes; 0: none
	bytes atomic.Int64          // of the nodes of the tree; what races with Clear of all may be counted twice
}

// New makes an empty bitmap of size bytes. granularity is in bytes, a power of two.
func New(size, granularity int64) *Bitmap {
	if size < 0 || granularity <= 0 || granularity&(granularity-1) != 0 {
		panic("bitmap: bad size or granularity")
	}
	b := &Bitmap{shift: uint(bits.TrailingZeros64(uint64(granularity)))}
	b.dir.Store(newDirectory(size, b.granules(size)))
	return b
}

// granules is how many there are in size bytes.
func (b *Bitmap) granules(size int64) int64 {
	g := size >> b.shift
	if g<<b.shift < size {
		g++
	}
	return g
}

// Size is the length of the address space in bytes.
func (b *Bitmap) Size() int64 { return b.dir.Load().size }

// Granularity is the length of a granule in bytes.
func (b *Bitmap) Granularity() int64 { return 1 << b.shift }

// Granules is the number of granules, the last one of which may be cut off by the end.
func (b *Bitmap) Granules() int64 { return b.granules(b.Size()) }

// Memory is about what the bitmap takes, in bytes.
func (b *Bitmap) Memory() int64 { return b.bytes.Load() + int64(len(b.dir.Load().sub))*8 }

// SetLimit bounds the memory that Set takes, in bytes: beyond it more is set than was asked for;
// see the package comment. What Clear needs is not bounded. 0: no limit.
func (b *Bitmap) SetLimit(bytes int64) { b.limit.Store(bytes) }

// crowded tells whether the limit is reached and all granules of the slot at lo may be set instead:
// none of them is beyond the end.
func (b *Bitmap) crowded(lo int64, shift uint) bool {
	l := b.limit.Load()
	return l != 0 && b.bytes.Load() >= l && lo>>shift<<shift+1<<shift <= b.Granules()
}

// Set sets every granule that [off, off+n) touches; what lies beyond the end is left out. It
// allocates at most when a leaf is touched for the first time.
func (b *Bitmap) Set(off, n int64) {
	d := b.dir.Load()
	first, end := b.span(d, off, n)
	if first+1 == end {
		// The usual small write: mostly a look at a granule that is set already.
		switch c := d.at(first); c {
		case full:
			return
		case nil:
		default:
			i, mask := first>>6%leafWords, uint64(1)<<(first%wordBits)
			if c.w.load(i)&mask == 0 && c.w.or(i, mask) != 0 {
				c.n.Add(1)
			}
			return
		}
	}
	b.set(d.sub, d.shift, 0, first, end)
}

// span are the granules that [off, off+n) touches.
func (b *Bitmap) span(d *directory, off, n int64) (first, end int64) {
	if n <= 0 || off >= d.size {
		return 0, 0
	}
	return off >> b.shift, b.granules(off + min(n, d.size-off))
}

// Clear clears every granule that [off, off+n) touches. Callers that must lose nothing align the
// range. It allocates where it clears a part of what is set as a whole.
func (b *Bitmap) Clear(off, n int64) {
	d := b.dir.Load()
	first, end := b.span(d, off, n)
	b.clear(d.sub, d.shift, 0, first, end)
	if g := b.group.Load(); g != nil {
		// All of the granules that were cleared, not only what was asked for.
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
	switch n := d.at(g); n {
	case nil:
		return false
	case full:
		return true
	default:
		return n.w.load(g>>6%leafWords)>>(g%wordBits)&1 != 0
	}
}

// Count is the number of set granules times the granularity, in bytes: the last granule counts in
// full.
func (b *Bitmap) Count() int64 {
	d := b.dir.Load()
	return count(d.sub, d.shift) << b.shift
}

// Empty tells whether no granule is set.
func (b *Bitmap) Empty() bool {
	_, _, dirty := b.NextDirty(0, b.Size())
	return !dirty
}

// NextDirty is the first run of set granules in [off, end): where it begins, and its length, both
// cut to the range. ok is false if there is none.
func (b *Bitmap) NextDirty(off, end int64) (at, n int64, ok bool) {
	d := b.dir.Load()
	if end = min(end, d.size); off >= end {
		return 0, 0, false
	}
	last := b.granules(end)
	first := next(d.sub, d.shift, 0, off>>b.shift, last, true)
	if first >= last {
		return 0, 0, false
	}
	at = max(first<<b.shift, off)
	stop := next(d.sub, d.shift, 0, first, last, false)
	if stop < last {
		end = stop << b.shift
	}
	return at, end - at, true
}

// NextClean is the first byte of [off, end) whose granule is not set.
func (b *Bitmap) NextClean(off, end int64) (at int64, ok bool) {
	d := b.dir.Load()
	if end = min(end, d.size); off >= end {
		return 0, false
	}
	last := b.granules(end)
	g := next(d.sub, d.shift, 0, off>>b.shift, last, false)
	if g >= last {
		return 0, false
	}
	return max(g<<b.shift, off), true
}

// SetAll sets all granules.
func (b *Bitmap) SetAll() { b.Set(0, b.Size()) }

// Take empties b and returns what it held. Granules that are set at the same time are in one of the
// two. Not for use beside Resize.
func (b *Bitmap) Take() *Bitmap {
	old := &Bitmap{shift: b.shift}
	size := b.Size()
	old.dir.Store(b.dir.Swap(newDirectory(size, b.granules(size))))
	old.bytes.Store(b.bytes.Swap(0))
	old.limit.Store(b.limit.Load())
	b.regroup()
	return old
}

// Like is an empty bitmap of the same size and granularity.
func (b *Bitmap) Like() *Bitmap { return New(b.Size(), b.Granularity()) }

// Clone is a copy of b, with its limit.
func (b *Bitmap) Clone() *Bitmap {
	c := b.Like()
	c.limit.Store(b.limit.Load())
	c.Merge(b)
	return c
}

// Resize changes the size. What is new is clear, what is cut off is forgotten. Set may run at the
// same time, but not a second Resize.
func (b *Bitmap) Resize(size int64) {
	old := b.dir.Load()
	// Both directories lead to the same nodes.
	b.dir.Store(old.grown(size, b.granules(size)))
	if size < old.size {
		// The rest of the last granule stays, as its beginning does.
		b.clear(old.sub, old.shift, 0, b.granules(size), b.granules(old.size))
	}
	b.regroup()
}

// regroup tells the group that anything may be clear now.
func (b *Bitmap) regroup() {
	if g := b.group.Load(); g != nil {
		g.forget()
	}
}
