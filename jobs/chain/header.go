// Package chain is what jobs and commands that change backing chains have in common.
package chain

import (
	"context"
	"fmt"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// HeaderChange rewrites the backing file of an image within a transaction that holds the node quiet (graph.Participant). What was written to the node, and
// to Base, is on stable storage before the header stops naming where it came from.
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

// HeaderNames is what the header of an overlay names for base: as of says, but the client's word for the name if it has one, and raw for a protocol whose
// driver the client wants to be masked.
func HeaderNames(base *graph.Node, of func(*graph.Node) (name, format string, err error), given string, mask bool) (name, format string, err error) {
	if name, format, err = of(base); err != nil {
		return "", "", err
	}
	if given != "" {
		name = given
	}
	if mask && base.SkipFilters().Kind() == graph.Protocol {
		format = "raw"
	}
	return name, format, nil
}

// Contains tells whether n is top or below it, as far as filters and backing files go.
func Contains(top, n *graph.Node) bool {
	for top != nil && top != n {
		top = Below(top)
	}
	return top != nil
}

// Between are top and the nodes below it, as far as filters and backing files go, down to end, which is none of them; nil is the end of the chain.
func Between(top, end *graph.Node) (l []*graph.Node) {
	for ; top != nil && top != end; top = Below(top) {
		l = append(l, top)
	}
	return l
}

// Below is the node below n in its chain of filters and backing files, or nil; nil for nil.
func Below(n *graph.Node) *graph.Node {
	if n == nil {
		return nil
	}
	if e := n.FilterOrCOWChild(); e != nil {
		return e.Node()
	}
	return nil
}

// Overlay is the node above n in the chain from top downwards that is not a filter and has n, or a filter on n, as its backing file; nil if there is none.
// With n nil it is the last one of the chain.
func Overlay(top, n *graph.Node) *graph.Node {
	for top = top.SkipFilters(); ; {
		e := top.Backing()
		switch {
		case e == nil && n == nil:
			return top
		case e == nil:
			return nil
		case n != nil && e.Node().SkipFilters() == n.SkipFilters():
			return top
		}
		top = e.Node().SkipFilters()
	}
}
