package blockdev

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
)

// catalog are the drivers that can be opened, and what they make of options and file names. It does
// not change.
type catalog struct {
	order   []*driver.Any
	drivers map[types.BlockdevDriver]*driver.Any
}

func newCatalog(l []*driver.Any) *catalog {
	c := &catalog{l, map[types.BlockdevDriver]*driver.Any{}}
	for _, d := range l {
		c.drivers[d.Name] = d
	}
	return c
}

// driverOf is the driver of n; nil for filters that only jobs make.
func (c *catalog) driverOf(n *graph.Node) *driver.Any {
	return c.drivers[types.BlockdevDriver(n.DriverName())]
}
