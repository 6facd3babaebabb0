package handlers

import (
	"context"
	"errors"

	"qblockd/jobs/mirror"
	"qblockd/schema/types"
)

// BlockdevMirror implements types.BlockJobHandler.
func (h BlockJob) BlockdevMirror(ctx context.Context, a *types.BlockdevMirrorArgs) error {
	return h.start(ctx, mirror.FromArgs(h.Nodes, a))
}

// DriveMirror implements types.BlockJobHandler.
func (h BlockJob) DriveMirror(ctx context.Context, a *types.DriveMirror) error {
	return h.start(ctx, mirror.FromDriveArgs(h.Nodes, a))
}

// BlockJobChange implements types.BlockJobHandler.
func (h BlockJob) BlockJobChange(_ context.Context, a *types.BlockJobChangeOptions) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	o, ok := a.U.(*types.BlockJobChangeOptionsMirror)
	if !ok || j.Type() != a.Type {
		return errors.New("Job type does not support change")
	}
	return j.ChangeCopyMode(o.CopyMode)
}
