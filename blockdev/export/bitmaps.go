package export

import (
	"fmt"

	"qblockd/graph"
	"qblockd/schema/types"
)

// ClaimBitmaps finds the bitmaps that an export of n offers and makes them busy for as long as it
// lives, all or none.
func (x *Export) ClaimBitmaps(held *graph.Hold, names []*types.BlockDirtyBitmapOrStr) ([]*graph.DirtyBitmap, error) {
	var found []*graph.DirtyBitmap
	for _, name := range names {
		d, err := findBitmap(x.Root.Node(), name)
		if err == nil && !held.Has(d.Node()) {
			err = missing(name) // it came just now
		}
		if err != nil {
			return nil, err
		}
		if err := d.Check(graph.BitmapRead); err != nil {
			return nil, err
		}
		// One that is named with its node may change meanwhile, as in QEMU: it is the client's to
		// know.
		if name.Local != nil && !x.Writable() && !d.Node().ReadOnly() && d.Enabled() {
			return nil, fmt.Errorf("Enabled bitmap '%s' incompatible with readonly export", d.Name())
		}
		found = append(found, d)
	}
	for _, d := range found {
		d.SetBusy(true)
	}
	x.bitmaps = found
	return found, nil
}

// BitmapNodes are the nodes of those bitmaps that there are.
func BitmapNodes(n *graph.Node, names []*types.BlockDirtyBitmapOrStr) (l []*graph.Node) {
	for _, name := range names {
		if d, err := findBitmap(n, name); err == nil {
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

// findBitmap finds a bitmap by its node, or in the chain below n.
func findBitmap(n *graph.Node, name *types.BlockDirtyBitmapOrStr) (*graph.DirtyBitmap, error) {
	if x := name.External; x != nil {
		return n.Graph().FindDirtyBitmap(x.Node, x.Name)
	}
	for _, x := range graph.Now.Chain(n, nil) {
		if d := x.Bitmaps().Find(*name.Local); d != nil {
			return d, nil
		}
	}
	return nil, missing(name)
}

// freeBitmaps gives them back.
func (x *Export) freeBitmaps() {
	for _, d := range x.bitmaps {
		d.SetBusy(false)
	}
	x.bitmaps = nil
}
