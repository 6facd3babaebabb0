package nbd

import (
	"errors"
	"fmt"

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
		Options: []string{"server", "export"},
		Hints:   []string{"reconnect-delay", "open-timeout", "x-qblockd-connections"}, Sockets: true,
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
	case o.XQblockdConnections == nil:
	case *o.XQblockdConnections < 1 || *o.XQblockdConnections > maxConnections:
		return fmt.Errorf("x-qblockd-connections must be between 1 and %d", maxConnections)
	case *o.XQblockdConnections > 1 && o.Server.Type == types.SocketAddressTypeFd:
		return errors.New("x-qblockd-connections: a descriptor is one connection")
	}
	return nil
}
