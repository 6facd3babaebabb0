package stream

import (
	"context"
	"log/slog"

	"qblockd/graph"
)

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
	nodes := j.Top.WithFiles()
	if err := j.g.SwitchReadOnly(ctx, false, nodes...); err != nil {
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
	if err := j.g.SwitchReadOnly(context.Background(), true, nodes...); err != nil {
		slog.Warn("a node stays writable after a stream job", "node", j.Top.Name(), "err", err)
	}
}
