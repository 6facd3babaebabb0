package blkdebug

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsBlkdebug]{
	Name: types.BlockdevDriverBlkdebug, Kind: graph.Filter, LikeProtocol: true,
	Open:   open,
	Reopen: driver.NoChange[*types.BlockdevOptionsBlkdebug],
	Children: func(u *types.BlockdevOptionsBlkdebug) []driver.Child {
		return []driver.Child{{Name: "image", Role: perm.Filtered | perm.Primary, Ref: &u.Image}}
	},
	Prefix: "blkdebug",
	FromNames: func(
		name string, named func(string, bool) (types.BlockdevRef, error),
	) (*types.BlockdevOptionsBlkdebug, error) {
		config, image, ok := strings.Cut(strings.TrimPrefix(name, "blkdebug:"), ":")
		if !ok {
			return nil, errors.New("blkdebug requires both config file and image path")
		}
		u := &types.BlockdevOptionsBlkdebug{}
		if config != "" {
			u.Config = &config
		}
		var err error
		u.Image, err = named(image, false)
		return u, err
	},
	Filename: filename,
	Strong:   strong,
})

// filename is "blkdebug:CONFIG:IMAGE" where the options are such that say nothing else.
func filename(u *types.BlockdevOptionsBlkdebug, child func(name string) driver.Names) string {
	image := child("image").Plain
	if plain := (types.BlockdevOptionsBlkdebug{
		Image: u.Image, Config: u.Config, TakeChildPerms: u.TakeChildPerms, UnshareChildPerms: u.UnshareChildPerms,
	}); image == "" || !reflect.DeepEqual(*u, plain) {
		return ""
	}
	return "blkdebug:" + types.Or(u.Config, "") + ":" + image
}

// strong are all options but the permissions, the members of rules one by one.
func strong(u *types.BlockdevOptionsBlkdebug, add func(name string, v value.Value)) {
	v, err := value.Parse(string(u.AppendJSON(nil)))
	if err != nil {
		panic("blkdebug: " + err.Error())
	}
	for _, m := range v.(*value.Dict).Members() {
		switch m.Name {
		case "image", "take-child-perms", "unshare-child-perms":
		case "inject-error", "set-state":
			for i, r := range slices.Backward(m.Value.(value.List)) { // the earlier one is printed first
				for _, x := range slices.Backward(r.(*value.Dict).Members()) {
					add(fmt.Sprintf("%s.%d.%s", m.Name, i, x.Name), x.Value)
				}
			}
		default:
			add(m.Name, m.Value)
		}
	}
}
