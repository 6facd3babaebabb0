package graph_test

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// Each call of the driver fails once, before or after its effect: the error surfaces with its
// errno, nothing stays registered or in flight, and the next attempt succeeds.
func TestEveryCallFails(t *testing.T) {
	limits := blk.Limits{RequestAlign: 512, MemAlign: 512, MaxTransfer: 4096,
		ZeroAlign: 1024, MaxZero: 8192, DiscardAlign: 4096, MaxDiscard: 8192}
	for _, op := range []struct {
		name string
		f    func(root *graph.Root, r *blk.Req) error
	}{
		{"unaligned read", func(root *graph.Root, r *blk.Req) error { return root.ReadAt(r, fill(0, 20000), 100, 0) }},
		{"small write", func(root *graph.Root, r *blk.Req) error { return root.WriteAt(r, fill(1, 100), 500, 0) }},
		{"large write", func(root *graph.Root, r *blk.Req) error { return root.WriteAt(r, fill(1, 90000), 100, blk.FUA) }},
		{"growing write", func(root *graph.Root, r *blk.Req) error {
			return root.WriteAt(r, fill(1, 9000), 1<<20-100, blk.Grow)
		}},
		{"unaligned zero", func(root *graph.Root, r *blk.Req) error {
			return root.Zero(r, 100, 40000, blk.FUA|blk.MayUnmap)
		}},
		{"discard", func(root *graph.Root, r *blk.Req) error { return root.Discard(r, 100, 60000) }},
		{"copy on read", func(root *graph.Root, r *blk.Req) error {
			return root.ReadAt(r, fill(0, 3000), 100, blk.CopyOnRead)
		}},
		{"resize", func(root *graph.Root, r *blk.Req) error { return root.Resize(r.Ctx, 1<<19, true, "") }},
		{"copy", func(root *graph.Root, r *blk.Req) error {
			return root.CopyFrom(r, 0, []blk.HostRange{{FD: -1, N: 20480}}, 0)
		}},
	} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s after=%v", op.name, after), func(t *testing.T) {
				for i := 0; ; i++ {
					g := drivertest.NewGraph(t)
					options := drivertest.MemOptions{Limits: limits, ZeroFlags: blk.MayUnmap}
					f := drivertest.NewFault(drivertest.NewMemFileOptions(1<<20, options))
					n := node(t, g, f, nil)
					root := drivertest.AddRoot(t, g, n, everything)
					r := begin(t, root)
					f.Inject(drivertest.Rule{Skip: i, Count: 1, Err: syscall.ENOSPC, AfterEffect: after})
					err := op.f(root, r)
					if n.IO().InFlight() != 0 {
						t.Fatalf("call %d: %d in flight", i, n.IO().InFlight())
					}
					if f.Failed() == 0 {
						f.Clear()
						if err != nil && !(errors.Is(err, blk.ErrNotSupported) && op.name == "copy") {
							t.Fatalf("without failure: %v", err)
						}
						if i == 0 && op.name != "copy" {
							t.Fatal("the driver was not called")
						}
						return
					}
					if !errors.Is(err, syscall.ENOSPC) {
						t.Fatalf("call %d: error %v", i, err)
					}
					q := begin(t, root)
					q.NoWait = true // would meet what is still registered
					ok(t, root.WriteAt(q, fill(1, 4096), 0, 0))
					ok(t, op.f(root, r))
				}
			})
		}
	}
}

// A write into the last, incomplete block makes it complete, and those above hear of it.
func TestGrowthByPadding(t *testing.T) {
	g := drivertest.NewGraph(t)
	m := drivertest.NewMemFileOptions(5120, drivertest.MemOptions{Limits: blk.Limits{RequestAlign: 4096}})
	n := node(t, g, m, nil)
	root := drivertest.AddRoot(t, g, n, everything)
	short := n.InfoGeneration()
	r := begin(t, root)
	ok(t, root.WriteAt(r, fill(1, 512), 4608, 0))
	if m.Size() != 8192 || n.InfoGeneration() == short {
		t.Errorf("size %d, generation %d, was %d", m.Size(), n.InfoGeneration(), short)
	}
}

func BenchmarkGrowingWrite(b *testing.B) {
	g := drivertest.NewGraph(b)
	m := &endless{}
	n := node(b, g, m, nil)
	root := drivertest.AddRoot(b, g, n, everything)
	r := begin(b, root)
	v := fill(1, 512)
	b.ReportAllocs()
	for b.Loop() {
		if err := root.WriteAt(r, v, m.size, blk.Grow); err != nil {
			b.Fatal(err)
		}
	}
}

// endless keeps nothing but its size.
type endless struct{ size int64 }

func (e *endless) Caps() graph.Caps { return graph.Caps{} }
func (e *endless) Size() int64      { return e.size }
func (e *endless) Close() error     { return nil }
func (e *endless) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return nil
}
func (e *endless) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	e.size = max(e.size, off+v.Len())
	return nil
}
