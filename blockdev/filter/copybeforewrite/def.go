package copybeforewrite

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Def describes the driver. Jobs put it above their source, too, without options.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsCbw]{
	Name: types.BlockdevDriverCopyBeforeWrite, Kind: graph.Filter,
	Open: open,
	Children: func(u *types.BlockdevOptionsCbw) []driver.Child {
		return append(driver.Filtered(&u.File), driver.Child{Name: "target", Role: perm.Data, Ref: &u.Target})
	},
	Filename: func(_ *types.BlockdevOptionsCbw, child func(name string) driver.Names) string {
		return child("file").Shown
	},
})
