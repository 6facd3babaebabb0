package copybeforewrite_test

import (
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

func TestSuite(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		Fixed:  true,
		Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			disk := drivertest.MustBuild(t, g, drivertest.Spec{
				Options: graph.Options{Name: "disk", Kind: graph.Protocol, ReadOnly: ro},
				Open:    drivertest.Opened(drivertest.NewMemFile(size)),
			})
			target := drivertest.AddNode(t, g, "target", drivertest.NewMemFile(size))
			return drivertest.MustBuild(t, g, drivertest.Spec{
				Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter, ReadOnly: ro},
				Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
				Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
			})
		},
	})
}
