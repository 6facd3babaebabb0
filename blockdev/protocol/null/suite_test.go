package null_test

import (
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/protocol/null"
	"qblockd/graph"
	"qblockd/schema/types"
)

func TestSuite(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		NoContent: true, Fixed: true,
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			zeroes := true
			return drivertest.MustBuild(t, g, drivertest.Spec{
				Options: graph.Options{Name: "null", Kind: graph.Protocol, ReadOnly: ro},
				Open:    null.Co.With(&types.BlockdevOptionsNull{Size: &size, ReadZeroes: &zeroes})})
		},
	})
}
