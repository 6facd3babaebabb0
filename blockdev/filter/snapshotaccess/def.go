package snapshotaccess

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsGenericFormat]{
	Name: types.BlockdevDriverSnapshotAccess, Kind: graph.Format,
	Open: open,
	Children: func(u *types.BlockdevOptionsGenericFormat) []driver.Child {
		return []driver.Child{{Name: "file", Role: perm.Data | perm.Primary, Ref: &u.File}}
	},
	Filename: func(_ *types.BlockdevOptionsGenericFormat, child func(name string) driver.Names) string {
		return child("file").Shown
	},
})
