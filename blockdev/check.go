package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Check looks the image of a node over for faults, and may repair it.
type Check struct {
	m      *Manager
	node   *graph.Node
	driver graph.Checker
	repair types.QblockdCheckRepair
	root   *graph.Root
}

// Checker returns what checks the image of a node.
func (m *Manager) Checker(a *types.XQblockdCheckArgs) (*Check, error) {
	n, err := m.Lookup(nil, &a.NodeName)
	if err != nil {
		return nil, err
	}
	d, ok := n.Driver().(graph.Checker)
	if !ok {
		return nil, errors.New("This image format does not support checks")
	}
	return &Check{m: m, node: n, driver: d, repair: types.Or(a.Repair, types.QblockdCheckRepairNone)}, nil
}

func (c *Check) repairs() bool { return c.repair != types.QblockdCheckRepairNone }

// Begin takes what the check needs: the node stays, and its file may be written to, if that is what
// a repair does.
func (c *Check) Begin(ctx context.Context) error {
	switch {
	case c.node.Inactive():
		return fmt.Errorf("Node '%s' is inactive", c.node.Name())
	case c.repairs() && c.node.ReadOnly() && c.node.File() != nil && c.node.File().Node().ReadOnly():
		return errors.New("Block node is read-only")
	}
	if c.repairs() {
		c.driver.Repairing(true)
	}
	err := c.m.g.Do(ctx, func(tx *graph.Tx) (err error) {
		spec := graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, Claim: perm.Claim{Share: perm.All},
			StayAtNode: true, Job: true}
		if c.root, err = tx.AttachRoot(spec, c.node); err != nil {
			return err
		}
		return tx.Refresh(c.node)
	})
	if err != nil && c.repairs() {
		c.driver.Repairing(false)
	}
	return err
}

// Do makes the check. The node is held, and quiet, from its first look to the last write: what is
// counted must not change meanwhile.
func (c *Check) Do(
	ctx context.Context, started func(), told func(done, all int64),
) (found *types.ImageCheck, err error) {
	started()
	hold, err := c.m.g.HoldNodes(ctx, c.node)
	if err != nil {
		return nil, err
	}
	defer hold.Release()
	tx := c.m.g.Begin(ctx)
	defer tx.Abort()
	if err := tx.Drain(c.node); err != nil {
		return nil, err
	}
	tx.Join(during(func(ctx context.Context) error {
		return c.node.Guarded(func() (err error) {
			found, err = c.driver.CheckImage(&blk.Req{Ctx: ctx}, c.repair, told)
			return err
		})
	}))
	err = tx.Commit()
	if found != nil {
		found.Filename, found.Format = c.m.Filename(c.node), c.node.DriverName()
	}
	if err != nil {
		return found, blk.Errnof(err, "Check failed")
	}
	return found, nil
}

// End gives back what Begin has taken.
func (c *Check) End() {
	if c.repairs() {
		c.driver.Repairing(false)
	}
	err := c.m.g.Do(context.Background(), func(tx *graph.Tx) error {
		if err := tx.Refresh(c.node); err != nil {
			return err
		}
		return tx.DetachRoot(c.root)
	})
	if err != nil {
		slog.Error("the claims of a check could not be given back", "node", c.node.Name(), "err", err)
	}
}

// during is a Participant that does its work while everything is drained, and has nothing to take
// back.
type during func(ctx context.Context) error

// Prepare implements graph.Participant.
func (f during) Prepare(ctx context.Context) error { return f(ctx) }

// Commit implements graph.Participant.
func (during) Commit() {}

// Abort implements graph.Participant.
func (during) Abort() {}
