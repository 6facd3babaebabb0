package graph

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"qblockd/graph/blk"
)

// WritersBarred tells whether nobody may write to n although it is not read-only (Tx.BarWriters).
func WritersBarred(n *Node) bool {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return n.noWriters != nil
}

// SwitchReadOnly makes all nodes read-only or writable, or none. Requests on them wait meanwhile;
// it blocks as long as those and the storage do. Errors: those of permissions and of the drivers.
func (g *Graph) SwitchReadOnly(ctx context.Context, readOnly bool, nodes ...*Node) error {
	return switchReadOnly(ctx, readOnly, false, nodes)
}

// LendWritable makes read-only nodes writable for a time, as SwitchReadOnly does, which also ends
// it. What is recorded of them stays read-only.
func LendWritable(ctx context.Context, nodes ...*Node) error {
	return switchReadOnly(ctx, false, true, nodes)
}

func switchReadOnly(ctx context.Context, readOnly, lent bool, nodes []*Node) error {
	g := nodes[0].g
	tx := g.Begin(ctx)
	defer tx.Abort()
	var outcomes []func() error
	for _, n := range nodes {
		outcome, err := tx.SwitchReadOnly(n, readOnly)
		if err == nil {
			err = SetLent(tx, n, lent)
		}
		if err != nil {
			return err
		}
		outcomes = append(outcomes, outcome)
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	for _, outcome := range outcomes {
		if err := outcome(); err != nil {
			// The driver has stayed as it was; the nodes follow.
			g.switchBack(!readOnly, nodes)
			return err
		}
	}
	return nil
}

// SwitchReadOnly is SetReadOnly that tells the driver, too, which must be one that reopens. After
// Commit, outcome is the error of a driver that could not follow and has stayed as it was.
func (tx *Tx) SwitchReadOnly(n *Node, readOnly bool) (outcome func() error, err error) {
	if err := n.Options().CanReopen(); err != nil {
		return nil, err
	}
	if err := tx.SetReadOnly(n, readOnly); err != nil {
		return nil, err
	}
	c := &modeChange{node: n, readOnly: readOnly}
	if d, ok := n.drv.(ModeSwitcher); ok && !n.Inactive() { // else it is told when that ends
		c.driver = d
		tx.Join(c)
	}
	return func() error { return c.err }, nil
}

// EndWriting makes nodes read-only where nobody takes an error any more; when says after what, in
// texts. If that fails the nodes stay as they are, so that they can still store what they have in
// memory, but are lent for good (SetLent), and nobody gets the right to write to the first,
// unless others came meanwhile who do.
// Those whose drivers cannot be told stay writable.
func EndWriting(when string, nodes ...*Node) {
	n, ctx := nodes[0], context.Background()
	g := n.g
	err := g.SwitchReadOnly(ctx, true, nodes...)
	if err == nil || errors.Is(err, blk.ErrClosed) {
		return
	}
	for _, x := range nodes {
		if x.Options().CanReopen() != nil {
			slog.Warn("a node stays writable "+when, "node", n.Name(), "error", err)
			return
		}
	}
	why := blk.Errnof(err, "Node '%s' could not be made read-only %s", n.Name(), when)
	barred := g.Do(ctx, func(tx *Tx) error {
		for _, x := range nodes {
			ignoreClosing(SetLent(tx, x, true))
		}
		return tx.BarWriters(n, why)
	})
	if barred != nil {
		slog.Warn("a node stays writable "+when+": others write to it", "node", n.Name(), "error", err)
		return
	}
	slog.Error("a node takes no writes any more, but is not read-only "+when, "node", n.Name(), "error", err)
}

func (g *Graph) switchBack(readOnly bool, nodes []*Node) {
	tx := g.Begin(context.Background())
	defer tx.Abort()
	for _, n := range nodes {
		ignoreClosing(tx.SetReadOnly(n, readOnly))
	}
	if err := tx.Commit(); err != nil {
		slog.Error("a node cannot be switched back", "node", nodes[0].Name(), "read-only", readOnly, "err", err)
	}
}

// modeChange tells a driver within a transaction.
type modeChange struct {
	node     *Node
	driver   ModeSwitcher
	readOnly bool
	err      error
}

func (c *modeChange) Prepare(ctx context.Context) error {
	return c.node.Guarded(func() error { return c.driver.PrepareReadOnly(&blk.Req{Ctx: ctx}, c.readOnly) })
}

func (c *modeChange) commit(readOnly bool) error {
	return c.node.Guarded(func() error { return c.driver.CommitReadOnly(&blk.Req{Ctx: context.Background()}, readOnly) })
}

func (c *modeChange) Commit() { c.err = c.commit(c.readOnly) }

func (c *modeChange) Abort() {
	if !c.readOnly {
		return
	}
	if err := c.commit(false); err != nil {
		// Its bitmaps would be taken to be whole, and writes go on.
		c.node.Fail(fmt.Errorf("Node '%s' cannot take back what it did to become read-only: %w", c.node.name, err))
	}
}
