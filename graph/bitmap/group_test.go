package bitmap

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// remember makes g have a chunk of flags, as writes that come again do.
func remember(g *Group, chunk uint64) {
	for g.word(chunk*regionsOfChunk) == nil {
		g.missed(chunk * regionsOfChunk)
	}
}

// TestGroupRemembers: writes all over a disk make no flags, those that come again do.
func TestGroupRemembers(t *testing.T) {
	const size, granule, far = int64(1) << 40, 64 << 10, 1 << 35
	g := NewGroup([]*Bitmap{New(size, granule)})
	for off := int64(0); off < size; off += 32 * granule {
		g.Set(off, 4096, nil)
	}
	for i := range g.chunks {
		if g.chunks[i].Load() != nil {
			t.Fatal("flags of regions to which nothing came twice")
		}
	}
	for range missesToMake + 1 {
		g.Set(far, 4096, nil)
	}
	if !g.Has(far, 4096) {
		t.Error("no flag of a region to which writes come again")
	}
}

// TestGroup sets and clears at random, through a group and beside it, and compares each bitmap with
// one that is alone.
func TestGroup(t *testing.T) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(3, seed))
		size := int64(1+rnd.IntN(200)) << 16
		var l, plain []*Bitmap
		for range 1 + rnd.IntN(4) {
			g := int64(512) << rnd.IntN(10)
			l, plain = append(l, New(size, g)), append(plain, New(size, g))
		}
		g := NewGroup(l)
		for range 3000 {
			if rnd.IntN(8) == 0 {
				remember(g, 0)
			}
			off := rnd.Int64N(size/512) * 512
			n := min(int64(1+rnd.IntN(32))*512, size-off)
			k := rnd.IntN(len(l))
			switch x := rnd.IntN(100); {
			case x < 70:
				g.Set(off, n, nil)
				for _, b := range plain {
					b.Set(off, n)
				}
			case x < 90:
				l[k].Clear(off, n)
				plain[k].Clear(off, n)
			case x < 96:
				l[k].Set(off, n)
				plain[k].Set(off, n)
			case x < 98:
				l[k].Take()
				plain[k].Take()
			case x < 99:
				size = max(1<<16, size+(rnd.Int64N(5)-2)<<16)
				for i := range l {
					l[i].Resize(size)
					plain[i].Resize(size)
				}
			default:
				g = NewGroup(l)
			}
		}
		for i := range l {
			both := l[i].Clone()
			both.Merge(plain[i])
			if both.Count() != l[i].Count() || both.Count() != plain[i].Count() {
				t.Fatalf("seed %d, bitmap %d: %d bytes set, want %d", seed, i, l[i].Count(), plain[i].Count())
			}
		}
	}
}

// TestGroupLosesNothing has writers that write and then set, and copiers that clear and then copy
// what was written: in the end, when nothing is set any more, the copy is what was written last.
func TestGroupLosesNothing(t *testing.T) {
	const granule, granules, rounds = 4096, 64, 20000
	l := []*Bitmap{New(granule*granules, granule), New(granule*granules, 4*granule), New(granule*granules, granule)}
	g := NewGroup(l)
	remember(g, 0)
	var disk [granules]atomic.Int64
	var copied [2][granules]int64
	read := func(i int, b *Bitmap, k int64) {
		b.Clear(k*granule, granule)
		n := b.Granularity() / granule
		for j := k / n * n; j < k/n*n+n; j++ {
			copied[i][j] = disk[j].Load()
		}
	}
	var writers, copiers sync.WaitGroup
	var done atomic.Bool
	for w := range 2 {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for range rounds {
				k := rnd.Int64N(granules)
				disk[k].Add(1)
				g.Set(k*granule, granule, nil)
			}
		})
	}
	for i := range copied {
		copiers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 2))
			for !done.Load() {
				if k := rnd.Int64N(granules); l[i].Get(k * granule) {
					read(i, l[i], k)
				}
			}
			for k := range int64(granules) {
				if l[i].Get(k * granule) {
					read(i, l[i], k)
				}
			}
		})
	}
	writers.Wait()
	done.Store(true)
	copiers.Wait()
	for i := range copied {
		for k := range disk {
			if copied[i][k] != disk[k].Load() {
				t.Fatalf("bitmap %d, granule %d: copy %d of %d was the last", i, k, copied[i][k], disk[k].Load())
			}
		}
	}
}

// TestGroupOutdated: who has set everything before another one cleared some of it does not get its
// flag in.
func TestGroupOutdated(t *testing.T) {
	for name, undo := range map[string]func(b *Bitmap){
		"clear":  func(b *Bitmap) { b.Clear(4096, 4096) },
		"take":   func(b *Bitmap) { b.Take() },
		"resize": func(b *Bitmap) { b.Resize(4096); b.Resize(1 << 20) },
	} {
		b := New(1<<20, 4096)
		g := NewGroup([]*Bitmap{b, New(1<<20, 8192)})
		remember(g, 0)
		w := g.word(1)
		was := w.Load()
		g.Set(4096, 4096, nil)
		w.Store(was) // as if it had been about to enter the flag
		undo(b)
		w.CompareAndSwap(was, was|1<<1)
		if g.Set(4096, 4096, nil); !b.Get(4096) {
			t.Errorf("%s: a write is lost", name)
		}
	}
}
