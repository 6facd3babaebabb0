package stream

import (
	"context"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// switcher is a driver that has something to do when its node becomes writable or read-only (qcow2: repairs and
// header bits). It is called while the node is drained.
type switcher interface {
	SwitchReadOnly(r *blk.Req, readOnly bool) error
}

// makeWritable makes a read-only top node, typically one that another node backs on, writable for the time of the
// job, together with the children that have its read-only-ness from it.
func (j *job) makeWritable(ctx context.Context) error {
	if !j.Top.ReadOnly() {
		return nil
	}
	unfreeze, err := j.g.FreezeChain(j.Top, j.aboveBase)
	if err != nil {
		return err
	}
	defer unfreeze()
	nodes := []*graph.Node{j.Top}
	for e := j.Top.File(); e != nil && e.Node().ReadOnly() && !e.Node().MonitorOwned(); e = e.Node().File() {
		nodes = append(nodes, e.Node())
	}
	if err := j.setReadOnly(ctx, nodes, false); err != nil {
		return err
	}
	j.wasReadOnly = nodes
	return nil
}

// restoreReadOnly undoes makeWritable. A failure leaves the node writable and is logged.
func (j *job) restoreReadOnly() {
	nodes := j.wasReadOnly
	j.wasReadOnly = nil
	if nodes == nil {
		return
	}
	if err := j.setReadOnly(context.Background(), nodes, true); err != nil {
		slog.Warn("a node stays writable after a stream job", "node", j.Top.Name(), "err", err)
	}
}

func (j *job) setReadOnly(ctx context.Context, nodes []*graph.Node, ro bool) error {
	tx := j.g.Begin(ctx)
	defer tx.Abort()
	for _, n := range nodes {
		if err := tx.SetReadOnly(n, ro); err != nil {
			return err
		}
		if d, ok := n.Driver().(switcher); ok {
			tx.Drain(n)
			tx.Join(&modeChange{driver: d, readOnly: ro})
		}
	}
	return tx.Commit()
}

// modeChange tells a driver within a transaction.
type modeChange struct {
	driver   switcher
	readOnly bool
	changed  bool
}

func (c *modeChange) Prepare(ctx context.Context) error {
	err := c.driver.SwitchReadOnly(&blk.Req{Ctx: ctx}, c.readOnly)
	c.changed = err == nil
	return err
}

func (c *modeChange) Commit() {}

func (c *modeChange) Abort() {
	if c.changed {
		if err := c.driver.SwitchReadOnly(&blk.Req{Ctx: context.Background()}, !c.readOnly); err != nil {
			slog.Error("cannot undo a change of read-only", "err", err)
		}
	}
}
