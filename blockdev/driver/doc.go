// Package driver is how a driver describes itself to package blockdev, which opens, names, probes,
// creates and reopens nodes by these descriptions and knows no driver by name.
//
// A driver is a folder below blockdev/protocol, blockdev/format or blockdev/filter with a Def in
// its def.go:
//
//	var Def = driver.Of(driver.Def[*types.BlockdevOptionsRaw]{
//		Name: types.BlockdevDriverRaw, Kind: graph.Format,
//		Open:     open,
//		Children: func(u *types.BlockdevOptionsRaw) []driver.Child { return driver.Filtered(&u.File) },
//		...
//	})
//
// and one line in the list of package blockdev/drivers. The type argument is the driver's branch of
// BlockdevOptions; Of makes the Def one of the common type Any, so that neither a driver nor
// package blockdev has to look for the type of options. What the opened driver does with requests
// is said by interfaces of package graph.
package driver
