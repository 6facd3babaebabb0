package graph_test

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

var everything = perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.WriteUnchanged | perm.Resize, Share: perm.All}

func begin(t testing.TB, root *graph.Root) *blk.Req {
	t.Helper()
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.End(r) })
	return r
}

func node(t testing.TB, g *graph.Graph, d graph.Driver, change func(*drivertest.Spec)) *graph.Node {
	t.Helper()
	s := drivertest.Spec{Options: graph.Options{Name: "n", Kind: graph.Protocol}, Open: drivertest.Opened(d)}
	if change != nil {
		change(&s)
	}
	return drivertest.MustBuild(t, g, s)
}

func fill(c byte, n int) blk.Vec { return blk.Buf(bytes.Repeat([]byte{c}, n)) }

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestDetectZeroes(t *testing.T) {
	for _, c := range []struct {
		mode          types.BlockdevDetectZeroesOptions
		zeros, writes int64
	}{
		{types.BlockdevDetectZeroesOptionsOff, 0, 3},
		{types.BlockdevDetectZeroesOptionsOn, 2, 1},
		{types.BlockdevDetectZeroesOptionsUnmap, 2, 1},
	} {
		g := drivertest.NewGraph(t)
		m := drivertest.NewMemFile(1 << 20)
		n := node(t, g, m, func(s *drivertest.Spec) { s.Options.DetectZeroes = c.mode })
		root := drivertest.AddRoot(t, g, n, everything)
		r := begin(t, root)
		ok(t, root.WriteAt(r, fill(0, 4096), 0, 0))
		ok(t, root.WriteAt(r, blk.Bufs([][]byte{make([]byte, 100), make([]byte, 3996)}), 0, 0))
		ok(t, root.WriteAt(r, fill(1, 4096), 0, 0))
		if m.Zeros.Load() != c.zeros || m.Writes.Load() != c.writes {
			t.Errorf("%s: %d zeroes, %d writes", c.mode, m.Zeros.Load(), m.Writes.Load())
		}
		err := root.CopyFrom(r, 0, []blk.HostRange{{FD: -1, N: 4096}}, 0)
		if !errors.Is(err, blk.ErrNotSupported) {
			t.Errorf("%s: copy: %v", c.mode, err)
		}
	}
}

// discard=unmap decides about discards and about MayUnmap.
func TestDiscardModes(t *testing.T) {
	for _, off := range []bool{false, true} {
		g := drivertest.NewGraph(t)
		m := drivertest.NewMemFile(1 << 20)
		root := drivertest.AddRoot(t, g, node(t, g, m, func(s *drivertest.Spec) { s.NoDiscard = off }), everything)
		r := begin(t, root)
		ok(t, root.WriteAt(r, fill(1, 8192), 0, 0))
		ok(t, root.Discard(r, 0, 4096))
		if got := m.Discards.Load() == 0; got != off {
			t.Errorf("no discard: %v, discarded: %v", off, !got)
		}
	}
}

