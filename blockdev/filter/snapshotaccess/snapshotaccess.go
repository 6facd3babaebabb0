// Package snapshotaccess is the driver snapshot-access: it shows the point in time that a
// copy-before-write filter keeps, while guests go on writing through that filter.
package snapshotaccess

import (
	"fmt"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

type view struct {
	node *graph.Node
	size int64
}

// open opens the driver on a file that keeps a point in time.
func open(o *driver.Opening, _ *types.BlockdevOptionsGenericFormat) (graph.Driver, error) {
	file := o.Node.File()
	if _, err := keeper(file.Node()); err != nil {
		return nil, err
	}
	return &view{o.Node, file.Size()}, nil
}

// keeper is the driver of n if it keeps a point in time.
func keeper(n *graph.Node) (graph.SnapshotReader, error) {
	if s, ok := n.Driver().(graph.SnapshotReader); ok {
		return s, nil
	}
	return nil, fmt.Errorf("Node '%s' keeps no point in time: %w", n.Name(), blk.ErrNotSupported)
}

// below is asked for each request: where the filter is one of a job it leaves the graph with the
// job.
func (d *view) below() (graph.SnapshotReader, error) { return keeper(d.node.File().Node()) }

// Caps implements graph.Driver.
func (d *view) Caps() graph.Caps { return graph.Caps{} }

// Size implements graph.Driver: that of the point in time.
func (d *view) Size() int64 { return d.size }

// KeepsChild implements graph.ChildKeeper: another filter above the one that keeps the point in
// time, or an overlay, knows nothing of it.
func (d *view) KeepsChild() {}

// Close implements graph.Driver.
func (d *view) Close() error { return nil }

// ReadAt implements graph.Driver.
func (d *view) ReadAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) error {
	s, err := d.below()
	if err != nil {
		return err
	}
	return s.ReadSnapshot(r, v, off)
}

// Status implements graph.BlockStatuser.
func (d *view) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	s, err := d.below()
	if err != nil {
		return blk.Extent{}, err
	}
	return s.SnapshotStatus(r, off, n)
}

// Discard implements graph.Discarder: the range is given up. It cannot be read any more, and is not
// copied before it is written to.
func (d *view) Discard(r *blk.Req, off, n int64) error {
	s, err := d.below()
	if err != nil {
		return err
	}
	return s.DiscardSnapshot(r, off, n)
}

// EdgeClaim implements graph.Permer: what guests do to the filter does not matter.
func (d *view) EdgeClaim(string, perm.Role, perm.Claim, bool) perm.Claim {
	return perm.Claim{Share: perm.All}
}
