package nbd

import (
	"errors"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/nbdwire"
	"qblockd/graph"
	"qblockd/schema/types"
)

// Def describes the driver nbd.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsNbd]{
	Name: types.BlockdevDriverNbd, Kind: graph.Protocol,
	Open:         open,
	Check:        check,
	Reopen:       reopen,
	Prefix:       "nbd",
	MorePrefixes: []string{"nbd+tcp", "nbd+unix"},
	FromName:     fromName,
	Filename:     func(o *types.BlockdevOptionsNbd, _ func(string) driver.Names) string { return filename(o) },
	Strong:       strong,
	NoFolder:     "NBD",
	Preexisting:  true,
	ForImages: &driver.ForImages{
		Options: []string{"server", "export"}, Hints: []string{"reconnect-delay", "open-timeout"}, Sockets: true,
	},
})

// check refuses options that lead to no server.
func check(o *types.BlockdevOptionsNbd) error {
	switch {
	case o.Server.U == nil:
		return errors.New("NBD server address missing")
	case o.Export != nil && len(*o.Export) > nbdwire.MaxString:
		return errors.New("export name too long to send to server")
	case o.XDirtyBitmap != nil && len(*o.XDirtyBitmap) > nbdwire.MaxString:
		return errors.New("x-dirty-bitmap query too long to send to server")
	}
	return nil
}
