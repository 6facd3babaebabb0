package throttle

import (
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Def describes the driver. Its groups are objects of object-add.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsThrottle]{
	Name: types.BlockdevDriverThrottle, Kind: graph.Filter,
	Open:       open,
	Reopen:     reopen,
	ChangeOnly: []string{"throttle-group"},
	Children:   func(u *types.BlockdevOptionsThrottle) []driver.Child { return driver.Filtered(&u.File) },
	Strong: func(u *types.BlockdevOptionsThrottle, add func(name string, v value.Value)) {
		add("throttle-group", u.ThrottleGroup)
	},
	ForImages: &driver.ForImages{Options: []string{"throttle-group"}, Object: "throttle group"},
})
