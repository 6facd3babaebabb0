package blockdev

import (
	"context"
	"errors"
	"sync"

	"qblockd/blockdev/format/qcow2"
	"qblockd/blockdev/protocol/file"
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
			return func(ctx context.Context, started func()) error {
				c := m.beginCreation()
				defer c.end()
				return file.Create(ctx, u, func(f file.Made) error {
					if err := c.take(f); err != nil {
						return err
					}
					if started != nil {
						started()
					}
					return nil
				})
			}
		}
	case *types.BlockdevCreateOptionsQcow2:
		return func(ctx context.Context, started func()) (err error) {
			if f := u.BackingFmt; f != nil {
				if d := m.drivers[*f]; d != nil && !d.ForImages {
					return errNotNamed(*f)
				}
			}
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

// creation is a command that makes a file or an image in one. Until it has ended, which for an overlay is when its node has its locks, no other
// command of this daemon makes one in the same file: between the steps nothing else would keep them apart.
type creation struct {
	m    *Manager
	mu   sync.Mutex
	over bool
	made *file.Made
}

func (m *Manager) beginCreation() *creation { return &creation{m: m} }

// errCreating is the reference's word for a file that somebody else writes to.
var errCreating = errors.New(`Failed to get "write" lock`)

// take makes a file the command's; an error: it is another's, or the command has ended before it got there.
func (c *creation) take(f file.Made) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return context.Canceled
	}
	if _, busy := c.m.creating.LoadOrStore(f.ID, c); busy {
		return errCreating
	}
	c.made = &f
	return nil
}

// end lets others have the file.
func (c *creation) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over && c.made != nil {
		c.m.creating.Delete(c.made.ID)
	}
	c.over = true
}

// undo removes the file, if it is new and the command's. If it is not there yet the command takes none any more, and file.Create removes it.
func (c *creation) undo(path string) {
	c.mu.Lock()
	made := c.made
	c.over = c.over || made == nil
	c.mu.Unlock()
	if made != nil {
		file.Remove(path, *made)
	}
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
