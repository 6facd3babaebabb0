package chain

import (
	"context"

	"qblockd/graph"
)

// Claim keeps others from an operation on n, and tells if somebody does so already: of two that ask
// at the same time one gets it. It is for the time until a job's own transaction blocks what the
// job uses. It waits for transactions on n, until ctx ends.
func Claim(ctx context.Context, n *graph.Node, op graph.Op, reason error) (release func(), err error) {
	tx := n.Graph().Begin(ctx)
	defer tx.Abort()
	if err := tx.Refresh(n); err != nil { // so that it is reserved
		return nil, err
	}
	tx.Check(func() error { return n.Blocked(op) })
	tx.Join(graph.OnCommit(func() { release = n.Block(op, reason) }))
	if err := tx.Commit(); err != nil {
		return nil, err
	}
	return release, nil
}
