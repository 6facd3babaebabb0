package commit

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// DriverName is how the job's filter shows itself, as in QEMU.
const DriverName = "commit_top"

// filterDriver sits above the top while the job runs and lets its parents read what they always
// read, although the nodes below are not consistent any more when they are looked at alone. It is
// read-only and transparent.
type filterDriver struct{ node *graph.Node }

func (f *filterDriver) child() *graph.Edge { return f.node.FilteredChild() }

// Caps implements graph.Driver.
func (f *filterDriver) Caps() graph.Caps { return graph.Caps{Transparent: true} }

// Size is 0 once the filter was taken out of the graph and waits to be closed.
func (f *filterDriver) Size() int64 {
	if c := f.child(); c != nil {
		return c.Size()
	}
	return 0
}

// Close implements graph.Driver.
func (f *filterDriver) Close() error { return nil }

// ReadAt implements graph.Driver.
func (f *filterDriver) ReadAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	return f.child().ReadAt(r, v, off, fl)
}

// Status implements graph.BlockStatuser.
func (f *filterDriver) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Raw: true, OffValid: true, MapOff: off, In: f.child()}, nil
}

// Map implements graph.Mapper.
func (f *filterDriver) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	return f.child().Map(r, off, n, m)
}

// Resize implements graph.Resizer.
func (f *filterDriver) Resize(context.Context, int64, blk.Prealloc) error { return blk.ErrNotSupported }

// EdgeClaim implements graph.Permer: what lies below may be written to and need not be consistent.
func (f *filterDriver) EdgeClaim(string, perm.Role, perm.Claim, bool) perm.Claim {
	return perm.Claim{Share: perm.All}
}

// ImageInfo implements graph.Informer: clusters and the dirty flag are those of the top.
func (f *filterDriver) ImageInfo(info *types.ImageInfo) { f.child().ShowImage(info) }
