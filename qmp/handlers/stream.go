package handlers

import (
	"context"

	"qblockd/jobs/blockjob"
	"qblockd/jobs/stream"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockStream implements types.BlockJobHandler.
func (h BlockJob) BlockStream(ctx context.Context, a *types.BlockStreamArgs) error {
	j, err := stream.FromArgs(h.Nodes, a)
	if err != nil {
		return err
	}
	return h.start(ctx, j)
}

// start starts a job, which goes on once the command is answered.
func (h BlockJob) start(ctx context.Context, j blockjob.Job) error {
	release, err := blockjob.Start(ctx, h.Graph, h.Jobs, j)
	if err != nil {
		return err
	}
	qmp.AfterReply(ctx, release)
	return nil
}
