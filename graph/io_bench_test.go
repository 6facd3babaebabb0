package graph_test

import (
	"context"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/blockdev/protocol/null"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// stack is a root over so many raw nodes over d, with a unit of work begun.
func stack(t testing.TB, d graph.Driver, raws int) (*graph.Root, *blk.Req) {
	g := drivertest.NewGraph(t)
	n := drivertest.AddNode(t, g, "bottom", d)
	for range raws {
		n = drivertest.MustBuild(t, g, drivertest.Spec{Options: graph.Options{Kind: graph.Format, DriverName: "raw"},
			Children: []drivertest.Child{drivertest.FilteredFile(n)}, Open: raw.Def.With(&types.BlockdevOptionsRaw{})})
	}
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.End(r) })
	return root, r
}

func nullDriver(t testing.TB) graph.Driver {
	d, err := null.Co.Open(&driver.Opening{}, &types.BlockdevOptionsNull{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// A request of 4 KiB allocates nothing on its way down.
func TestNoAllocations(t *testing.T) {
	if graph.RaceEnabled {
		t.Skip("the race detector makes pools allocate")
	}
	for _, c := range []struct {
		name string
		d    graph.Driver
	}{{"null", nullDriver(t)}, {"memory", drivertest.NewMemFile(1 << 20)}} {
		root, r := stack(t, c.d, 1)
		root.SetAccount(&graph.Account{})
		v := blk.Buf(make([]byte, 4096))
		for _, op := range []struct {
			name string
			f    func() error
		}{
			{"read", func() error { return root.ReadAt(r, v, 8192, 0) }},
			{"write", func() error { return root.WriteAt(r, v, 8192, 0) }},
			{"write+FUA", func() error { return root.WriteAt(r, v, 8192, blk.FUA) }},
			{"flush", func() error { return root.Flush(r) }},
			{"status", func() error { _, err := root.Status(r, 8192, 4096); return err }},
			{"unit", func() error {
				q := root.TryBegin()
				defer root.End(q)
				return root.ReadAt(q, v, 0, 0)
			}},
		} {
			var err error
			if n := testing.AllocsPerRun(200, func() { err = op.f() }); n != 0 || err != nil {
				t.Errorf("raw over %s, %s: %v allocations, %v", c.name, op.name, n, err)
			}
		}
	}
}

func benchLayers(b *testing.B, op func(root *graph.Root, r *blk.Req) error) {
	for _, raws := range []int{0, 1, 4} {
		b.Run([]string{"null", "raw", "", "", "raw4"}[raws], func(b *testing.B) {
			root, r := stack(b, nullDriver(b), raws)
			b.ReportAllocs()
			for b.Loop() {
				if err := op(root, r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRead4K(b *testing.B) {
	v := blk.Buf(make([]byte, 4096))
	benchLayers(b, func(root *graph.Root, r *blk.Req) error { return root.ReadAt(r, v, 4096, 0) })
}

func BenchmarkWrite4K(b *testing.B) {
	v := blk.Buf(make([]byte, 4096))
	benchLayers(b, func(root *graph.Root, r *blk.Req) error { return root.WriteAt(r, v, 4096, 0) })
}

func BenchmarkWrite4KParallel(b *testing.B) {
	root, _ := stack(b, nullDriver(b), 1)
	v := blk.Buf(make([]byte, 4096))
	b.RunParallel(func(p *testing.PB) {
		r, err := root.Begin(context.Background())
		if err != nil {
			b.Error(err)
			return
		}
		defer root.End(r)
		for p.Next() {
			if err := root.WriteAt(r, v, 4096, 0); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkIsZero64K(b *testing.B) {
	v := blk.Buf(make([]byte, 64<<10))
	b.SetBytes(64 << 10)
	for b.Loop() {
		if !v.IsZero() {
			b.Fatal("not zero")
		}
	}
}
