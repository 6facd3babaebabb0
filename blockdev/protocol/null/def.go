package null

import (
	"fmt"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Co and Aio describe the drivers.
var (
	Co  = define(types.BlockdevDriverNullCo)
	Aio = define(types.BlockdevDriverNullAio)
)

func define(name types.BlockdevDriver) *driver.Any {
	plain := string(name) + "://"
	return driver.Of(driver.Def[*types.BlockdevOptionsNull]{
		Name: name, Kind: graph.Protocol,
		Open:   open,
		Reopen: driver.NoChange[*types.BlockdevOptionsNull],
		Prefix: string(name),
		FromName: func(s string) (*types.BlockdevOptionsNull, error) {
			if s != plain {
				return nil, fmt.Errorf("The only allowed filename for this driver is '%s'", plain)
			}
			return &types.BlockdevOptionsNull{}, nil
		},
		Filename: func(u *types.BlockdevOptionsNull, _ func(string) driver.Names) string {
			if u.Size != nil || u.ReadZeroes != nil {
				return ""
			}
			return plain
		},
		Strong: func(u *types.BlockdevOptionsNull, add func(name string, v value.Value)) {
			driver.AddGiven(add, "size", u.Size)
			driver.AddGiven(add, "read-zeroes", u.ReadZeroes)
		},
		ForImages: &driver.ForImages{Options: []string{"size", "read-zeroes"}, Hints: []string{"latency-ns"}},
	})
}
