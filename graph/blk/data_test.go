package blk

import (
	"math/rand/v2"
	"testing"
)

func TestIsZero(t *testing.T) {
	for n := range 70 {
		b := make([]byte, n)
		if !IsZero(b) {
			t.Fatalf("%d zeroes are not zero", n)
		}
		for i := range b {
			b[i] = 1
			if IsZero(b) || Bufs([][]byte{make([]byte, 9), b}).IsZero() {
				t.Fatalf("byte %d of %d was overlooked", i, n)
			}
			b[i] = 0
		}
	}
	if z := Zeroes(ZeroMax); len(z) != ZeroMax || !Aligned(z, 4096) || !IsZero(z) {
		t.Error("Zeroes")
	}
}

func TestPool(t *testing.T) {
	for _, n := range []int{0, 1, 511, 512, 4096, 4097, 65536, 1 << 20, 2 << 20, 2<<20 + 1} {
		for _, align := range []int{0, 1, 512, 4096, 65536} {
			b := GetBuf(n, align)
			if len(b.B) != n || align > 0 && n > 0 && !Aligned(b.B, align) || n > 0 && !Aligned(b.B, 4096) {
				t.Errorf("%d bytes aligned to %d: %d bytes at %p", n, align, len(b.B), b.B)
			}
			for i := range b.B {
				b.B[i] = byte(i)
			}
			PutBuf(b)
		}
	}
	PutBuf(nil)
}

func TestVecAligned(t *testing.T) {
	m := GetBuf(8192, 0).B
	for _, c := range []struct {
		v    Vec
		mem  int
		size int64
		want bool
	}{
		{Buf(m[:100]), 1, 1, true},
		{Buf(m[:512]), 4096, 512, true},
		{Buf(m[:100]), 512, 512, false},
		{Buf(m[100:612]), 512, 512, false},
		{Buf(m[512:1024]), 512, 512, true},
		{Bufs([][]byte{m[:100], m[100:512]}), 1, 512, false},
		{Bufs([][]byte{m[:512], nil, m[1024:2048]}), 512, 512, true},
		{Bufs([][]byte{m[:512], m[1:513]}), 512, 512, false},
	} {
		if got := c.v.Aligned(c.mem, c.size); got != c.want {
			t.Errorf("%d bytes, memory %d, size %d: %v", c.v.Len(), c.mem, c.size, got)
		}
	}
}

func TestPad(t *testing.T) {
	for range 2000 {
		align := int64(1) << rand.IntN(17)
		off, n := rand.Int64N(1<<20), 1+rand.Int64N(1<<18)
		p := Pad(off, n, align)
		if p.Off%align != 0 || p.N%align != 0 || p.Off+p.Head != off || p.N-p.Head-p.Tail != n ||
			p.Head >= align || p.Tail >= align || p.Needed() != !IsAligned(off, n, align) {
			t.Fatalf("[%d, +%d) to %d: %+v", off, n, align, p)
		}
	}
}

// Pieces make up the whole, keep to the limit, stay multiples of the small alignment and
// never join the unaligned ends with the middle.
func TestPiece(t *testing.T) {
	for range 3000 {
		small := int64(1) << rand.IntN(10)
		align := small << rand.IntN(6)
		most := int64(0)
		if rand.IntN(2) > 0 {
			most = small * (1 + rand.Int64N(100))
		}
		off, n := rand.Int64N(1000)*small, (1+rand.Int64N(500))*small
		end := off + n
		for steps := 0; n > 0; steps++ {
			k := Piece(off, n, align, most)
			switch {
			case k <= 0, k > n, most > 0 && k > most, k%small != 0, steps > 2000:
				t.Fatalf("piece %d at %d of %d, align %d, most %d", k, off, n, align, most)
			case off%align != 0 && off/align != (off+k-1)/align:
				t.Fatalf("piece %d at %d crosses out of the head", k, off)
			case off%align == 0 && k > align && k%align != 0:
				t.Fatalf("piece %d at %d, end %d: the tail hangs on", k, off, end)
			}
			off, n = off+k, n-k
		}
	}
}

func TestRanges(t *testing.T) {
	for _, c := range []struct {
		off, n int64
		want   bool
	}{
		{0, 0, true}, {-1, 1, false}, {0, -1, false},
		{MaxSize, 0, true}, {MaxSize, 1, false}, {1, MaxSize, false}, {1<<63 - 1, 1<<63 - 1, false},
	} {
		if ValidRange(c.off, c.n) != c.want {
			t.Errorf("[%d, +%d)", c.off, c.n)
		}
	}
	if Overlap(0, 10, 10, 5) || !Overlap(0, 11, 10, 5) || Overlap(5, 0, 0, 10) || !Overlap(3, 1, 0, 10) {
		t.Error("Overlap")
	}
}