// FUA: native, or a flush after the write; a node that was not written to is not flushed.
func TestFlushGenerations(t *testing.T) {
	g := drivertest.NewGraph(t)
	m := drivertest.NewMemFileOptions(1<<20, drivertest.MemOptions{})
	root := drivertest.AddRoot(t, g, node(t, g, m, nil), everything)
	r := begin(t, root)
	steps := []struct {
		what string
		f    func() error
		want int64
	}{
		{"nothing written", func() error { return root.Flush(r) }, 0},
		{"write", func() error { return root.WriteAt(r, fill(1, 512), 0, 0) }, 0},
		{"flush", func() error { return root.Flush(r) }, 1},
		{"flush again", func() error { return root.Flush(r) }, 1},
		{"emulated FUA", func() error { return root.WriteAt(r, fill(1, 512), 0, blk.FUA) }, 2},
		{"after FUA", func() error { return root.Flush(r) }, 2},
		{"zero with FUA", func() error { return root.Zero(r, 0, 512, blk.FUA) }, 3},
		{"discard", func() error { return root.Discard(r, 0, 512) }, 3},
		{"flush the discard", func() error { return root.Flush(r) }, 4},
		{"resize", func() error { return root.Resize(r.Ctx, 2<<20, true, "") }, 4},
		{"flush the resize", func() error { return root.Flush(r) }, 5},
	}
	for _, s := range steps {
		ok(t, s.f())
		if n := m.Flushes.Load(); n != s.want {
			t.Errorf("%s: %d flushes, want %d", s.what, n, s.want)
		}
	}
	if nf := node(t, g, drivertest.NewMemFileOptions(512, drivertest.MemOptions{}), func(s *drivertest.Spec) {
		s.Options.Name, s.Options.NoFlush = "nf", true
	}); nf != nil {
		root := drivertest.AddRoot(t, g, nf, everything)
		q := begin(t, root)
		ok(t, root.WriteAt(q, fill(1, 512), 0, blk.FUA))
		if m := nf.Driver().(*drivertest.MemFile); m.Flushes.Load() != 0 {
			t.Error("cache.no-flush flushes")
		}
	}
}

// A failed flush is not forgotten: the next one asks the driver again.
func TestFailedFlush(t *testing.T) {
	g := drivertest.NewGraph(t)
	f := drivertest.NewFault(drivertest.NewMemFile(4096))
	root := drivertest.AddRoot(t, g, node(t, g, f, nil), everything)
	r := begin(t, root)
	ok(t, root.WriteAt(r, fill(1, 512), 0, 0))
	f.Inject(drivertest.Rule{Ops: drivertest.OpFlush, Count: 1, Err: syscall.ENOSPC})
	if err := root.Flush(r); !errors.Is(err, syscall.ENOSPC) || blk.Errno(err) != syscall.ENOSPC {
		t.Fatalf("flush: %v", err)
	}
	calls := f.Calls()
	ok(t, root.Flush(r))
	if f.Calls() != calls+1 {
		t.Error("the second flush was skipped")
	}
}

func TestWriteThreshold(t *testing.T) {
	g, sink := drivertest.NewGraphSink(t)
	n := node(t, g, drivertest.NewMemFile(1<<20), nil)
	root := drivertest.AddRoot(t, g, n, everything)
	r := begin(t, root)
	n.IO().SetWriteThreshold(8192)
	ok(t, root.WriteAt(r, fill(1, 4096), 4096, 0))
	if len(sink.Events()) != 0 {
		t.Fatal("an event below the threshold")
	}
	ok(t, root.WriteAt(r, fill(1, 4096), 8000, 0))
	ok(t, root.WriteAt(r, fill(1, 4096), 16384, 0))
	ev := sink.Events()
	if len(ev) != 1 || n.IO().WriteThreshold() != 0 {
		t.Fatalf("%d events, threshold %d", len(ev), n.IO().WriteThreshold())
	}
	e := ev[0].(*types.BlockWriteThresholdEvent)
	if e.NodeName != "n" || e.AmountExceeded != 3904 || e.WriteThreshold != 8192 {
		t.Errorf("%+v", *e)
	}
	if n.IO().Stats().WrHighestOffset != 20480 {
		t.Errorf("highest %d", n.IO().Stats().WrHighestOffset)
	}
}

