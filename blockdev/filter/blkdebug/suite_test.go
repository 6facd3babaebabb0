package blkdebug

import (
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/schema/types"
)

// The filter without rules, with and without limits of its own.
func TestSuite(t *testing.T) {
	for name, o := range map[string]*types.BlockdevOptionsBlkdebug{
		"plain": {},
		"limits": {
			Align: ptr(int64(512)), MaxTransfer: ptr(int32(16384)), OptWriteZero: ptr(int32(4096)),
			MaxDiscard: ptr(int32(65536)),
		},
	} {
		t.Run(name, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					image := drivertest.MustBuild(t, g, drivertest.Spec{
						Options: graph.Options{Name: "mem", Kind: graph.Protocol, ReadOnly: ro},
						Open:    drivertest.Opened(drivertest.NewMemFile(size)),
					})
					child := drivertest.FilteredFile(image)
					child.Name = "image"
					return drivertest.MustBuild(t, g, drivertest.Spec{
						Options:  graph.Options{Name: "d", DriverName: "blkdebug", Kind: graph.Filter, ReadOnly: ro},
						Children: []drivertest.Child{child},
						Open:     Def.With(o),
					})
				},
			})
		})
	}
}
