package handlers

import (
	"context"

	"qblockd/blockdev"
	"qblockd/jobs"
	"qblockd/jobs/create"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockCreate executes blockdev-create.
type BlockCreate struct {
	Jobs  *jobs.Manager
	Nodes *blockdev.Manager
}

var _ types.BlockCreateHandler = BlockCreate{}

// BlockdevCreate implements types.BlockCreateHandler.
func (h BlockCreate) BlockdevCreate(ctx context.Context, a *types.BlockdevCreateArgs) error {
	release, err := create.Start(h.Jobs, a.JobID, create.Func(h.Nodes.Creator(&a.Options)))
	if err != nil {
		return err
	}
	qmp.AfterReply(ctx, release)
	return nil
}
