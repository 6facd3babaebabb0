package blklogwrites

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsBlklogwrites]{
	Name: types.BlockdevDriverBlklogwrites, Kind: graph.Filter,
	Open: open,
	Children: func(u *types.BlockdevOptionsBlklogwrites) []driver.Child {
		return append(driver.Filtered(&u.File), driver.Child{Name: "log", Role: perm.Metadata, Ref: &u.Log})
	},
	Strong: func(u *types.BlockdevOptionsBlklogwrites, add func(name string, v value.Value)) {
		driver.AddGiven(add, "log-append", u.LogAppend)
		if u.LogSectorSize != nil {
			add("log-sector-size", uint64(*u.LogSectorSize))
		}
	},
})
