package handlers

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/transaction"
	"qblockd/jobs"
	"qblockd/jobs/backup"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// Transaction executes transaction.
type Transaction struct {
	Nodes *blockdev.Manager
	Jobs  BlockJob // what starts the jobs
}

// Transaction implements types.TransactionHandler.
func (h Transaction) Transaction(ctx context.Context, a *types.TransactionArgs) error {
	properties := types.Or(a.Properties, types.TransactionProperties{})
	mode := types.Or(properties.CompletionMode, types.ActionCompletionModeIndividual)
	var l []transaction.Action
	var started []*backup.Step
	var txn *jobs.Txn // nil: each job stands alone
	if mode == types.ActionCompletionModeGrouped {
		txn = h.Jobs.Jobs.NewTxn()
	}
	for _, step := range a.Actions {
		act := h.action(step)
		if b, ok := act.(*backup.Step); ok {
			b.Join(txn)
			started = append(started, b)
		} else if txn != nil && step.Type != types.TransactionActionKindAbort {
			act = refused{err: fmt.Errorf("Action '%s' does not support Transaction property completion-mode = %s",
				step.Type, mode)}
		}
		l = append(l, act)
	}
	if err := h.Jobs.Jobs.Transaction(ctx, h.Nodes.Graph(), l...); err != nil {
		return err
	}
	for _, b := range started {
		b.Settle()
		qmp.AfterReply(ctx, b.Release)
	}
	return nil
}

func (h Transaction) action(a *types.TransactionAction) transaction.Action {
	switch u := a.U.(type) {
	case *types.BlockDirtyBitmapAddWrapper:
		return h.Nodes.BitmapAdd(&u.Data)
	case *types.BlockDirtyBitmapMergeWrapper:
		return h.Nodes.BitmapMerge(&u.Data)
	case *types.DriveBackupWrapper:
		return backup.FromDriveArgs(h.Nodes, h.Jobs.Jobs, &u.Data)
	case *types.BlockdevBackupWrapper:
		return backup.FromArgs(h.Nodes, h.Jobs.Jobs, &u.Data)
	case *types.BlockdevSnapshotWrapper:
		return h.Nodes.Snapshot(&u.Data)
	case *types.BlockdevSnapshotInternalWrapper:
		return h.Nodes.InternalSnapshot(&u.Data)
	case *types.BlockdevSnapshotSyncWrapper:
		return h.Nodes.SnapshotSync(&u.Data)
	case *types.BlockDirtyBitmapWrapper:
		switch a.Type {
		case types.TransactionActionKindBlockDirtyBitmapRemove:
			return h.Nodes.BitmapRemove(&u.Data)
		case types.TransactionActionKindBlockDirtyBitmapClear:
			return h.Nodes.BitmapClear(&u.Data)
		default:
			return h.Nodes.BitmapEnable(&u.Data, a.Type == types.TransactionActionKindBlockDirtyBitmapEnable)
		}
	}
	return refused{err: errors.New("Transaction aborted using Abort action")}
}

// refused is a step that fails: what comes after it is not even begun.
type refused struct {
	transaction.Noop
	err error
}

// Open implements transaction.Opener.
func (r refused) Open(context.Context, *graph.Tx) error { return r.err }
