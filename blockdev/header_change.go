package blockdev

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// HeaderChange rewrites the backing file of an image within a transaction that holds the node quiet
// (graph.Participant). What was written to the node, and to Base, is on stable storage before the
// header stops naming where it came from.
type HeaderChange struct {
	Node         *graph.Node
	Base         *graph.Node // that the header will rely on, if that was written to; or nil
	Name, Format string      // both empty: no backing file

	oldName, oldFormat string
	changed            bool
}

// Prepare implements graph.Participant.
func (c *HeaderChange) Prepare(ctx context.Context) error {
	d, ok := c.Node.Driver().(graph.BackingChanger)
	if !ok {
		return fmt.Errorf("Driver '%s' cannot store a backing file: %w", c.Node.DriverName(), blk.ErrNotSupported)
	}
	if c.Node.Inactive() {
		return blk.Text("Node '"+c.Node.Name()+"' is inactive", syscall.EPERM)
	}
	c.oldName, c.oldFormat = backingFile(c.Node)
	if c.Base != nil {
		if err := c.Base.IO().Flush(ctx); err != nil {
			return err
		}
	}
	if err := c.Node.IO().Flush(ctx); err != nil {
		return err
	}
	c.Node.MustHold()
	c.changed = true
	if err := c.change(ctx, d, c.Name, c.Format); err != nil {
		return err
	}
	return c.Node.IO().Flush(ctx)
}

func (c *HeaderChange) change(ctx context.Context, d graph.BackingChanger, name, format string) error {
	return c.Node.Guarded(func() error { return d.ChangeBackingFile(&blk.Req{Ctx: ctx}, name, format) })
}

// Commit implements graph.Participant.
func (c *HeaderChange) Commit() { c.Node.Bump() }

// Abort implements graph.Participant.
func (c *HeaderChange) Abort() {
	if !c.changed {
		return
	}
	if err := c.change(context.Background(), c.Node.Driver().(graph.BackingChanger), c.oldName, c.oldFormat); err != nil {
		slog.Error("the backing file name of an image could not be restored", "node", c.Node.Name(), "err", err)
	}
}

// HeaderNames is what the header of an overlay names for base: the client's word for the name, if
// it has one, and raw for a protocol whose driver the client wants to be masked.
func (m *Manager) HeaderNames(base *graph.Node, given *string, mask *bool) (name, format string, err error) {
	name, format, err = m.HeaderName(graph.Now, base)
	if types.Or(mask, false) && base.SkipFilters().Kind() == graph.Protocol {
		format = "raw"
	}
	return cmp.Or(types.Or(given, ""), name), format, err
}

// ChangeBackingFile executes change-backing-file. An image that is read-only is writable meanwhile:
// around is given each function that makes it so, or read-only again, and its node.
func (m *Manager) ChangeBackingFile(
	ctx context.Context, a *types.ChangeBackingFileArgs, around func(n *graph.Node, reopen func() error) error,
) (err error) {
	var n *graph.Node
	hold, err := m.g.Hold(ctx, func() (_ []*graph.Node, err error) {
		n, err = m.changeBackingNode(a)
		return []*graph.Node{n}, err
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	if n.ReadOnly() {
		nodes := graph.Now.WithFiles(n)
		reopen := func(ctx context.Context, readOnly bool) error {
			return around(n, func() error {
				if !readOnly {
					return graph.LendWritable(ctx, nodes...)
				}
				return m.g.SwitchReadOnly(ctx, true, nodes...)
			})
		}
		if err := reopen(ctx, false); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, reopen(context.WithoutCancel(ctx), true)) }()
	}
	tx := m.g.Begin(ctx)
	defer tx.Abort()
	if err := tx.Drain(n); err != nil {
		return err
	}
	tx.Join(&HeaderChange{Node: n, Name: a.BackingFile, Format: n.DriverName()})
	if err = tx.Commit(); err != nil {
		return fmt.Errorf("Could not change backing file to '%s': %s", a.BackingFile, blk.ErrnoText(err))
	}
	return nil
}

// changeBackingNode finds the node whose header change-backing-file changes.
func (m *Manager) changeBackingNode(a *types.ChangeBackingFileArgs) (*graph.Node, error) {
	device, err := m.LookupRoot(a.Device)
	if err != nil {
		return nil, err
	}
	n, err := m.Lookup(nil, &a.ImageNodeName)
	switch {
	case err != nil:
		return nil, err
	case n.SkipFilters().Backing() == nil:
		return nil, errors.New("not allowing backing file change on an image without a backing file")
	}
	if err := device.Blocked(graph.OpChange); err != nil {
		return nil, err
	}
	if !graph.Now.InChain(device, n) {
		return nil, fmt.Errorf("'%s' and image file are not in the same chain", a.Device)
	}
	return n, nil
}
