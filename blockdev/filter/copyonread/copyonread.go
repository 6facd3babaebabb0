// Package copyonread is the filter copy-on-read: what is read through it and lies in a backing file
// is written to its file, so that it is read from there the next time.
package copyonread

import (
	"errors"
	"fmt"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

type filter struct {
	graph.Passthrough
	bottom   *graph.Node // copies come from this node or from above it; nil: from anywhere
	unfreeze func()      // of the chain down to bottom; nil without one
}

// open opens the filter. The option bottom freezes the chain down to that node until the filter is
// closed.
func open(o *driver.Opening, u *types.BlockdevOptionsCor) (graph.Driver, error) {
	d := &filter{Passthrough: graph.Through(o.Node)}
	if u.Bottom == nil {
		return d, nil
	}
	name := *u.Bottom
	if d.bottom = o.Node.Graph().Node(name); d.bottom == nil {
		return nil, fmt.Errorf("Bottom node '%s' not found", name)
	}
	if d.bottom.Kind() == graph.Filter {
		return nil, fmt.Errorf("Bottom node '%s' is a filter", name)
	}
	if !graph.Now.InChain(d.Below().Node(), d.bottom) {
		return nil, fmt.Errorf("Bottom node '%s' is not in the backing chain", name)
	}
	var err error
	if d.unfreeze, err = o.Node.Graph().FreezeChain(o.Node, d.bottom); err != nil {
		return nil, err
	}
	return d, nil
}

// Close implements graph.Driver.
func (d *filter) Close() error {
	if d.unfreeze != nil {
		d.unfreeze()
	}
	return nil
}

// Caps implements graph.Driver. The filter sees what is read; what is written may pass it.
func (d *filter) Caps() graph.Caps {
	c := d.Passthrough.Caps()
	c.WriteFlags |= blk.Compressed // whether or not the node below takes it, as in QEMU
	c.Transparent = true
	return c
}

// Map implements graph.Mapper: nothing can be read past the filter.
func (d *filter) Map(*blk.Req, int64, int64, *blk.Mapping) error { return nil }

// ReadAt implements graph.Driver.
func (d *filter) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if d.bottom == nil {
		return d.Below().ReadAt(r, v, off, f|blk.CopyOnRead)
	}
	for size, done := v.Len(), int64(0); done < size; {
		n, pf := size-done, f
		x, err := d.Below().StatusAbove(r, d.bottom, true, off+done, n)
		switch {
		case errors.Is(err, blk.ErrWouldBlock):
			return err
		case err != nil:
			pf |= blk.CopyOnRead // reading tells
		case x.N > 0:
			n = min(n, x.N)
			if x.Allocated && x.Depth > 1 {
				pf |= blk.CopyOnRead
			}
		}
		if err := d.Below().ReadAt(r, v.Slice(done, n), off+done, pf); err != nil {
			return err
		}
		done += n
	}
	return nil
}

// EdgeClaim implements graph.Permer: what the parents take, and the right to write what does not
// change the data.
func (d *filter) EdgeClaim(_ string, _ perm.Role, up perm.Claim, _ bool) perm.Claim {
	return perm.Claim{Need: up.Need | perm.WriteUnchanged, Share: up.Share | perm.WriteUnchanged}
}
