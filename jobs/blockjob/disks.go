package blockjob

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
)

// Walk calls f with each extent of the disk at e, in order: whether its layers down to last hold
// it. Each look is a unit of work of root, with a pause point before it.
func Walk(
	ctx context.Context, h *jobs.Handle, root *graph.Root, e *graph.Edge, last *graph.Node,
	f func(off int64, x blk.Extent),
) error {
	for off, size := int64(0), e.Size(); off < size; {
		if err := h.Checkpoint(); err != nil {
			return err
		}
		r, err := root.Begin(ctx)
		if err != nil {
			return err
		}
		x, err := e.StatusAbove(r, last, true, off, size-off)
		root.End(r)
		if err != nil || x.N == 0 {
			return err
		}
		f(off, x)
		off += x.N
	}
	return nil
}

// StandsAlone tells whether what n, or a node below it, does not hold reads as zeroes for good: no
// image there has a backing file, or names one that could be opened some day. It takes the graph's
// lock.
func StandsAlone(n *graph.Node) bool {
	for _, b := range n.NodesBelow() {
		if !b.Caps().Backing {
			continue
		}
		if b.Backing() != nil {
			return false
		}
		if d, ok := b.Driver().(graph.Backed); ok {
			if name, _ := d.BackingFile(); name != "" {
				return false
			}
		}
	}
	return true
}

// Noise is from where on the base of a commit does not read as zeroes where nothing is written to
// it, once Grow has made it size bytes long: what an encrypted disk grows by is noise.
func Noise(base *graph.Node, size int64) int64 {
	if base.Size() >= size || base.Caps().ZeroInit {
		return size
	}
	return base.Size()
}

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
