package graph_test

import (
	"context"
	"fmt"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

func newBitmap(t testing.TB, n *graph.Node, s graph.DirtyBitmapSpec) *graph.DirtyBitmap {
	t.Helper()
	d, err := n.Bitmaps().New(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDirtyBitmaps(t *testing.T) {
	const k = 1 << 10
	root, r := stack(t, drivertest.NewMemFile(100*k), 0)
	n := root.Node()
	a := newBitmap(t, n, graph.DirtyBitmapSpec{Name: "a", Granularity: 4 * k})
	b := newBitmap(t, n, graph.DirtyBitmapSpec{Name: "b", Granularity: k, Disabled: true})
	want := func(what string, wantA, wantB int64) {
		t.Helper()
		if a.Bits().Count() != wantA*k || b.Bits().Count() != wantB*k {
			t.Errorf("%s: %d and %d KiB dirty, want %d and %d", what, a.Bits().Count()/k, b.Bits().Count()/k, wantA, wantB)
		}
	}
	ops := func(off int64) {
		t.Helper()
		if err := root.WriteAt(r, blk.Buf(make([]byte, k)), off, 0); err != nil {
			t.Fatal(err)
		}
		if err := root.Zero(r, off+8*k, k, 0); err != nil {
			t.Fatal(err)
		}
		if err := root.ReadAt(r, blk.Buf(make([]byte, k)), off+16*k, 0); err != nil {
			t.Fatal(err)
		}
	}
	ops(0)
	want("write, zero", 8, 0)
	b.Enable()
	ops(k)
	want("enabled", 8, 2)
	a.Freeze()
	ops(32 * k)
	want("frozen", 8, 4)
	if err := a.Check(graph.BitmapRead); err == nil || !a.Busy() || !a.Enabled() {
		t.Error("a frozen bitmap is not busy", err)
	}
	a.Reclaim()
	want("reclaimed", 16, 4)
	a.Freeze()
	ops(64 * k)
	a.Abdicate()
	want("abdicated", 8, 6)
	if err := root.Resize(context.Background(), 200*k, true, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	if err := root.WriteAt(r, blk.Buf(make([]byte, k)), 199*k, 0); err != nil {
		t.Fatal(err)
	}
	want("grown", 12, 7)
	if _, err := n.Bitmaps().New(graph.DirtyBitmapSpec{Name: "a"}); err == nil {
		t.Error("a second bitmap of the same name")
	}
	a.Remove()
	if n.Bitmaps().Find("a") != nil || n.Bitmaps().Find("b") != b || len(n.Bitmaps().States()) != 1 {
		t.Error("removed, or not")
	}
	ops(0)
	want("removed", 12, 9)
}

// What bitmaps cost a write of 4 KiB.
func BenchmarkDirtyBitmaps(b *testing.B) {
	for _, count := range []int{0, 1, 16} {
		b.Run(fmt.Sprintf("%d", count), func(b *testing.B) {
			root, r := stack(b, nullDriver(b), 0)
			for i := range count {
				newBitmap(b, root.Node(), graph.DirtyBitmapSpec{Name: fmt.Sprint(i)})
			}
			v := blk.Buf(make([]byte, 4096))
			size := root.Size()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if err := root.WriteAt(r, v, int64(i)*4096%size, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A bitmap that is cleared while its node grows has the size of the node afterwards.
func TestClearBesideResize(t *testing.T) {
	root, r := stack(t, drivertest.NewMemFile(1<<20), 0)
	d := newBitmap(t, root.Node(), graph.DirtyBitmapSpec{Name: "d", Granularity: 4096})
	stop, started, over := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		d.Take()
		close(started)
		for {
			select {
			case <-stop:
				return
			default:
				d.Take()
			}
		}
	}()
	<-started
	const sizes = 5000
	for i := int64(2); i < sizes; i++ {
		if err := root.Resize(context.Background(), i<<20, true, blk.PreallocOff); err != nil {
			t.Fatal(err)
		}
		if have := d.Bits().Size(); have != i<<20 {
			t.Fatalf("the bitmap has %d bytes, the node %d", have, i<<20)
		}
	}
	close(stop)
	<-over
	if err := root.WriteAt(r, blk.Buf(make([]byte, 4096)), (sizes-2)<<20, 0); err != nil || !d.Bits().Get((sizes-2)<<20) {
		t.Error("a write was not recorded", err)
	}
}

// What a discard may have changed is dirty; what the node's options keep from the driver is not. A
// request names a bitmap that does not record it.
func TestDiscardIsRecorded(t *testing.T) {
	for _, unmap := range []bool{false, true} {
		g := drivertest.NewGraph(t)
		n := drivertest.AddNode(t, g, "n", drivertest.NewMemFile(1<<20))
		root := drivertest.AddRoot(t, g, n, drivertest.Writer)
		o := *n.Options()
		o.Discard = unmap
		tx := g.Begin(context.Background())
		if err := tx.SetOptions(n, &o); err != nil {
			t.Fatal(err)
		}
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
		spec := graph.DirtyBitmapSpec{Granularity: 4096}
		a, b := newBitmap(t, n, spec), newBitmap(t, n, spec)
		r, err := root.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		r.Unrecorded = b.Bits()
		if err := root.Discard(r, 8192, 8192); err != nil {
			t.Fatal(err)
		}
		r.Unrecorded = nil
		want := int64(0)
		if unmap {
			want = 8192
		}
		if got := a.Bits().Count(); got != want || b.Bits().Count() != 0 {
			t.Errorf("unmap %v: %d bytes dirty, want %d; %d in the other", unmap, got, want, b.Bits().Count())
		}
		root.End(r)
	}
}

// TestUnmergeAfterGrowth: what was written to a node that has grown since a merge stays recorded
// when the merge is undone, also in the granule that was the last one.
func TestUnmergeAfterGrowth(t *testing.T) {
	const k = 1 << 10
	root, r := stack(t, drivertest.NewMemFile(k), 0)
	n := root.Node()
	d := newBitmap(t, n, graph.DirtyBitmapSpec{Granularity: 64 * k})
	more := bitmap.New(k, 64*k)
	more.SetAll()
	undo, _ := d.Merge(more)
	if err := root.Edge().Resize(t.Context(), 64*k, true, ""); err != nil {
		t.Fatal(err)
	}
	if err := root.WriteAt(r, blk.Buf(make([]byte, k)), 32*k, 0); err != nil {
		t.Fatal(err)
	}
	undo()
	if !d.Bits().Get(32 * k) {
		t.Error("the write is forgotten")
	}
}
