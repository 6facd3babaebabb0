package blkdebug

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func ptr[T any](v T) *T { return &v }

func open(t *testing.T, o types.BlockdevOptionsBlkdebug) (*drivertest.MemFile, *graph.Root, *blk.Req) {
	t.Helper()
	g := drivertest.NewGraph(t)
	mem := drivertest.NewMemFile(1 << 20)
	image := drivertest.AddNode(t, g, "image", mem)
	child := drivertest.FilteredFile(image)
	child.Name = "image"
	n := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "d", DriverName: "blkdebug", Kind: graph.Filter},
		Children: []drivertest.Child{child},
		Open: func(x *graph.Opening) (graph.Driver, error) {
			x.Options = &o
			return Open(x)
		},
	})
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.End(r) })
	return mem, root, r
}

func TestRules(t *testing.T) {
	_, root, r := open(t, types.BlockdevOptionsBlkdebug{InjectError: []*types.BlkdebugInjectErrorOptions{
		{Iotype: ptr(types.BlkdebugIOTypeRead), Sector: ptr(int64(8)), Errno: ptr(int64(28))},
		{Iotype: ptr(types.BlkdebugIOTypeWrite), Once: ptr(true)},
		{Iotype: ptr(types.BlkdebugIOTypeFlush), Errno: ptr(int64(30)), Once: ptr(true)},
		{Iotype: ptr(types.BlkdebugIOTypeBlockStatus)},
	}})
	v := blk.Buf(make([]byte, 4096))
	status := func() error { _, err := root.Status(r, 0, 512); return err }
	for i, c := range []struct {
		got, want error
	}{
		{root.ReadAt(r, v, 0, 0), nil},
		{root.ReadAt(r, v, 4096, 0), syscall.ENOSPC},
		{root.ReadAt(r, v, 8192, 0), nil},
		{root.ReadAt(r, v, 512, 0), syscall.ENOSPC}, // it ends in the sector
		{root.WriteAt(r, v, 0, 0), syscall.EIO},
		{root.WriteAt(r, v, 0, 0), nil},
		{root.Flush(r), syscall.EROFS},
		{root.Zero(r, 0, 4096, 0), nil},
		{root.Discard(r, 0, 4096), nil},
		{status(), syscall.EIO},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("request %d: %v, want %v", i, c.got, c.want)
		}
	}
}

// Requests that reach the image keep the limits.
func TestLimits(t *testing.T) {
	mem, root, r := open(t, types.BlockdevOptionsBlkdebug{Align: ptr(int64(4096)), MaxTransfer: ptr(int32(8192))})
	if err := root.WriteAt(r, blk.Buf([]byte("unaligned")), 4093, 0); err != nil {
		t.Fatal(err)
	}
	if err := root.WriteAt(r, blk.Buf(make([]byte, 64<<10)), 1<<16, 0); err != nil {
		t.Fatal(err)
	}
	if got := string(mem.Bytes()[4093:4102]); got != "unaligned" {
		t.Errorf("%q", got)
	}
}
