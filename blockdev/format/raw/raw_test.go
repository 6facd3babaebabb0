package raw_test

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

func open(g *graph.Graph, file *graph.Node, offset, size *int64) (*graph.Node, error) {
	o := &types.BlockdevOptionsRaw{Offset: offset, Size: size}
	return drivertest.Build(g, drivertest.Spec{
		Options:  graph.Options{Name: "r", Kind: graph.Format, DriverName: "raw"},
		Children: []drivertest.Child{{Name: "file", Role: raw.Def.Children(o)[0].Role, Node: file}},
		Open:     raw.Def.With(o)})
}

func p(n int64) *int64 { return &n }

// Texts as QEMU's, and sizes rounded up to sectors.
func TestOpen(t *testing.T) {
	for _, c := range []struct {
		offset, size *int64
		want         int64
		err          string
	}{
		{nil, nil, 4096, ""},
		{p(13), nil, 4096, ""},
		{p(4096), nil, 0, ""},
		{p(512), p(1024), 1024, ""},
		{nil, p(0), 0, ""},
		{p(1), p(100), 0, "Specified size is not multiple of 512"},
		{p(4097), nil, 0, "Offset (4097) cannot be greater than size of the containing file (4096)"},
		{p(4096), p(512), 0, "The sum of offset (4096) and size (512) has to be smaller or equal to the  actual size of the containing file (4096)"},
		{p(-1), nil, 0, "Parameter 'offset' expects a non-negative number below 2^64"},
		{nil, p(-1), 0, "Parameter 'size' expects a non-negative number below 2^64"},
	} {
		g := drivertest.NewGraph(t)
		n, err := open(g, drivertest.AddNode(t, g, "f", drivertest.NewMemFile(4096)), c.offset, c.size)
		switch {
		case c.err == "" && err != nil, c.err != "" && (err == nil || err.Error() != c.err):
			t.Errorf("error %v, want %q", err, c.err)
		case c.err == "" && n.Size() != c.want:
			t.Errorf("size %d, want %d", n.Size(), c.want)
		}
		if err != nil && g.Node("r") != nil {
			t.Error("a node was left behind")
		}
	}
}

// A fixed window is not resized, and nothing leaks out of it.
func TestWindow(t *testing.T) {
	g := drivertest.NewGraph(t)
	mem := drivertest.NewMemFile(8192)
	n, err := open(g, drivertest.AddNode(t, g, "f", mem), p(1024), p(1024))
	if err != nil {
		t.Fatal(err)
	}
	root := drivertest.AddRoot(t, g, n, perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.All})
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	b := make([]byte, 2048)
	for i := range b {
		b[i] = 1
	}
	if err := root.WriteAt(r, blk.Buf(b), 0, blk.Grow); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write over the edge: %v", err)
	}
	if err := root.WriteAt(r, blk.Buf(b[:1024]), 0, 0); err != nil {
		t.Error(err)
	}
	for i, c := range mem.Bytes() {
		if want := i >= 1024 && i < 2048; (c == 1) != want {
			t.Fatalf("byte %d is %d", i, c)
		}
	}
	if err := root.Resize(r.Ctx, 512, true, ""); err == nil || err.Error() != "Cannot resize fixed-size raw disks" {
		t.Errorf("resize: %v", err)
	}
}

// Without a window raw opens on a read-only file; only a writer is refused.
func TestReadOnlyFile(t *testing.T) {
	g := drivertest.NewGraph(t)
	f := drivertest.MustBuild(t, g, drivertest.Spec{Options: graph.Options{Name: "f", Kind: graph.Protocol, ReadOnly: true},
		Open: drivertest.Opened(drivertest.NewMemFile(4096))})
	n, err := open(g, f, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	drivertest.AddRoot(t, g, n, drivertest.Reader)
	tx := g.Begin(context.Background())
	defer tx.Abort()
	_, err = tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n)
	if err == nil {
		err = tx.Commit()
	}
	if err == nil || err.Error() != "Block node is read-only" {
		t.Errorf("a writer: %v", err)
	}
}
