// Package compress is the filter compress: what is written through it is stored compressed.
package compress

import (
	"fmt"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

type filter struct{ graph.Passthrough }

// open opens the filter on a file that must be able to compress.
func open(o *driver.Opening, _ *types.BlockdevOptionsGenericFormat) (graph.Driver, error) {
	d := &filter{graph.Through(o.Node)}
	if d.Below().Caps().WriteFlags&blk.Compressed == 0 {
		return nil, fmt.Errorf("Compression is not supported for underlying format: %s", d.Below().Node().DriverName())
	}
	return d, nil
}

// Caps implements graph.Driver. Requests are whole clusters, as only these can be compressed. Reads
// may pass the filter unseen; CopyFrom keeps writes from doing so.
func (d *filter) Caps() graph.Caps {
	c := d.Passthrough.Caps()
	c.Limits.RequestAlign = max(c.Limits.ClusterSize, 1)
	c.Transparent = true
	return c
}

// WriteAt implements graph.Writer.
func (d *filter) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.Below().WriteAt(r, v, off, f|blk.Compressed)
}

// CopyFrom implements graph.CopyRanger: what is not seen cannot be compressed.
func (d *filter) CopyFrom(*blk.Req, int64, []blk.HostRange, blk.Flags) error {
	return blk.ErrNotSupported
}
