package blkverify

import (
	"errors"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Def describes the driver. Its child "raw" is trusted, and "test" compared with it.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsBlkverify]{
	Name: types.BlockdevDriverBlkverify, Kind: graph.Filter, LikeProtocol: true,
	Open: func(x *driver.Opening, _ *types.BlockdevOptionsBlkverify) (graph.Driver, error) {
		return &filter{node: x.Node}, nil
	},
	Children: func(u *types.BlockdevOptionsBlkverify) []driver.Child {
		return []driver.Child{
			{Name: "raw", Role: perm.Filtered | perm.Primary, Ref: &u.Raw},
			{Name: "test", Role: perm.Data, Ref: &u.Test},
		}
	},
	Prefix: "blkverify",
	FromNames: func(
		name string, named func(string, bool) (types.BlockdevRef, error),
	) (u *types.BlockdevOptionsBlkverify, err error) {
		raw, test, ok := strings.Cut(strings.TrimPrefix(name, "blkverify:"), ":")
		if !ok {
			return nil, errors.New("blkverify requires raw copy and original image path")
		}
		u = &types.BlockdevOptionsBlkverify{}
		if u.Raw, err = named(raw, false); err == nil {
			u.Test, err = named(test, true)
		}
		return u, err
	},
	Filename: func(_ *types.BlockdevOptionsBlkverify, child func(name string) driver.Names) string {
		raw, test := child("raw").Plain, child("test").Plain
		if raw == "" || test == "" {
			return ""
		}
		return "blkverify:" + raw + ":" + test
	},
})
