package copyonread

import (
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/schema/types"
)

// TestSuite: the filter above a file without a backing file changes nothing. What it copies is told
// by recorded conversations.
func TestSuite(t *testing.T) {
	mem := "mem"
	for name, o := range map[string]*types.BlockdevOptionsCor{"all": {}, "bottom": {Bottom: &mem}} {
		t.Run(name, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					// The file is writable in any case: the filter needs that.
					file := drivertest.AddNode(t, g, "mem", drivertest.NewMemFile(size))
					return drivertest.MustBuild(t, g, drivertest.Spec{
						Options:  graph.Options{Name: "c", DriverName: "copy-on-read", Kind: graph.Filter, ReadOnly: ro},
						Children: []drivertest.Child{drivertest.FilteredFile(file)},
						Open:     Def.With(o),
					})
				},
			})
		})
	}
}
