package driver

import (
	"context"
	"errors"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// Turns are the accesses of an Amendment to its node's image, each a unit of work of its own:
// between them, while keys are made of passwords, the node can be drained.
type Turns struct {
	node  *graph.Node
	graph *graph.Graph
	root  *graph.Root
	with  func(tx *graph.Tx) error
}

// Turns begins them: the node has to be active, and none of nodes, which are written to, read-only.
// with, if set, is a part of the transactions that begin and end them. End ends them.
func (a *Amendment) Turns(ctx context.Context, with func(tx *graph.Tx) error, nodes ...*graph.Node) (*Turns, error) {
	for _, n := range nodes {
		if n.ReadOnly() {
			return nil, errors.New("Block node is read-only")
		}
	}
	for _, n := range nodes {
		if n.Inactive() {
			return nil, &perm.InactiveError{Perms: perm.Write}
		}
	}
	if with == nil {
		with = func(*graph.Tx) error { return nil }
	}
	t := &Turns{node: a.Node, graph: a.Graph, with: with}
	err := a.Graph.Do(ctx, func(tx *graph.Tx) (err error) {
		spec := graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, Claim: perm.Claim{Share: perm.All},
			StayAtNode: true, Job: true}
		if t.root, err = tx.AttachRoot(spec, a.Node); err != nil {
			return err
		}
		return with(tx)
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Take is one access: f is called once the gate is passed. started is called before.
func (t *Turns) Take(ctx context.Context, started func(), f func(r *blk.Req) error) error {
	started()
	r, err := t.root.Begin(ctx)
	if err != nil {
		return err
	}
	defer t.root.End(r)
	return f(r)
}

// End gives back what Turns has taken.
func (t *Turns) End() {
	err := t.graph.Do(context.Background(), func(tx *graph.Tx) error {
		if err := t.with(tx); err != nil {
			return err
		}
		return tx.DetachRoot(t.root)
	})
	if err != nil {
		slog.Error("what a change of an image had claimed could not be given back", "node", t.node.Name(), "err", err)
	}
}
