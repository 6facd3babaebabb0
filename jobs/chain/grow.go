package chain

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// Grow resizes the base of a commit, which is quiet, to size bytes. The error says no more than an
// errno does, as in QEMU.
func Grow(ctx context.Context, e *graph.Edge, size int64) error {
	err := e.Resize(ctx, size, false, blk.PreallocOff)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return blk.Errno(err)
}
