package handlers

import (
	"context"

	"qblockd/jobs/backup"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockdevBackup implements types.BlockJobHandler.
func (h BlockJob) BlockdevBackup(ctx context.Context, a *types.BlockdevBackup) error {
	return h.backup(ctx, backup.FromArgs(h.Nodes, h.Jobs, a))
}

// DriveBackup implements types.BlockJobHandler.
func (h BlockJob) DriveBackup(ctx context.Context, a *types.DriveBackup) error {
	return h.backup(ctx, backup.FromDriveArgs(h.Nodes, h.Jobs, a))
}

// backup starts a job: a transaction of one step.
func (h BlockJob) backup(ctx context.Context, s *backup.Step) error {
	if err := h.Jobs.Transaction(ctx, h.Graph, s); err != nil {
		return err
	}
	s.Settle()
	qmp.AfterReply(ctx, s.Release)
	return nil
}
