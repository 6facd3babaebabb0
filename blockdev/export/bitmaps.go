package export

import (
	"fmt"

	"qblockd/blockdev/export/nbd"
	"qblockd/graph"
	"qblockd/schema/types"
)

// claimBitmaps finds the bitmaps of an export of n and makes them busy, all or none.
func (t *Table) claimBitmaps(hold *graph.Hold, e *entry, n *graph.Node, names []*types.BlockDirtyBitmapOrStr, writable bool) (l []nbd.Bitmap, err error) {
	var found []*graph.DirtyBitmap
	for _, name := range names {
		d, err := t.findBitmap(n, name)
		if err == nil && !hold.Has(d.Node()) {
			err = missing(name) // it came just now
		}
		if err != nil {
			return nil, err
		}
		if err := d.Check(graph.BitmapRead); err != nil {
			return nil, err
		}
		// One that is named with its node may change meanwhile, as in the reference: it is the client's to know.
		if name.Local != nil && !writable && !d.Node().ReadOnly() && d.Enabled() {
			return nil, fmt.Errorf("Enabled bitmap '%s' incompatible with readonly export", d.Name())
		}
		found = append(found, d)
		l = append(l, nbd.Bitmap{Name: d.Name(), Bits: d.Bits()})
	}
	for _, d := range found {
		d.SetBusy(true)
	}
	e.bitmaps = found
	return l, nil
}

// bitmapNodes are the nodes of those bitmaps that there are.
func (t *Table) bitmapNodes(n *graph.Node, names []*types.BlockDirtyBitmapOrStr) (l []*graph.Node) {
	for _, name := range names {
		if d, err := t.findBitmap(n, name); err == nil {
			l = append(l, d.Node())
		}
	}
	return l
}

// missing is the error of a bitmap that is not found.
func missing(name *types.BlockDirtyBitmapOrStr) error {
	if x := name.External; x != nil {
		return fmt.Errorf("Dirty bitmap '%s' not found", x.Name)
	}
	return fmt.Errorf("Bitmap '%s' is not found", *name.Local)
}

func (t *Table) findBitmap(n *graph.Node, name *types.BlockDirtyBitmapOrStr) (*graph.DirtyBitmap, error) {
	if x := name.External; x != nil {
		return t.g.FindDirtyBitmap(x.Node, x.Name)
	}
	for {
		if d := n.DirtyBitmap(*name.Local); d != nil {
			return d, nil
		}
		e := n.FilterOrCOWChild()
		if e == nil {
			return nil, missing(name)
		}
		n = e.Node()
	}
}

// freeBitmaps gives them back.
func (e *entry) freeBitmaps() {
	for _, d := range e.bitmaps {
		d.SetBusy(false)
	}
	e.bitmaps = nil
}
