package copyonread

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsCor]{
	Name: types.BlockdevDriverCopyOnRead, Kind: graph.Filter,
	Open:     open,
	Children: func(u *types.BlockdevOptionsCor) []driver.Child { return driver.Filtered(&u.File) },
})
