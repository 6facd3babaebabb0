package handlers

import (
	"context"

	"qblockd/jobs/rebase"
	"qblockd/schema/types"
)

// XQblockdRebase implements types.BlockJobHandler.
func (h BlockJob) XQblockdRebase(ctx context.Context, a *types.XQblockdRebaseArgs) error {
	j, err := rebase.FromArgs(h.Nodes, a)
	if err != nil {
		return err
	}
	return h.start(ctx, j)
}