// A child grows by what its parent writes beyond its end and reads as zeroes there; a root has to
// say so.
func TestGrowth(t *testing.T) {
	g := drivertest.NewGraph(t)
	m := drivertest.NewMemFile(1000)
	n := node(t, g, m, nil)
	up := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "fmt", Kind: graph.Format, DriverName: "qcow2"},
		Children: []drivertest.Child{drivertest.File(n)}, Open: drivertest.Opened(drivertest.NewMemFile(512))})
	root := drivertest.AddRoot(t, g, n, perm.Claim{Share: perm.All})
	r := begin(t, root)
	e := up.File()
	b := bytes.Repeat([]byte{9}, 3000)
	ok(t, e.ReadAt(r, blk.Buf(b), 500, 0))
	if !blk.IsZero(b) {
		t.Error("beyond the end there is something")
	}
	ok(t, e.ReadAt(r, fill(1, 10), 1<<40, 0))
	short := n.InfoGeneration()
	ok(t, e.WriteAt(r, fill(3, 100), 5000, 0))
	grown := n.InfoGeneration()
	ok(t, e.WriteAt(r, fill(3, 100), 5000, 0))
	if m.Size() != 5100 || grown == short || n.InfoGeneration() != grown {
		t.Errorf("size %d, generations %d, %d, %d", m.Size(), short, grown, n.InfoGeneration())
	}
	g2 := drivertest.NewGraph(t)
	m2 := drivertest.NewMemFile(512)
	root2 := drivertest.AddRoot(t, g2, node(t, g2, m2, nil), everything)
	r2 := begin(t, root2)
	if err := root2.WriteAt(r2, fill(1, 1024), 0, 0); !errors.Is(err, blk.ErrOutOfRange) || m2.Size() != 512 {
		t.Errorf("growing without saying so: %v", err)
	}
	ok(t, root2.WriteAt(r2, fill(1, 1024), 0, blk.Grow))
	if m2.Size() != 1024 {
		t.Error("did not grow")
	}
}

func TestZeroNoFallback(t *testing.T) {
	g := drivertest.NewGraph(t)
	m := drivertest.NewMemFileOptions(8192, drivertest.MemOptions{
		Limits: blk.Limits{RequestAlign: 512}, ZeroFlags: blk.NoFallback, NoZero: true})
	root := drivertest.AddRoot(t, g, node(t, g, m, nil), everything)
	r := begin(t, root)
	for _, n := range []int64{512, 100} {
		if err := root.Zero(r, 0, n, blk.NoFallback); !errors.Is(err, blk.ErrNotSupported) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if m.Writes.Load() != 0 {
		t.Error("something was written")
	}
	ok(t, root.Zero(r, 0, 512, 0))
	if m.Writes.Load() != 1 {
		t.Error("no fallback")
	}
}

func TestAccount(t *testing.T) {
	g := drivertest.NewGraph(t)
	f := drivertest.NewFault(drivertest.NewMemFile(8192))
	n := node(t, g, f, nil)
	root := drivertest.AddRoot(t, g, n, everything)
	var a graph.Account
	root.SetAccount(&a)
	r := begin(t, root)
	if s := a.Stats(n); s.IdleTimeNs != nil {
		t.Error("idle before the first request")
	}
	ok(t, root.WriteAt(r, fill(1, 4096), 0, 0))
	ok(t, root.ReadAt(r, fill(1, 512), 0, 0))
	ok(t, root.Discard(r, 0, 512))
	ok(t, root.Flush(r))
	_ = root.ReadAt(r, fill(1, 512), 8192, 0)
	f.FailAt(0, nil)
	_ = root.WriteAt(r, fill(1, 512), 0, 0)
	a.Merged(1, 2, 3)
	s := a.Stats(n)
	for what, got := range map[string][2]int64{
		"wr_bytes": {s.WrBytes, 4096}, "rd_bytes": {s.RdBytes, 512}, "unmap_bytes": {s.UnmapBytes, 512},
		"operations": {s.RdOperations + s.WrOperations + s.FlushOperations + s.UnmapOperations, 4},
		"invalid":    {s.InvalidRdOperations, 1}, "failed": {s.FailedWrOperations, 1},
		"highest": {s.WrHighestOffset, 4096}, "merged": {s.RdMerged + s.WrMerged + s.UnmapMerged, 6},
	} {
		if got[0] != got[1] {
			t.Errorf("%s: %d, want %d", what, got[0], got[1])
		}
	}
	if s.IdleTimeNs == nil || *s.IdleTimeNs < 0 {
		t.Error("no idle time")
	}
}
