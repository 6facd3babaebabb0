package raw

import (
	"context"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsRaw]{
	Name: types.BlockdevDriverRaw, Kind: graph.Format,
	Open:       open,
	Reopen:     reopen,
	Changeable: []string{"offset", "size"},
	Children: func(u *types.BlockdevOptionsRaw) []driver.Child {
		return []driver.Child{{Name: "file", Role: role(u), Ref: &u.File}}
	},
	Strong: func(u *types.BlockdevOptionsRaw, add func(name string, v value.Value)) {
		driver.AddGiven(add, "offset", u.Offset)
		driver.AddGiven(add, "size", u.Size)
	},
	FromFile:  func(f types.BlockdevRef) *types.BlockdevOptionsRaw { return &types.BlockdevOptionsRaw{File: f} },
	Verbatim:  true,
	ForImages: &driver.ForImages{Options: []string{"offset", "size"}},
	Measure: func(_ context.Context, m *driver.Measuring, _ any) (*types.BlockMeasureInfo, error) {
		n := blk.AlignUp(m.Size, blk.SectorSize)
		return &types.BlockMeasureInfo{Required: n, FullyAllocated: n}, nil
	},
})
