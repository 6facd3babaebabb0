package handlers

import (
	"context"
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/commit"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// BlockCommit implements types.BlockJobHandler.
func (h BlockJob) BlockCommit(ctx context.Context, a *types.BlockCommitArgs) error {
	return h.start(ctx, commit.FromArgs(h.Nodes, a))
}

// ChangeBackingFile implements types.BlockJobHandler.
func (h BlockJob) ChangeBackingFile(ctx context.Context, a *types.ChangeBackingFileArgs) (err error) {
	var n *graph.Node
	hold, err := h.Graph.Hold(ctx, func() (_ []*graph.Node, err error) {
		n, err = h.changeBackingNode(a)
		return []*graph.Node{n}, err
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	if n.ReadOnly() {
		nodes := n.WithFiles()
		reopen := func(ctx context.Context, readOnly bool) error {
			return h.Jobs.Around(visible.HeaderSwitched, n.NodesBelow, func() error { return h.Graph.SwitchReadOnly(ctx, readOnly, nodes...) })
		}
		if err := reopen(ctx, false); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, reopen(context.WithoutCancel(ctx), true)) }()
	}
	tx := h.Graph.Begin(ctx)
	defer tx.Abort()
	if err := tx.Drain(n); err != nil {
		return err
	}
	tx.Join(&blockjob.HeaderChange{Node: n, Name: a.BackingFile, Format: n.DriverName()})
	if err = tx.Commit(); err != nil {
		return fmt.Errorf("Could not change backing file to '%s': %s", a.BackingFile, blk.ErrnoText(err))
	}
	return nil
}

// changeBackingNode finds the node whose header change-backing-file changes.
func (h BlockJob) changeBackingNode(a *types.ChangeBackingFileArgs) (*graph.Node, error) {
	device, err := h.Nodes.LookupRoot(a.Device)
	if err != nil {
		return nil, err
	}
	n, err := h.Nodes.Lookup(nil, &a.ImageNodeName)
	switch {
	case err != nil:
		return nil, err
	case n.SkipFilters().Backing() == nil:
		return nil, errors.New("not allowing backing file change on an image without a backing file")
	}
	if err := device.Blocked(graph.OpChange); err != nil {
		return nil, err
	}
	if !graph.Now.InChain(device, n) {
		return nil, fmt.Errorf("'%s' and image file are not in the same chain", a.Device)
	}
	return n, nil
}
