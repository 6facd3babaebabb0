package blockjob

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// Grow makes the base of a commit, which is the node of root, size bytes long if it is shorter. The
// error says no more than an errno does, as in QEMU.
func Grow(ctx context.Context, root *graph.Root, size int64) error {
	n := root.Node()
	if n.Size() >= size {
		return nil
	}
	hold, err := n.Graph().HoldNodes(ctx, n)
	if err != nil {
		return err
	}
	defer hold.Release()
	undrain, err := n.Graph().Drain(ctx, n)
	if err != nil {
		return err
	}
	defer undrain()
	err = root.Edge().Resize(ctx, size, false, blk.PreallocOff)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return blk.Errno(err)
}
