package throttle

import (
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/schema/types"
)

// The filter in a group without limits and in one that is limited in every way, but never holds
// anything up.
func TestSuite(t *testing.T) {
	const much = 1 << 40
	wide := NoLimits()
	for _, i := range []int{bpsRead, bpsWrite, iopsRead, iopsWrite} {
		wide.rates[i] = rate{much, 2 * much, 2}
	}
	wide.size = 4096
	for name, l := range map[string]Limits{"none": NoLimits(), "wide": wide} {
		t.Run(name, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					file := drivertest.MustBuild(t, g, drivertest.Spec{
						Options: graph.Options{Name: "mem", Kind: graph.Protocol, ReadOnly: ro},
						Open:    drivertest.Opened(drivertest.NewMemFile(size)),
					})
					return throttled(t, g, file, NewGroup("g", l, nil), ro)
				},
			})
		})
	}
}

// throttled puts a filter of the group on a node.
func throttled(t *testing.T, g *graph.Graph, below *graph.Node, group *Group, ro bool) *graph.Node {
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: below.Name() + "-throttled", DriverName: "throttle", Kind: graph.Filter, ReadOnly: ro},
		Children: []drivertest.Child{drivertest.FilteredFile(below)},
		Open: func(x *driver.Opening) (graph.Driver, error) {
			x.Objects = only{group}
			return Def.Open(x, &types.BlockdevOptionsThrottle{ThrottleGroup: "g"})
		},
	})
}

// only is the only object.
type only struct{ g *Group }

func (o only) Object(string) any { return o.g }
