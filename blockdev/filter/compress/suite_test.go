package compress

import (
	"errors"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

const cluster = 4096

// packing is a file that takes writes only if they are whole clusters to be compressed.
type packing struct {
	*drivertest.MemFile
	t *testing.T
}

func (p *packing) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if f&blk.Compressed == 0 || !blk.IsAligned(off, v.Len(), cluster) {
		p.t.Errorf("written [%d, +%d) with flags %b", off, v.Len(), f)
	}
	return p.MemFile.WriteAt(r, v, off, f&^blk.Compressed)
}

func newPacking(t *testing.T, size int64) *packing {
	return &packing{drivertest.NewMemFileOptions(size, drivertest.MemOptions{
		Limits: blk.Limits{ClusterSize: cluster}, WriteFlags: blk.FUA | blk.WriteUnchanged | blk.Compressed,
		ZeroFlags: blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
	}), t}
}

func build(t *testing.T, g *graph.Graph, d graph.Driver, ro bool) *graph.Node {
	file := drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "mem", DriverName: "packing", Kind: graph.Protocol, ReadOnly: ro},
		Open:    drivertest.Opened(d),
	})
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "c", DriverName: "compress", Kind: graph.Filter, ReadOnly: ro},
		Children: []drivertest.Child{drivertest.FilteredFile(file)}, Open: Def.With(&types.BlockdevOptionsGenericFormat{}),
	})
}

// TestSuite: whatever is written reaches the file as whole clusters to be compressed.
func TestSuite(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		Size:   1<<20 + cluster,
		Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			return build(t, g, newPacking(t, size), ro)
		},
	})
}

// TestRefused: what is below must be able to compress, and nothing is copied past the filter.
func TestRefused(t *testing.T) {
	g := drivertest.NewGraph(t)
	n := build(t, g, newPacking(t, 1<<20), false)
	r := &blk.Req{Ctx: t.Context()}
	err := n.Driver().(graph.CopyRanger).CopyFrom(r, 0, []blk.HostRange{{FD: -1, N: cluster}}, 0)
	if !errors.Is(err, blk.ErrNotSupported) {
		t.Error(err)
	}
	above := drivertest.Spec{
		Options:  graph.Options{Name: "d", DriverName: "compress", Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(n)}, Open: Def.With(&types.BlockdevOptionsGenericFormat{}),
	}
	const refused = "Compression is not supported for underlying format: compress"
	if _, err := drivertest.Build(g, above); err == nil || err.Error() != refused {
		t.Error(err)
	}
}
