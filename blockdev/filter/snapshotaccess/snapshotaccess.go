// Package snapshotaccess is the driver snapshot-access: it shows the point in time that a copy-before-write filter keeps, while guests go on
// writing through that filter.
package snapshotaccess

import (
	"fmt"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

type driver struct {
	node *graph.Node
	size int64
}

// Open opens the driver. Its file must keep a point in time.
func Open(o *graph.Opening) (graph.Driver, error) {
	file := o.Node.File()
	if _, ok := file.Node().Driver().(graph.Snapshotted); !ok {
		return nil, fmt.Errorf("Node '%s' keeps no point in time: %w", file.Node().Name(), blk.ErrNotSupported)
	}
	return &driver{o.Node, file.Size()}, nil
}

func (d *driver) below() graph.Snapshotted { return d.node.File().Node().Driver().(graph.Snapshotted) }

// Caps implements graph.Driver.
func (d *driver) Caps() graph.Caps { return graph.Caps{} }

// Size implements graph.Driver: that of the point in time.
func (d *driver) Size() int64 { return d.size }

// NamedAsChild implements graph.ChildNamer.
func (d *driver) NamedAsChild() {}

// Close implements graph.Driver.
func (d *driver) Close() error { return nil }

// ReadAt implements graph.Driver.
func (d *driver) ReadAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) error {
	return d.below().ReadSnapshot(r, v, off)
}

// Status implements graph.Statuser.
func (d *driver) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return d.below().SnapshotStatus(r, off, n)
}

// EdgeClaim implements graph.Permer: what guests do to the filter does not matter.
func (d *driver) EdgeClaim(string, perm.Role, perm.Claim, bool) perm.Claim {
	return perm.Claim{Share: perm.All}
}
