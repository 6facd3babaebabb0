package compress

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsGenericFormat]{
	Name: types.BlockdevDriverCompress, Kind: graph.Filter,
	Open:      open,
	Children:  func(u *types.BlockdevOptionsGenericFormat) []driver.Child { return driver.Filtered(&u.File) },
	ForImages: &driver.ForImages{}, // reads pass it
})
