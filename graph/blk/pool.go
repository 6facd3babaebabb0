package blk

import (
	"math/bits"
	"sync"
	"unsafe"
)

const (
	// bufAlign is the address alignment of every pooled buffer: a page, enough for O_DIRECT
	// anywhere.
	bufAlign = 4096
	// Size classes are the powers of two from minClass to maxClass (as exponents).
	minClass = 12 // 4 KiB
	maxClass = 21 // 2 MiB
)

// Buffer is a piece of memory from the pool. B has the length asked for; its content is
// whatever was there before.
type Buffer struct {
	B     []byte
	mem   []byte // the whole class, aligned
	class int8   // index into bufPools; -1: not pooled
}

// bufPools[i] holds *Buffer of 1<<(minClass+i) bytes. Pointers go in and out, so nothing is boxed.
var bufPools [maxClass - minClass + 1]sync.Pool

// GetBuf returns a buffer of n bytes whose address is a multiple of align (a power of two,
// or 0). It blocks never; it allocates only when the pool is empty, n exceeds 2 MiB or
// align 4096. The caller owns the buffer until PutBuf.
func GetBuf(n, align int) *Buffer {
	if n < 0 || align&(align-1) != 0 {
		panic("blk: GetBuf: bad size or alignment")
	}
	if n > 1<<maxClass || align > bufAlign {
		m := alignedMem(n, max(align, bufAlign))
		return &Buffer{B: m, mem: m, class: -1}
	}
	c := 0
	if n > 1<<minClass {
		c = bits.Len(uint(n-1)) - minClass
	}
	if b, ok := bufPools[c].Get().(*Buffer); ok {
		b.B = b.mem[:n]
		return b
	}
	m := alignedMem(1<<(minClass+c), bufAlign)
	return &Buffer{B: m[:n], mem: m, class: int8(c)}
}

// PutBuf gives b back; nil is fine. Nobody may use its memory afterwards.
func PutBuf(b *Buffer) {
	if b == nil || b.class < 0 {
		return
	}
	b.B = nil
	bufPools[b.class].Put(b)
}

// alignedMem allocates n bytes at a multiple of align. The allocator places sizes of whole
// pages at page boundaries, though it does not promise to: the second try is for that.
func alignedMem(n, align int) []byte {
	m := make([]byte, n)
	if Aligned(m, align) {
		return m
	}
	m = make([]byte, n+align)
	skip := alignSkip(m, align)
	return m[skip : skip+n : skip+n]
}

// alignSkip is the number of bytes to skip from the start of b to reach a multiple of align.
func alignSkip(b []byte, align int) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & uintptr(align-1))
}

// Aligned tells whether b's address is a multiple of align, a power of two.
func Aligned(b []byte, align int) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&uintptr(align-1) == 0
}

// Aligned tells whether each buffer lies at a multiple of mem and has a length that is a
// multiple of size, both powers of two or at most 1: what O_DIRECT wants.
func (v Vec) Aligned(mem int, size int64) bool {
	if mem <= 1 && (len(v.more) == 0 || size <= 1) {
		return true
	}
	ok := func(b []byte) bool {
		return (size <= 1 || int64(len(b))&(size-1) == 0) && (mem <= 1 || len(b) == 0 || Aligned(b, mem))
	}
	if !ok(v.first) {
		return false
	}
	for _, b := range v.more {
		if !ok(b) {
			return false
		}
	}
	return true
}
