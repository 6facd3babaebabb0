package bitmap

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

// parts is the dumb implementation for address spaces of any size: it knows of the parts between
// some points only.
type parts struct {
	at  []int64 // points, the first is 0, the last the size
	set []bool  // of the part that begins at a point
}

func (p *parts) each(from, to int, f func(i int)) {
	for i := from; i < to; i++ {
		f(i)
	}
}

// next is the point of the first part from the i-th on that is set, or not; the last point if there
// is none.
func (p *parts) next(i int, want bool) int64 {
	for ; i < len(p.set); i++ {
		if p.set[i] == want {
			return p.at[i]
		}
	}
	return p.at[len(p.at)-1]
}

func (p *parts) count() (n int64) {
	for i, set := range p.set {
		if set {
			n += p.at[i+1] - p.at[i]
		}
	}
	return n
}

func checkParts(t *rapid.T, b *Bitmap, p *parts) {
	t.Helper()
	size := b.Size()
	if b.Count() != p.count() || b.Empty() != (p.count() == 0) {
		t.Fatalf("%d bytes set, want %d", b.Count(), p.count())
	}
	for i, at := range p.at[:len(p.set)] {
		if b.Get(at) != p.set[i] || b.Get(p.at[i+1]-1) != p.set[i] {
			t.Fatalf("[%d, %d) is %v, or the end of it", at, p.at[i+1], !p.set[i])
		}
		lo := p.next(i, true)
		x, n, ok := b.NextDirty(at, size)
		if ok != (lo < size) || ok && (x != lo || x+n != p.next(slices.Index(p.at, lo), false)) {
			t.Fatalf("dirty from %d on: %d+%d, %v, want %d", at, x, n, ok, lo)
		}
		clean, ok := b.NextClean(at, size)
		if want := p.next(i, false); ok != (want < size) || ok && clean != want {
			t.Fatalf("clean from %d on: %d, %v, want %d", at, clean, ok, want)
		}
	}
}

// points are some places of [0, size], multiples of unit.
func points(t *rapid.T, size, unit int64) []int64 {
	at := []int64{0, size}
	for range rapid.IntRange(1, 12).Draw(t, "points") {
		x := rapid.Int64Range(0, size/unit-1).Draw(t, "point")
		// Bounds of leaves and branches are where mistakes are.
		x >>= rapid.IntRange(0, 40).Draw(t, "low bits")
		if s := rapid.IntRange(0, 24).Draw(t, "shift"); x <= (size/unit-1)>>s {
			x <<= s
		}
		x = min(x, size/unit-1) + rapid.Int64Range(0, 1).Draw(t, "beside")
		at = append(at, min(x*unit, size))
	}
	slices.Sort(at)
	return slices.Compact(at)
}

// TestHuge compares bitmaps of up to 2^61 bytes with parts.
func TestHuge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		shift := rapid.IntRange(9, 31).Draw(t, "granularity")
		other := rapid.IntRange(9, 31).Draw(t, "other granularity")
		unit := int64(1) << max(shift, other)
		size := (1 + rapid.Int64Range(0, (1<<61)/unit-1).Draw(t, "size")>>rapid.IntRange(0, 20).Draw(t, "smaller")) * unit
		p := &parts{at: points(t, size, unit)}
		p.set = make([]bool, len(p.at)-1)
		b := New(size, 1<<shift)
		for range rapid.IntRange(1, 20).Draw(t, "ops") {
			i := rapid.IntRange(0, len(p.set)-1).Draw(t, "from")
			k := rapid.IntRange(i, len(p.set)).Draw(t, "to")
			lo, hi := p.at[i], p.at[k]
			op := rapid.IntRange(0, 5).Draw(t, "op")
			switch op {
			case 0, 1:
				b.Set(lo, hi-lo)
				p.each(i, k, func(i int) { p.set[i] = true })
			case 2:
				b.Clear(lo, hi-lo)
				p.each(i, k, func(i int) { p.set[i] = false })
			case 3:
				o := New(size, 1<<other)
				o.Set(lo, hi-lo)
				b.Merge(o)
				p.each(i, k, func(i int) { p.set[i] = true })
			case 4: // shorter, and as long again
				b.Resize(hi)
				b.Resize(size)
				p.each(k, len(p.set), func(i int) { p.set[i] = false })
			case 5:
				c, old := b.Clone(), b.Take()
				if !b.Empty() {
					t.Fatal("not empty")
				}
				checkParts(t, old, p)
				b = c
			}
			checkParts(t, b, p)
		}
		if m := b.Memory(); m > 1<<20 {
			t.Fatalf("takes %d bytes", m)
		}
	})
}

