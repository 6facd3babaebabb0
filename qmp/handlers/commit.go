package handlers

import (
	"context"

	"qblockd/graph"
	"qblockd/jobs/commit"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// BlockCommit implements types.BlockJobHandler.
func (h BlockJob) BlockCommit(ctx context.Context, a *types.BlockCommitArgs) error {
	return h.start(ctx, commit.FromArgs(h.Nodes, a))
}

// ChangeBackingFile implements types.BlockJobHandler.
func (h BlockJob) ChangeBackingFile(ctx context.Context, a *types.ChangeBackingFileArgs) error {
	return h.Nodes.ChangeBackingFile(ctx, a, func(n *graph.Node, reopen func() error) error {
		return h.Jobs.Around(visible.HeaderSwitched, n.NodesBelow, reopen)
	})
}
