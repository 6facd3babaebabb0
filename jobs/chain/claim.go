package chain

import (
	"context"

	"qblockd/graph"
)

// Claim keeps others from an operation on n, and tells if somebody does so already: of two that ask at the same time one gets it. It is for the time until a
// job's own transaction blocks what the job uses. It waits for transactions on n, until ctx ends.
func Claim(ctx context.Context, n *graph.Node, op graph.Op, reason error) (release func(), err error) {
	tx := n.Graph().Begin(ctx)
	defer tx.Abort()
	if err := tx.Refresh(n); err != nil { // so that it is reserved
		return nil, err
	}
	c := &claim{node: n, op: op, reason: reason}
	tx.Check(func() error { return n.Blocked(op) })
	tx.Join(c)
	if err := tx.Commit(); err != nil {
		return nil, err
	}
	return c.release, nil
}

type claim struct {
	node    *graph.Node
	op      graph.Op
	reason  error
	release func()
}

// Prepare implements graph.Participant.
func (c *claim) Prepare(context.Context) error { return nil }

// Commit implements graph.Participant.
func (c *claim) Commit() { c.release = c.node.Block(c.op, c.reason) }

// Abort implements graph.Participant.
func (c *claim) Abort() {}
