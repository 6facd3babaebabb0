package blkverify

import (
	"bytes"
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

func TestSuite(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			n, _, _ := verified(t, g, size, ro)
			return n
		},
	})
}

// verified puts the filter on two files of memory.
func verified(
	t *testing.T, g *graph.Graph, size int64, ro bool,
) (*graph.Node, *drivertest.MemFile, *drivertest.MemFile) {
	rawFile, testFile := drivertest.NewMemFile(size), drivertest.NewMemFile(size)
	mem := func(name string, f *drivertest.MemFile) *graph.Node {
		return drivertest.MustBuild(t, g, drivertest.Spec{
			Options: graph.Options{Name: name, Kind: graph.Protocol, ReadOnly: ro}, Open: drivertest.Opened(f)})
	}
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "v", DriverName: "blkverify", Kind: graph.Filter, ReadOnly: ro},
		Children: []drivertest.Child{
			{Name: "raw", Role: perm.Filtered | perm.Primary, Node: mem("mem-raw", rawFile)},
			{Name: "test", Role: perm.Data, Node: mem("mem-test", testFile)}},
		Open: Def.With(&types.BlockdevOptionsBlkverify{}),
	}), rawFile, testFile
}

// TestDifference: what the two do not agree about fails, and so does everything later; what they
// agree about fails as it does there.
func TestDifference(t *testing.T) {
	const size = 1 << 20
	g := drivertest.NewGraph(t)
	n, _, test := verified(t, g, size, false)
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	do := func(f func(r *blk.Req) error) error {
		t.Helper()
		r, err := root.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer root.End(r)
		return f(r)
	}
	read := func(off int64) error {
		return do(func(r *blk.Req) error { return root.ReadAt(r, blk.Buf(make([]byte, 4096)), off, 0) })
	}
	write := func(off int64) error {
		return do(func(r *blk.Req) error { return root.WriteAt(r, blk.Buf(bytes.Repeat([]byte{7}, 4096)), off, blk.FUA) })
	}
	if err := errors.Join(write(8192), read(8192), read(0)); err != nil {
		t.Fatal(err)
	}
	test.Poke(5000, []byte{1})
	if err := errors.Join(read(0), read(8192)); err != nil {
		t.Fatalf("where nothing differs: %v", err)
	}
	for _, err := range []error{read(4096), read(0), write(0)} {
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("after a difference: %v", err)
		}
	}
	if test.Bytes()[0] != 0 {
		t.Error("was written to after a difference")
	}
}
