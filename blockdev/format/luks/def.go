package luks

import (
	"context"

	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// role is that of the file: its size is the disk's, too, and nothing but requests changes it.
const role = perm.Data | perm.Primary

// A header of its own is a second child, which is written to only while keys change.
const (
	headerName = "header"
	headerRole = perm.Data
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsLUKS]{
	Name: types.BlockdevDriverLuks, Kind: graph.Format,
	Open:   open,
	Reopen: driver.NoChange[*types.BlockdevOptionsLUKS],
	Children: func(u *types.BlockdevOptionsLUKS) []driver.Child {
		l := []driver.Child{{Name: "file", Role: role, Ref: &u.File}}
		if u.Header != nil {
			l = append(l, driver.Child{Name: headerName, Role: headerRole, Ref: u.Header})
		}
		return l
	},
	Strong: func(u *types.BlockdevOptionsLUKS, add func(name string, v value.Value)) {
		driver.AddGiven(add, "key-secret", u.KeySecret)
	},
	FromFile: func(f types.BlockdevRef) *types.BlockdevOptionsLUKS { return &types.BlockdevOptionsLUKS{File: f} },
	Probe: func(head []byte) int {
		if luks.IsHeader(head) {
			return 100
		}
		return 0
	},
	ForImages: &driver.ForImages{Options: []string{"key-secret"}, Object: "secret"},
	Create: driver.Creates(func(ctx context.Context, c *driver.Creation, o *types.BlockdevCreateOptionsLUKS) error {
		return inFiles(ctx, c, o, func(header, data *graph.Root) error { return create(ctx, c, header, data, o) })
	}),
	// There is no way to name a secret there: making it fails, as QEMU says it does.
	NewImage: func(u *types.BlockdevOptionsLUKS, i *driver.Image) any {
		return &types.BlockdevCreateOptionsLUKS{File: &u.File, Size: uint64(i.Size)}
	},
	Measure: driver.Measures(measure),
	Amend: func(ctx context.Context, a *driver.Amendment, o any) (*driver.Amending, error) {
		return amend(ctx, a, o.(*types.BlockdevAmendOptionsLUKS))
	},
})
