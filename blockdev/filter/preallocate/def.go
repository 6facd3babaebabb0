package preallocate

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsPreallocate]{
	Name: types.BlockdevDriverPreallocate, Kind: graph.Filter,
	Open:       open,
	Reopen:     reopen,
	ChangeOnly: []string{"prealloc-align", "prealloc-size"},
	Children:   func(u *types.BlockdevOptionsPreallocate) []driver.Child { return driver.Filtered(&u.File) },
})