// TestGrow: a bitmap that gets larger step by step keeps what it has, while others set more.
func TestGrow(t *testing.T) {
	b := New(1, 512)
	var wg sync.WaitGroup
	var size atomic.Int64
	size.Store(1)
	for w := range 2 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 7))
			for size.Load() < 1<<61 {
				at := rnd.Int64N(size.Load())
				if b.Set(at, 1); !b.Get(at) {
					t.Errorf("%d is lost", at)
					return
				}
			}
		})
	}
	for s := int64(2); s <= 1<<61; s *= 2 {
		b.Resize(s)
		b.Set(s-1, 1)
		size.Store(s)
	}
	wg.Wait()
	for s := int64(2); s <= 1<<61; s *= 2 {
		if !b.Get(s - 1) {
			t.Errorf("%d is lost", s-1)
		}
	}
}

// memory is what f leaves on the heap, in bytes.
func memory(f func() any) int64 {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	x := f()
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(x)
	return int64(after.HeapAlloc) - int64(before.HeapAlloc)
}

// TestMemory: what is empty or full takes next to nothing, whatever its size, also with a group,
// and cleared as a whole it is given back.
func TestMemory(t *testing.T) {
	for _, size := range []int64{1 << 40, 1 << 61} {
		for _, gran := range []int64{512, 64 << 10, 1 << 31} {
			for name, f := range map[string]func(b *Bitmap){
				"empty":   func(b *Bitmap) {},
				"full":    func(b *Bitmap) { b.SetAll() },
				"cleared": func(b *Bitmap) { b.Set(4096, size-8192); b.Set(0, 1); b.Clear(0, size) },
				"few": func(b *Bitmap) {
					for i := range int64(10) {
						b.Set(size/10*i, 4096)
						b.Set(size/10*i+1<<32, 1<<33)
					}
				},
			} {
				got := memory(func() any {
					b := New(size, gran)
					f(b)
					c := b.Clone()
					c.Merge(b)
					return []any{b, c, NewGroup([]*Bitmap{b, c})}
				})
				if got > 512<<10 {
					t.Errorf("%s, %d bytes at %d: takes %d bytes", name, size, gran, got)
				}
			}
		}
	}
}

// TestAccount: Memory tells what a bitmap takes, to a part of it.
func TestAccount(t *testing.T) {
	var b *Bitmap
	real := memory(func() any { b = scatter(New(1<<38, 64<<10)); return b })
	if m := b.Memory(); m < real*3/4 || m > real*5/4 {
		t.Errorf("takes %d bytes, says %d", real, m)
	}
	b.Clear(0, b.Size())
	if m := b.Memory(); m != New(1<<38, 64<<10).Memory() {
		t.Errorf("empty, and takes %d bytes", m)
	}
}

