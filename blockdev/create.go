package blockdev

import (
	"context"
	"errors"
	"sync"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
)

// Creator makes an image, or changes one. It calls started once its options are checked and before
// it writes to the image; it blocks until the image is there.
type Creator func(ctx context.Context, started func()) error

// Creator returns what makes the image that o describes, or nil if its driver cannot make any.
// Nothing is looked at before the Creator runs.
func (m *Manager) Creator(o *types.BlockdevCreateOptions) Creator {
	d := m.drivers[o.Driver]
	if d == nil || d.Create == nil {
		return nil
	}
	return func(ctx context.Context, started func()) error {
		c := &creation{m: m}
		defer c.end()
		return d.Create(ctx, c.given(started), o.U)
	}
}

// creation is a command that makes a file or an image in one. Until it has ended, which for an
// overlay is when its node has its locks, no other command of this daemon makes one in the same
// file: between the steps nothing else would keep them apart.
type creation struct {
	m    *Manager
	mu   sync.Mutex
	over bool         // +checklocks:mu
	made *driver.Made // +checklocks:mu
}

// given is what the driver gets of it. started may be nil.
func (c *creation) given(started func()) *driver.Creation {
	if started == nil {
		started = func() {}
	}
	return &driver.Creation{
		Objects: c.m.objects, Started: started, Take: c.take, InFile: c.m.inFile, CanName: c.m.canName,
		Filename: c.m.Filename,
	}
}

// inFile opens a node to make an image in it.
func (m *Manager) inFile(ctx context.Context, file *types.BlockdevRef, use func(*graph.Root) error) (err error) {
	root, err := m.OpenForCreate(ctx, file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.g.CloseRoot(context.WithoutCancel(ctx), root)) }()
	return use(root)
}

// canName refuses drivers that are there but that headers of images cannot name.
func (c *catalog) canName(name types.BlockdevDriver) error {
	if d := c.drivers[name]; d != nil && d.ForImages == nil {
		return errNotNamed(string(name))
	}
	return nil
}

// errCreating is QEMU's word for a file that somebody else writes to.
var errCreating = errors.New(`Failed to get "write" lock`)

// take makes a file the command's; an error: it is another's, or the command has ended before it
// got there.
func (c *creation) take(f driver.Made) error {
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

// undo removes the file, if it is new and the command's. If it is not there yet the command takes
// none any more, and its driver removes it.
func (c *creation) undo() {
	c.mu.Lock()
	made := c.made
	c.over = c.over || made == nil
	c.mu.Unlock()
	if made != nil && made.Remove != nil {
		made.Remove()
	}
}

// Amendment changes the format's options in the image of a node.
type Amendment struct {
	// Begin takes what the change needs; Do makes it; End, if Begin has succeeded, gives it back.
	Begin func(ctx context.Context) error
	Do    Creator
	End   func()
}

// Amender returns what changes the format's options in the image of a node.
func (m *Manager) Amender(a *types.XBlockdevAmendArgs) (*Amendment, error) {
	o := &a.Options
	n, err := m.Lookup(nil, &a.NodeName)
	switch {
	case err != nil:
		return nil, err
	case n.DriverName() != string(o.Driver):
		return nil, errors.New("x-blockdev-amend doesn't support changing the block driver")
	}
	d := m.driverOf(n)
	if d == nil || d.Amend == nil {
		return nil, errors.New("Driver does not support x-blockdev-amend")
	}
	var begun *driver.Amending
	return &Amendment{
		Begin: func(ctx context.Context) (err error) {
			begun, err = d.Amend(ctx, &driver.Amendment{
				Graph: m.g, Node: n, Force: types.Or(a.Force, false), Objects: m.objects,
			}, o.U)
			return err
		},
		Do: func(ctx context.Context, started func()) error {
			hold, err := m.g.HoldNodes(ctx, n)
			if err != nil {
				return err
			}
			defer hold.Release()
			return n.Guarded(func() error { return begun.Do(ctx, started) })
		},
		End: func() { begun.End() },
	}, nil
}
