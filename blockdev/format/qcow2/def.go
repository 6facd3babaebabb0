package qcow2

import (
	"context"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsQcow2]{
	Name: types.BlockdevDriverQcow2, Kind: graph.Format,
	Open:       open,
	Reopen:     reopen,
	Changeable: runtimeNames,
	ChangeOnly: []string{"encrypt"},
	Children: func(u *types.BlockdevOptionsQcow2) []driver.Child {
		l := []driver.Child{{Name: "file", Role: perm.Image, Ref: &u.File}}
		if u.DataFile != nil {
			l = append(l, driver.Child{Name: dataFile, Role: perm.Data, Ref: u.DataFile})
		}
		return l
	},
	Backing:  func(u *types.BlockdevOptionsQcow2) *types.BlockdevRefOrNull { return u.Backing },
	FromFile: func(f types.BlockdevRef) *types.BlockdevOptionsQcow2 { return &types.BlockdevOptionsQcow2{File: f} },
	Strong: func(u *types.BlockdevOptionsQcow2, add func(name string, v value.Value)) {
		_, secret := secretOf(u.Encrypt)
		driver.AddGiven(add, "encrypt.key-secret", secret)
		driver.AddGiven(add, snapshotShown, u.XQblockdSnapshot)
	},
	Complete: completeEncrypt,
	Probe: func(head []byte) int {
		if layout.Probe(head) {
			return 100
		}
		return 0
	},
	ForImages: &driver.ForImages{
		Hints:   append(runtimeNames, "x-qblockd-for-check"),
		Options: []string{snapshotShown}, Naming: []string{"encrypt"},
	},
	Create: driver.Creates(func(ctx context.Context, c *driver.Creation, o *types.BlockdevCreateOptionsQcow2) error {
		if o.BackingFmt != nil {
			if err := c.CanName(*o.BackingFmt); err != nil {
				return err
			}
		}
		return c.InFile(ctx, &o.File, func(root *graph.Root) error {
			if o.DataFile == nil {
				return Create(ctx, root, nil, o, c)
			}
			if _, err := newHeader(o); err != nil {
				return err
			}
			return c.InFile(ctx, o.DataFile, func(data *graph.Root) error { return Create(ctx, root, data, o, c) })
		})
	}),
	NewImage: func(u *types.BlockdevOptionsQcow2, i *driver.Image) any {
		o := &types.BlockdevCreateOptionsQcow2{File: u.File, Size: uint64(i.Size)}
		if i.Backing != "" {
			o.BackingFile, o.BackingFmt = &i.Backing, (*types.BlockdevDriver)(&i.BackingFormat)
		}
		return o
	},
	MaxBackingName: layout.MaxBackingName, MaxBackingFormat: layout.MaxBackingFormat,
	Measure: driver.Measures(measure),
	Amend: func(ctx context.Context, a *driver.Amendment, o any) (*driver.Amending, error) {
		u, _ := o.(*types.BlockdevAmendOptionsQcow2)
		return amend(ctx, a, u)
	},
})

// completeEncrypt: the image knows how it is encrypted. Until it is read any format will do.
func completeEncrypt(o *value.Dict) func(u any) {
	e, _ := o.Get("encrypt")
	given, ok := e.(*value.Dict)
	if !ok {
		return nil
	}
	if _, said := given.Get("format"); said {
		return nil
	}
	given.Set("format", string(types.BlockdevQcow2EncryptionFormatLuks))
	return func(u any) {
		if o := u.(*types.BlockdevOptionsQcow2); o.Encrypt != nil {
			o.Encrypt.Format = unsaid
		}
	}
}

// snapshotShown is the option that makes a node show a snapshot.
const snapshotShown = "x-qblockd-snapshot"

// runtimeNames are the options that say how an image is used: a reopen may change them, and an
// image may not choose them.
var runtimeNames = []string{
	"lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "discard-no-unref",
	"overlap-check", "cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval",
}