// TestLimit: beyond its limit a bitmap forgets nothing, and takes no more memory.
func TestLimit(t *testing.T) {
	const size, limit = int64(1) << 61, 1 << 20
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, gran := range []int64{512, 64 << 10} {
		b, src := New(size, gran), New(size, gran)
		b.SetLimit(limit)
		var at []int64
		for range 6000 {
			x := rnd.Int64N(size)
			at = append(at, x)
			b.Set(x, 4096)
			src.Set(x, 4096)
		}
		merged, coarse, loaded := New(size, gran), New(size, 8*gran), New(size, gran)
		for _, m := range []*Bitmap{merged, coarse, loaded} {
			m.SetLimit(limit)
		}
		merged.Merge(src)
		coarse.Merge(src)
		for _, x := range at {
			word := x / gran &^ 63
			loaded.LoadBytes(word, src.AppendBytes(nil, word, 8))
		}
		for name, m := range map[string]*Bitmap{"set": b, "cloned": b.Clone(), "merged": merged, "coarser": coarse, "loaded": loaded} {
			for _, x := range at {
				if !m.Get(x) {
					t.Fatalf("%s: %d is lost", name, x)
				}
			}
			if have := m.Memory(); have > limit+limit/4 {
				t.Errorf("%s: takes %d bytes", name, have)
			}
		}
		// What is cleared is clear.
		for _, x := range at[:100] {
			x = x / gran * gran
			if b.Clear(x, gran); b.Get(x) {
				t.Fatalf("%d is still set", x)
			}
		}
	}
}

// TestBytes: what was stored is loaded, from any piece to any piece, with parts that are full.
func TestBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		granules := rapid.Int64Range(1, 40000).Draw(t, "granules")
		b := New(granules*512, 512)
		for range rapid.IntRange(0, 20).Draw(t, "runs") {
			at := rapid.Int64Range(0, granules-1).Draw(t, "at")
			b.Set(at*512, rapid.Int64Range(1, 12000).Draw(t, "n")*512)
		}
		piece := rapid.Int64Range(1, 3000).Draw(t, "piece")
		got := New(granules*512, 512)
		var whole []byte
		for at := int64(0); at*8 < granules; at += piece {
			raw := b.AppendBytes(nil, at*8, piece)
			whole = append(whole, raw...)
			got.LoadBytes(at*8, raw)
		}
		again := b.AppendBytes(nil, 0, int64(len(whole)))
		if !bytes.Equal(whole, again) || !bytes.Equal(got.AppendBytes(nil, 0, int64(len(whole))), whole) ||
			got.Count() != b.Count() {
			t.Fatal("not the same")
		}
		for i := range granules {
			if b.Get(i*512) != (whole[i/8]>>(i%8)&1 != 0) {
				t.Fatalf("granule %d", i)
			}
		}
	})
}

// TestClearLosesNothing has writers that write and then set, and copiers that clear, whole leaves
// and branches as well as parts of them, and then copy: in the end, when nothing is set any more,
// the copy is what was written last.
func TestClearLosesNothing(t *testing.T) {
	const places, rounds = 96, 4000
	// Places in a few leaves and branches of a tree with several levels.
	var at [places]int64
	for i := range at {
		at[i] = int64(i%2) + int64(i/2%2)*leafGran + int64(i/4%4)*leafGran*fan + int64(i/16)*leafGran*fan*fan
	}
	size := int64(leafGran) << 40
	b := New(size, 1)
	var disk [places]atomic.Int64
	var copied [places]int64
	var writers, others sync.WaitGroup
	var done atomic.Bool
	clear := func(lo, hi int64) {
		b.Clear(lo, hi-lo)
		for i, x := range at {
			if lo <= x && x < hi {
				copied[i] = disk[i].Load()
			}
		}
	}
	for w := range 2 {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for range rounds {
				i := rnd.IntN(places)
				disk[i].Add(1)
				if rnd.IntN(20) == 0 {
					span := int64(leafGran) << (fanShift * rnd.IntN(3)) // as a whole
					b.Set(at[i]/span*span, span)
				} else {
					b.Set(at[i], 1)
				}
			}
		})
	}
	others.Go(func() {
		rnd := rand.New(rand.NewPCG(5, 5))
		for !done.Load() {
			span := int64(leafGran) << (fanShift * rnd.IntN(3))
			if rnd.IntN(2) == 0 {
				span = 2 << rnd.IntN(4)
			}
			lo := at[rnd.IntN(places)] / span * span
			clear(lo, lo+span)
		}
	})
	others.Go(func() {
		for !done.Load() && !t.Failed() {
			readAll(t, b)
		}
	})
	writers.Wait()
	done.Store(true)
	others.Wait()
	for x, n, ok := b.NextDirty(0, size); ok; x, n, ok = b.NextDirty(x+n, size) {
		clear(x, x+n)
	}
	for i := range disk {
		if copied[i] != disk[i].Load() {
			t.Fatalf("place %d: copy %d of %d was the last", i, copied[i], disk[i].Load())
		}
	}
}

