package blk

// MaxSize is the largest size of a node: QEMU's limit, a multiple of every alignment in
// use.
const MaxSize = 1<<63 - 1<<30

// ValidRange tells whether [off, off+n) is a range at all: nothing negative, no overflow.
func ValidRange(off, n int64) bool {
	return off >= 0 && n >= 0 && off <= MaxSize-n
}

// AlignDown is the largest multiple of align, a power of two, that is at most x. x is not negative.
func AlignDown(x, align int64) int64 { return x &^ (align - 1) }

// AlignUp is the smallest multiple of align, a power of two, that is at least x. x is not negative.
func AlignUp(x, align int64) int64 { return (x + align - 1) &^ (align - 1) }

// Inner are the blocks of align bytes, a power of two, that lie in [off, end) in full, of a node of
// size bytes: its last block may be shorter. If there are none, lo is hi.
func Inner(off, end, align, size int64) (lo, hi int64) {
	lo, hi = AlignUp(off, align), AlignDown(end, align)
	if end >= size {
		hi = size
	}
	return lo, max(lo, hi)
}

// Outer are the blocks of align bytes, a power of two, that [off, end) touches, of a node of size
// bytes.
func Outer(off, end, align, size int64) (lo, hi int64) {
	return AlignDown(off, align), min(AlignUp(end, align), size)
}

// IsAligned tells whether off and n are multiples of align, a power of two.
func IsAligned(off, n, align int64) bool { return (off|n)&(align-1) == 0 }

// Overlap tells whether [a, a+an) and [b, b+bn) share a byte. Empty ranges share none.
func Overlap(a, an, b, bn int64) bool {
	return a < b+bn && b < a+an && an > 0 && bn > 0
}

// Padding is how an unaligned range is widened to whole blocks.
//
//	|<------ block ------>|        ...        |<------ block ------>|
//	|<- Head ->|<-------------- the range ---------->|<--- Tail --->|
type Padding struct {
	// Off, N: the widened range. N - Head - Tail is the length asked for.
	Off, N     int64
	Head, Tail int64
}

// Pad widens [off, off+n), n above 0, to multiples of align, a power of two.
func Pad(off, n, align int64) Padding {
	lo, hi := AlignDown(off, align), AlignUp(off+n, align)
	return Padding{Off: lo, N: hi - lo, Head: off - lo, Tail: hi - off - n}
}

// Needed tells whether anything was widened.
func (p Padding) Needed() bool { return p.Head|p.Tail != 0 }

// Piece is the length of the next request when [off, off+n), n above 0, is carried out in
// parts that never cross from the unaligned head to the aligned middle nor from there to
// the unaligned tail, and that are no longer than most (0: no limit; else at least align).
// align is a power of two, at least 1.
func Piece(off, n, align, most int64) int64 {
	p := n
	if head := off & (align - 1); head != 0 {
		p = min(p, align-head)
	} else if n > align {
		p = AlignDown(n, align)
	}
	if most > 0 && p > most {
		p = most
		if m := AlignDown(most, align); m > 0 && off&(align-1) == 0 {
			p = m
		}
	}
	return p
}
