package blockjob

import (
	"context"
	"fmt"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
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
	if b, ok := c.Node.Driver().(graph.Backed); ok {
		c.oldName, c.oldFormat = b.BackingFile()
	}
	if c.Base != nil {
		if err := c.Base.Flush(ctx); err != nil {
			return err
		}
	}
	if err := c.Node.Flush(ctx); err != nil {
		return err
	}
	c.Node.MustHold()
	c.changed = true
	if err := c.change(ctx, d, c.Name, c.Format); err != nil {
		return err
	}
	return c.Node.Flush(ctx)
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
func HeaderNames(nodes Nodes, base *graph.Node, given *string, mask *bool) (name, format string, err error) {
	name, format, err = nodes.HeaderName(graph.Now, base)
	if Or(mask, false) && base.SkipFilters().Kind() == graph.Protocol {
		format = "raw"
	}
	if Or(given, "") != "" {
		name = *given
	}
	return name, format, err
}
