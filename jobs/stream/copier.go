package stream

import (
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs/copy"
)

// copier copies extents from below the top node into it.
type copier struct {
	target *graph.Edge // to the top node
	below  *graph.Edge // its backing edge
	last   *graph.Node // the last one to be copied
}

// look implements copy.Task.Look: only what the top does not have and a layer down to last has is
// copied.
func (c *copier) look(r *blk.Req, off, n int64) (copy.Extent, error) {
	top, err := c.below.ParentNode().IO().Status(r, off, n)
	if err != nil {
		return copy.Extent{}, err
	}
	if top.Allocated {
		return copy.Extent{N: top.N}, nil
	}
	below, err := c.below.StatusAbove(r, c.last, true, off, top.N)
	switch {
	case err != nil:
		return copy.Extent{}, err
	case below.N == 0:
		// Beyond the end of the layer below, so it reads as zeroes, and has to when a longer base
		// comes to lie directly below.
		x := copy.Extent{N: top.N}
		if e := graph.Now.FilterOrCOWChild(c.last); e != nil && off < e.Size() {
			x.Action = copy.Zero
			if base, err := e.StatusAbove(r, nil, false, off, top.N); err == nil && base.Zero && base.N > 0 {
				x = copy.Extent{N: base.N} // it does so in any case
			}
		}
		return x, nil
	case below.Depth == 0:
		return copy.Extent{N: below.N}, nil
	case below.Zero:
		return copy.Extent{N: below.N, Action: copy.Zero}, nil
	}
	return copy.Extent{N: below.N, Action: copy.Data}, nil
}

// copy implements copy.Task.Copy. The lock keeps guest writes out; what they wrote before it is
// skipped.
func (c *copier) copy(r *blk.Req, off int64, e copy.Extent) (int64, error) {
	return copy.All(e.N, c.copyAll(r, off, e))
}

func (c *copier) copyAll(r *blk.Req, off int64, e copy.Extent) error {
	lock, err := c.target.LockRange(r, off, e.N)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	for end := off + e.N; off < end; {
		top, err := c.below.ParentNode().IO().Status(r, off, end-off)
		if err != nil {
			return err
		}
		if !top.Allocated {
			if err := c.fill(r, off, top.N, e.Action == copy.Zero); err != nil {
				return err
			}
		}
		off += top.N
	}
	return nil
}

// fill writes [off, off+n) of the backing chain into the top node.
func (c *copier) fill(r *blk.Req, off, n int64, zero bool) error {
	if zero {
		return c.target.Zero(r, off, n, blk.WriteUnchanged)
	}
	return graph.Copy(r, c.below, c.target, off, n, blk.WriteUnchanged)
}
