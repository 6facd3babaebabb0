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

// growStep is how many bytes of zeroes a base grows by in one unit of work.
const growStep = 1 << 20

// Grow makes the base of a commit, which is the node of root, size bytes long if it is shorter.
// What is added reads as zeroes from the moment it is there, also for who reads the chain
// meanwhile: what an encrypted disk would grow by is noise, so it grows by zeroes that are written
// behind its end. failed says what becomes of an error of that: nil is another attempt. Other
// errors say no more than an errno does, as in QEMU.
func Grow(ctx context.Context, h *jobs.Handle, root *graph.Root, size int64, failed func(error) error) error {
	n := root.Node()
	from := n.Size()
	if from >= size || n.Caps().ZeroInit {
		return resize(ctx, root, size, size)
	}
	h.Yield()
	for off := from; off < size; {
		if err := h.Checkpoint(); err != nil {
			return err
		}
		k := min(growStep, size-off)
		err := writeZeroes(ctx, root, off, k)
		if err == nil && n.Size() < off+k { // null-co takes any write
			err = blk.ErrNotSupported
		}
		switch {
		case err == nil:
			off += k
			continue
		case ctx.Err() == nil && n.Size() == from: // one that cannot be longer has an error of its own
			if err := resize(ctx, root, size, from); err != nil {
				return err
			}
		}
		if err := failed(err); err != nil {
			return err
		}
	}
	return nil
}

// writeZeroes zeroes what lies behind the end of root's node, in one unit of work.
func writeZeroes(ctx context.Context, root *graph.Root, off, n int64) error {
	r, err := root.Begin(ctx)
	if err != nil {
		return err
	}
	defer root.End(r)
	return root.Edge().Zero(r, off, n, blk.Grow)
}

// resize gives root's node, if it is shorter than size, that size and then another, with nobody
// reading in between.
func resize(ctx context.Context, root *graph.Root, size, then int64) error {
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
	if err == nil && then != size {
		err = root.Edge().Resize(ctx, then, false, blk.PreallocOff)
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	return blk.Errno(err)
}
