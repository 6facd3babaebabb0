package handlers

import (
	"context"
	"errors"

	"qblockd/blockdev"
	"qblockd/jobs"
	"qblockd/jobs/create"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockCreate executes blockdev-create, x-blockdev-amend and x-qblockd-check.
type BlockCreate struct {
	Jobs  *jobs.Manager
	Nodes *blockdev.Manager
}

// BlockdevCreate implements types.BlockCreateHandler.
func (h BlockCreate) BlockdevCreate(ctx context.Context, a *types.BlockdevCreateArgs) error {
	f := h.Nodes.Creator(&a.Options)
	if f == nil {
		return errors.New("Driver does not support blockdev-create")
	}
	return h.start(ctx, create.Job{Type: types.JobTypeCreate, ID: a.JobID, Args: a, Do: f})
}

// XBlockdevAmend implements types.BlockCreateHandler.
func (h BlockCreate) XBlockdevAmend(ctx context.Context, a *types.XBlockdevAmendArgs) error {
	x, err := h.Nodes.Amender(a)
	if err != nil {
		return err
	}
	return h.start(ctx, create.Job{
		Type: types.JobTypeAmend, ID: a.JobID, Args: a, Do: x.Do, End: x.End,
		Begin: func() error { return x.Begin(ctx) },
	})
}

// XQblockdCheck implements types.BlockCreateHandler.
func (h BlockCreate) XQblockdCheck(ctx context.Context, a *types.XQblockdCheckArgs) error {
	x, err := h.Nodes.Checker(a)
	if err != nil {
		return err
	}
	return h.start(ctx, create.Job{
		Type: types.JobTypeXQblockdCheck, ID: a.JobID, Args: a, Check: x.Do, End: x.End,
		Begin: func() error { return x.Begin(ctx) },
	})
}

func (h BlockCreate) start(ctx context.Context, j create.Job) error {
	release, err := create.Start(h.Nodes.Graph(), h.Jobs, j)
	if err != nil {
		return err
	}
	qmp.AfterReply(ctx, release)
	return nil
}