// readAll reads b in all ways while others change it: what is found must make sense.
func readAll(t *testing.T, b *Bitmap) {
	b.Clone().Merge(b)
	last := int64(0)
	for x, n, ok := b.NextDirty(0, b.Size()); ok; x, n, ok = b.NextDirty(x+n, b.Size()) {
		if x < last || n <= 0 {
			t.Errorf("a run of %d at %d after %d", n, x, last)
			return
		}
		last = x + n
	}
	b.Count()
}

// TestTakeLosesNothing: what is set while a bitmap is taken is in one of the two.
func TestTakeLosesNothing(t *testing.T) {
	const size = 1 << 34
	b, all := New(size, 512), New(size, 512)
	var wg sync.WaitGroup
	var done atomic.Bool
	var took []*Bitmap
	wg.Go(func() {
		for !done.Load() {
			took = append(took, b.Take())
		}
	})
	want := make([]int64, 20000)
	rnd := rand.New(rand.NewPCG(1, 9))
	for i := range want {
		want[i] = rnd.Int64N(size)
		b.Set(want[i], 1)
	}
	done.Store(true)
	wg.Wait()
	for _, x := range append(took, b) {
		all.Merge(x)
	}
	for _, x := range want {
		if !all.Get(x) {
			t.Fatalf("%d is lost", x)
		}
	}
}

// TestMergeNew: what a merge says was new, taken away again, leaves what there was before; with a
// limit, too, and with a last leaf that is cut off.
func TestMergeNew(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(1, 1<<40).Draw(t, "size")
		draw := func(name string) *Bitmap {
			b := New(size, 512)
			for range rapid.IntRange(0, 8).Draw(t, name) {
				at := rapid.Int64Range(0, size-1).Draw(t, "at")
				b.Set(at>>30<<30, rapid.Int64Range(1, 64<<20).Draw(t, "n")<<rapid.IntRange(0, 10).Draw(t, "shift"))
				b.Set(at, 1)
			}
			return b
		}
		b, from := draw("into"), draw("from")
		before, plain := b.Clone(), b.Clone()
		plain.Merge(from)
		if rapid.Bool().Draw(t, "limit") {
			b.SetLimit(1)
		}
		fresh := b.MergeNew(from)
		both := before.Clone()
		both.Merge(b)
		if both.Merge(plain); both.Count() != b.Count() || b.Count() > New(size, 512).Granules()*512 {
			t.Fatalf("%d bytes set, want %d", b.Count(), both.Count())
		}
		if b.Count() > before.Count()+fresh.Count() {
			t.Fatalf("%d bytes new, %d before and %d after", fresh.Count(), before.Count(), b.Count())
		}
		if b.MergeNew(from).Count() != 0 {
			t.Fatal("more is new the second time")
		}
		b.Subtract(fresh)
		if had := b.Count(); had != before.Count() {
			t.Fatalf("%d bytes are left, want %d", had, before.Count())
		}
		if before.Merge(b); before.Count() != b.Count() {
			t.Fatal("others are left")
		}
	})
}
