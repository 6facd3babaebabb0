package stream

import (
	"context"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// switcher is a driver that has something to do when its node becomes writable or read-only (qcow2: repairs and
// header bits). Both are called while the node is drained: Prepare before the change, it may refuse; Commit after it.
type switcher interface {
	PrepareReadOnly(r *blk.Req, readOnly bool) error
	CommitReadOnly(r *blk.Req, readOnly bool) error
}

// makeWritable makes a read-only top node, typically one that another node backs on, writable for the time of the
// job, together with the children that have its read-only-ness from it. Until unfreeze is called no other job can start on
// what it changed.
func (j *job) makeWritable(ctx context.Context) (unfreeze func(), err error) {
	if !j.Top.ReadOnly() {
		return func() {}, nil
	}
	// Not under another job, whose filter could not be taken out meanwhile.
	tx := j.g.Begin(ctx)
	defer tx.Abort()
	if unfreeze, err = tx.FreezeChain(j.Top, j.aboveBase); err != nil {
		return nil, err
	}
	tx.Refresh(j.Top) // so that it is reserved; there may be no link to freeze
	tx.Check(j.blocked)
	tx.Join(claiming{j})
	if err := tx.Commit(); err != nil {
		return nil, err
	}
	thaw := unfreeze
	unfreeze = func() { thaw(); j.claimed() }
	nodes := []*graph.Node{j.Top}
	for e := j.Top.File(); e != nil && e.Node().ReadOnly() && !e.Node().MonitorOwned(); e = e.Node().File() {
		nodes = append(nodes, e.Node())
	}
	if err := j.setReadOnly(ctx, nodes, false); err != nil {
		unfreeze()
		return nil, err
	}
	j.wasReadOnly = nodes
	return unfreeze, nil
}

// claiming keeps other jobs away from the top until the job itself is in the graph.
type claiming struct{ *job }

func (c claiming) Prepare(context.Context) error { return nil }
func (c claiming) Abort()                        {}
func (c claiming) Commit()                       { c.claimed = c.Top.Block(graph.OpStream, errInUse) }

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

// setReadOnly changes all nodes or none.
func (j *job) setReadOnly(ctx context.Context, nodes []*graph.Node, ro bool) error {
	tx := j.g.Begin(ctx)
	defer tx.Abort()
	var changes []*modeChange
	for _, n := range nodes {
		if err := tx.SetReadOnly(n, ro); err != nil {
			return err
		}
		if d, ok := n.Driver().(switcher); ok {
			c := &modeChange{driver: d, readOnly: ro}
			changes = append(changes, c)
			tx.Join(c)
		}
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	for _, c := range changes {
		if c.err != nil {
			// The driver has stayed read-only; the nodes follow.
			return c.undo(j, nodes)
		}
	}
	return nil
}

// modeChange tells a driver within a transaction.
type modeChange struct {
	driver   switcher
	readOnly bool
	err      error
}

func (c *modeChange) Prepare(ctx context.Context) error {
	return c.driver.PrepareReadOnly(&blk.Req{Ctx: ctx}, c.readOnly)
}

func (c *modeChange) Commit() {
	c.err = c.driver.CommitReadOnly(&blk.Req{Ctx: context.Background()}, c.readOnly)
}

func (c *modeChange) Abort() {}

func (c *modeChange) undo(j *job, nodes []*graph.Node) error {
	tx := j.g.Begin(context.Background())
	defer tx.Abort()
	for _, n := range nodes {
		if err := tx.SetReadOnly(n, !c.readOnly); err != nil {
			return err
		}
	}
	if err := tx.Commit(); err != nil {
		slog.Error("a node cannot be made read-only again", "node", j.Top.Name(), "err", err)
	}
	return c.err
}
