package file

import (
	"context"
	"fmt"
	"io/fs"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Def describes the driver file: regular files.
var Def = func() *driver.Any {
	d := define(types.BlockdevDriverFile, false)
	d.Create = driver.Creates(func(ctx context.Context, c *driver.Creation, o *types.BlockdevCreateOptionsFile) error {
		return Create(ctx, o, func(m driver.Made) error {
			if err := c.Take(m); err != nil {
				return err
			}
			c.Started()
			return nil
		})
	})
	d.NewImage = func(u *types.BlockdevOptionsFile, i *driver.Image) any {
		return &types.BlockdevCreateOptionsFile{Filename: u.Filename, Size: uint64(i.Size)}
	}
	return driver.Of(d)
}()

// HostDevice describes the driver host_device: block and character devices, which are there
// already.
var HostDevice = func() *driver.Any {
	d := define(types.BlockdevDriverHostDevice, true)
	d.Preexisting = true
	return driver.Of(d)
}()

// HostCdrom describes the driver host_cdrom: drives. No path leads to it by itself, and no header
// of an image.
var HostCdrom = func() *driver.Any {
	d := define(types.BlockdevDriverHostCdrom, true)
	d.Preexisting = true
	d.Open, d.TakesPath, d.ForImages = openCdrom, nil, nil
	return driver.Of(d)
}()

// define is what they have in common. The file name is all that matters for the data; the rest is
// about the host.
func define(name types.BlockdevDriver, device bool) driver.Def[*types.BlockdevOptionsFile] {
	return driver.Def[*types.BlockdevOptionsFile]{
		Name: name, Kind: graph.Protocol,
		Open: func(x *driver.Opening, u *types.BlockdevOptionsFile) (graph.Driver, error) { return open(x, u, device) },
		Check: func(u *types.BlockdevOptionsFile) error {
			if u.Filename == "" {
				return fmt.Errorf("The '%s' block driver requires a file name", name)
			}
			return nil
		},
		Reopen:     reopen,
		Changeable: []string{"x-check-cache-dropped"},
		ChangeOnly: []string{"drop-cache"},
		Prefix:     string(name),
		TakesPath:  func(mode fs.FileMode) bool { return mode&fs.ModeDevice != 0 == device },
		FromName: func(s string) (*types.BlockdevOptionsFile, error) {
			return &types.BlockdevOptionsFile{Filename: driver.StripPrefix(s, string(name)+":")}, nil
		},
		Filename: func(u *types.BlockdevOptionsFile, _ func(string) driver.Names) string { return u.Filename },
		Strong: func(u *types.BlockdevOptionsFile, add func(name string, v value.Value)) {
			add("filename", u.Filename)
		},
		ForImages: &driver.ForImages{
			Options: []string{"filename", "locking"},
			Hints:   []string{"aio", "aio-max-batch", "drop-cache", "x-check-cache-dropped"},
			Devices: device,
		},
	}
}
