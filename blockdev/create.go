package blockdev

import (
	"context"
	"errors"

	"qblockd/blockdev/file"
	"qblockd/blockdev/qcow2"
	"qblockd/schema/types"
)

// Creator makes an image, or changes one. It calls started once its options are checked and before it writes to the image; it blocks
// until the image is there.
type Creator func(ctx context.Context, started func()) error

// Creator returns what makes the image that o describes, or nil if its driver cannot make any. Nothing is
// looked at before the Creator runs.
func (m *Manager) Creator(o *types.BlockdevCreateOptions) Creator {
	switch u := o.U.(type) {
	case *types.BlockdevCreateOptionsFile:
		if o.Driver == types.BlockdevDriverFile {
			return func(ctx context.Context, started func()) error { return file.Create(ctx, u, started) }
		}
	case *types.BlockdevCreateOptionsQcow2:
		return func(ctx context.Context, started func()) (err error) {
			root, err := m.OpenForCreate(ctx, &u.File)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, m.g.CloseRoot(context.WithoutCancel(ctx), root)) }()
			return qcow2.Create(ctx, root, u, started)
		}
	}
	return nil
}

// Amender returns what changes the format's options in the image of a node. Only images of one driver can be changed, and without encryption, which is
// absent, it has no options that can be: what is returned does nothing, as the reference's job.
func (m *Manager) Amender(node string, o *types.BlockdevAmendOptions) (Creator, error) {
	n, err := m.Lookup(nil, &node)
	switch {
	case err != nil:
		return nil, err
	case n.DriverName() != string(o.Driver):
		return nil, errors.New("x-blockdev-amend doesn't support changing the block driver")
	case o.Driver != types.BlockdevDriverQcow2:
		return nil, errors.New("Driver does not support x-blockdev-amend")
	}
	return func(context.Context, func()) error { return nil }, nil
}
