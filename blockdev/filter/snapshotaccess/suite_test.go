package snapshotaccess_test

import (
	"bytes"
	"context"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/blockdev/filter/snapshotaccess"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// content is what the disk has when its point in time begins.
func content(b []byte, off int64) {
	for i := range b {
		if at := off + int64(i); at/70000%3 != 1 {
			b[i] = byte(at>>9 + at)
		}
	}
}

// TestSuite: the view shows the point in time, of which guests have overwritten a part.
func TestSuite(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		ReadOnly: true, Content: content,
		Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			was := make([]byte, size)
			content(was, 0)
			disk := drivertest.AddNode(t, g, "disk", drivertest.MemFileOf(was))
			target := drivertest.AddNode(t, g, "target", drivertest.NewMemFile(size))
			cbw := drivertest.MustBuild(t, g, drivertest.Spec{
				Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
				Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
				Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
			})
			overwrite(t, g, cbw)
			return drivertest.MustBuild(t, g, drivertest.Spec{
				Options:  graph.Options{Name: "sa", DriverName: "snapshot-access", Kind: graph.Format, ReadOnly: ro},
				Children: []drivertest.Child{{Name: "file", Role: perm.Data | perm.Primary, Node: cbw}},
				Open:     snapshotaccess.Def.With(&types.BlockdevOptionsGenericFormat{}),
			})
		},
	})
}

// overwrite is a guest that writes to n here and there.
func overwrite(t *testing.T, g *graph.Graph, n *graph.Node) {
	guest := drivertest.AddRoot(t, g, n, drivertest.Writer)
	r, err := guest.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer guest.End(r)
	for off := int64(5000); off < guest.Size()-9000; off += 200_000 {
		if err := guest.WriteAt(r, blk.Buf(bytes.Repeat([]byte{0xEE}, 9000)), off, 0); err != nil {
			t.Fatal(err)
		}
	}
}
