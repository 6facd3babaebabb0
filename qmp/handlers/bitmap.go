package handlers

import (
	"context"

	"qblockd/graph/transaction"
	"qblockd/schema/types"
)

// The commands on dirty bitmaps and external snapshots are transactions of one step.

func (b BlockCore) run(ctx context.Context, a transaction.Action) error {
	return transaction.Run(ctx, b.Nodes.Graph(), a)
}

// BlockDirtyBitmapAdd makes a bitmap.
func (b BlockCore) BlockDirtyBitmapAdd(ctx context.Context, a *types.BlockDirtyBitmapAdd) error {
	return b.run(ctx, b.Nodes.BitmapAdd(a))
}

// BlockDirtyBitmapRemove removes one.
func (b BlockCore) BlockDirtyBitmapRemove(ctx context.Context, a *types.BlockDirtyBitmap) error {
	return b.run(ctx, b.Nodes.BitmapRemove(a))
}

// BlockDirtyBitmapClear makes one clean.
func (b BlockCore) BlockDirtyBitmapClear(ctx context.Context, a *types.BlockDirtyBitmap) error {
	return b.run(ctx, b.Nodes.BitmapClear(a))
}

// BlockDirtyBitmapEnable lets one record.
func (b BlockCore) BlockDirtyBitmapEnable(ctx context.Context, a *types.BlockDirtyBitmap) error {
	return b.run(ctx, b.Nodes.BitmapEnable(a, true))
}

// BlockDirtyBitmapDisable lets one record no more.
func (b BlockCore) BlockDirtyBitmapDisable(ctx context.Context, a *types.BlockDirtyBitmap) error {
	return b.run(ctx, b.Nodes.BitmapEnable(a, false))
}

// BlockDirtyBitmapMerge adds some to one.
func (b BlockCore) BlockDirtyBitmapMerge(ctx context.Context, a *types.BlockDirtyBitmapMerge) error {
	return b.run(ctx, b.Nodes.BitmapMerge(a))
}

// XDebugBlockDirtyBitmapSha256 tells the digest of one.
func (b BlockCore) XDebugBlockDirtyBitmapSha256(
	ctx context.Context, a *types.BlockDirtyBitmap,
) (*types.BlockDirtyBitmapSha256, error) {
	sum, err := b.Nodes.BitmapSHA256(ctx, a.Node, a.Name)
	return &types.BlockDirtyBitmapSha256{Sha256: sum}, err
}

// BlockdevSnapshot puts an overlay on a node.
func (b BlockCore) BlockdevSnapshot(ctx context.Context, a *types.BlockdevSnapshot) error {
	return b.Jobs.Transaction(ctx, b.Nodes.Graph(), b.Nodes.Snapshot(a))
}

// BlockdevSnapshotSync makes an overlay and puts it on a node.
func (b BlockCore) BlockdevSnapshotSync(ctx context.Context, a *types.BlockdevSnapshotSync) error {
	return b.Jobs.Transaction(ctx, b.Nodes.Graph(), b.Nodes.SnapshotSync(a))
}

// BlockdevSnapshotInternalSync makes a snapshot inside an image.
func (b BlockCore) BlockdevSnapshotInternalSync(ctx context.Context, a *types.BlockdevSnapshotInternal) error {
	return b.Jobs.Transaction(ctx, b.Nodes.Graph(), b.Nodes.InternalSnapshot(a))
}

// XQblockdSnapshotApply goes back to one.
func (b BlockCore) XQblockdSnapshotApply(
	ctx context.Context, a *types.XQblockdSnapshotApplyArgs,
) (*types.SnapshotInfo, error) {
	return b.Nodes.ApplyInternalSnapshot(ctx, a)
}

// BlockdevSnapshotDeleteInternalSync deletes one.
func (b BlockCore) BlockdevSnapshotDeleteInternalSync(
	ctx context.Context, a *types.BlockdevSnapshotDeleteInternalSyncArgs,
) (*types.SnapshotInfo, error) {
	return b.Nodes.DeleteInternalSnapshot(ctx, a)
}
