package bitmap

import (
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// dumb is the same with a bool a granule.
type dumb struct {
	size, gran int64
	set        []bool
}

func newDumb(size, gran int64) *dumb {
	return &dumb{size, gran, make([]bool, (size+gran-1)/gran)}
}

func (d *dumb) each(off, n int64, f func(i int64)) {
	for i := range d.set {
		lo := int64(i) * d.gran
		if n > 0 && lo < off+n && off < min(lo+d.gran, d.size) {
			f(int64(i))
		}
	}
}

func (d *dumb) resize(size int64) {
	fresh := newDumb(size, d.gran)
	copy(fresh.set, d.set)
	*d = *fresh
}

func (d *dumb) merge(o *dumb) {
	for i, set := range o.set {
		if set {
			lo := int64(i) * o.gran
			d.each(lo, min(lo+o.gran, o.size)-lo, func(k int64) { d.set[k] = true })
		}
	}
}

func check(t *rapid.T, b *Bitmap, d *dumb) {
	t.Helper()
	count := int64(0)
	for i, set := range d.set {
		if b.Get(int64(i)*d.gran) != set {
			t.Fatalf("granule %d: %v", i, !set)
		}
		if set {
			count++
		}
	}
	if b.Count() != count*d.gran || b.Size() != d.size || b.Empty() != (count == 0) {
		t.Fatalf("count %d, want %d; size %d, want %d", b.Count(), count*d.gran, b.Size(), d.size)
	}
}

func checkRuns(t *rapid.T, b *Bitmap, d *dumb, off, end int64) {
	t.Helper()
	dirty := func(x int64) bool { return d.set[x/d.gran] }
	at, n, ok := b.NextDirty(off, end)
	clean, cleanOK := b.NextClean(off, end)
	end = min(end, d.size)
	x := off
	for x < end && dirty(x) {
		x++
	}
	if cleanOK != (x < end) || cleanOK && clean != x {
		t.Fatalf("NextClean(%d, %d) = %d, %v, want %d", off, end, clean, cleanOK, x)
	}
	for x = off; x < end && !dirty(x); x++ {
	}
	if ok != (x < end) {
		t.Fatalf("NextDirty(%d, %d): %v", off, end, ok)
	}
	if ok {
		e := x
		for e < end && dirty(e) {
			e++
		}
		if at != x || n != e-x {
			t.Fatalf("NextDirty(%d, %d) = %d+%d, want %d+%d", off, end, at, n, x, e-x)
		}
	}
}

func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gran := int64(1) << rapid.IntRange(0, 4).Draw(t, "granularity")
		sizes := rapid.Int64Range(0, 40000)
		size := sizes.Draw(t, "size")
		b, d := New(size, gran), newDumb(size, gran)
		for range rapid.IntRange(1, 30).Draw(t, "ops") {
			off := rapid.Int64Range(0, max(d.size, 1)).Draw(t, "off")
			n := rapid.Int64Range(0, 3000).Draw(t, "n")
			switch rapid.IntRange(0, 6).Draw(t, "op") {
			case 0, 1:
				b.Set(off, n)
				d.each(off, n, func(i int64) { d.set[i] = true })
			case 2:
				b.Clear(off, n)
				d.each(off, n, func(i int64) { d.set[i] = false })
			case 3:
				size := sizes.Draw(t, "size")
				b.Resize(size)
				d.resize(size)
			case 4:
				g := int64(1) << rapid.IntRange(0, 4).Draw(t, "granularity")
				o, od := New(d.size, g), newDumb(d.size, g)
				o.Set(off, n)
				od.each(off, n, func(i int64) { od.set[i] = true })
				b.Merge(o)
				d.merge(od)
			case 5:
				raw := b.AppendBytes(nil, 0, (b.Granules()+7)/8+3)
				b = New(d.size, gran)
				b.LoadBytes(0, raw)
			case 6:
				c := b.Clone()
				old := b.Take()
				check(t, c, d)
				check(t, old, d)
				if !b.Empty() {
					t.Fatal("not empty")
				}
				b.Merge(old)
			}
			check(t, b, d)
			checkRuns(t, b, d, off, off+n)
		}
	})
}

func TestParallel(t *testing.T) {
	const size = 1 << 20
	b := New(size, 1)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for off := int64(g); off < size; off += 4 {
				b.Set(off, 1)
			}
		})
	}
	wg.Wait()
	if b.Count() != size {
		t.Error(b.Count())
	}
	for g := range 4 {
		wg.Go(func() {
			for off := int64(g); off < size; off += 4 {
				b.Clear(off, 1)
			}
		})
	}
	wg.Wait()
	if !b.Empty() {
		t.Error(b.Count())
	}
}

const tib, gran = 1 << 40, 64 << 10

func BenchmarkSet(b *testing.B) {
	m := New(tib, gran)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		m.Set(int64(i)*4096%(1<<30), 4096)
	}
}

// BenchmarkSetAnywhere sets granules all over the disk, most of which are not set yet, with a group
// as writes do.
func BenchmarkSetAnywhere(b *testing.B) {
	rnd := rand.New(rand.NewPCG(3, 4))
	at := make([]int64, 1<<19)
	for i := range at {
		at[i] = rnd.Int64N(tib)
	}
	b.ReportAllocs()
	var g *Group
	for i := 0; b.Loop(); i++ {
		if i%len(at) == 0 {
			g = NewGroup([]*Bitmap{New(tib, gran)})
		}
		if off := at[i%len(at)]; !g.Has(off, 1) {
			g.Set(off, 1, nil)
		}
	}
}

// BenchmarkGroupAgain: writes that find all set, with one bitmap.
func BenchmarkGroupAgain(b *testing.B) {
	g := NewGroup([]*Bitmap{New(tib, gran)})
	for i := 0; b.Loop(); i++ {
		if off := int64(i) * 4096 % (1 << 30); !g.Has(off, 4096) {
			g.Set(off, 4096, nil)
		}
	}
}

// scatter sets one granule of 32 at random.
func scatter(m *Bitmap) *Bitmap {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range m.Granules() / 32 {
		m.Set(rnd.Int64N(m.Size()), 1)
	}
	return m
}

func BenchmarkSetHuge(b *testing.B) {
	m := New(1<<61, 512)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		m.Set(1<<60+int64(i)*4096%(1<<20), 512)
	}
}

func BenchmarkMerge(b *testing.B) {
	from, to := scatter(New(tib, gran)), New(tib, gran)
	for b.Loop() {
		to.Merge(from)
	}
}

func BenchmarkClone(b *testing.B) {
	from := scatter(New(tib, gran))
	b.ReportAllocs()
	for b.Loop() {
		from.Clone()
	}
}

func BenchmarkMergeCoarser(b *testing.B) {
	from, to := New(tib, gran), New(tib, 1<<20)
	for off := int64(0); off < tib; off += 1 << 20 {
		from.Set(off, gran)
	}
	for b.Loop() {
		to.Merge(from)
	}
}

func BenchmarkTake(b *testing.B) {
	m := New(tib, gran)
	for b.Loop() {
		m.Take()
	}
}

func BenchmarkCount(b *testing.B) {
	m := scatter(New(tib, gran))
	for b.Loop() {
		m.Count()
	}
}

// BenchmarkRuns is a walk over the runs of a bitmap.
func BenchmarkRuns(b *testing.B) {
	m := scatter(New(tib, gran))
	for b.Loop() {
		for at, n, ok := m.NextDirty(0, tib); ok; at, n, ok = m.NextDirty(at+n, tib) {
		}
	}
}
