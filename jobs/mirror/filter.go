package mirror

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// DriverName is how the job's filter shows itself, as in QEMU.
const DriverName = "mirror_top"

// filterDriver sits above the source while the job runs. It lets the job write to both sides where
// it wants to, else it passes everything through.
type filterDriver struct {
	node *graph.Node
	job  *Job
}

func (f *filterDriver) child() *graph.Edge { return f.node.FilteredChild() }

// Caps implements graph.Driver. What passes it unseen leaves its traces in the source's bitmap;
// CopyFrom refuses where that is not enough.
func (f *filterDriver) Caps() graph.Caps {
	return graph.Caps{
		WriteFlags:  blk.FUA | blk.WriteUnchanged,
		ZeroFlags:   blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
		Transparent: true,
	}
}

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

// WriteAt implements graph.Writer.
func (f *filterDriver) WriteAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	if fl&blk.WriteUnchanged == 0 && f.job.life.both() {
		return f.job.writeBoth(r, v, off, fl)
	}
	return f.child().WriteAt(r, v, off, fl)
}

// Zero implements graph.Zeroer.
func (f *filterDriver) Zero(r *blk.Req, off, n int64, fl blk.Flags) error {
	if fl&blk.WriteUnchanged == 0 && f.job.life.both() {
		return f.job.zeroBoth(r, off, n, fl)
	}
	return f.child().Zero(r, off, n, fl)
}

// Discard implements graph.Discarder.
func (f *filterDriver) Discard(r *blk.Req, off, n int64) error {
	if f.job.life.both() {
		return f.job.discardBoth(r, off, n)
	}
	return f.child().Discard(r, off, n)
}

// Status implements graph.BlockStatuser.
func (f *filterDriver) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Raw: true, OffValid: true, MapOff: off, In: f.child()}, nil
}

// CopyFrom implements graph.CopyRanger.
func (f *filterDriver) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, fl blk.Flags) error {
	if f.job.life.both() {
		return blk.ErrNotSupported
	}
	return f.child().CopyFrom(r, off, src, fl)
}

// Map implements graph.Mapper.
func (f *filterDriver) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	return f.child().Map(r, off, n, m)
}

// Resize implements graph.Resizer: the size stays.
func (f *filterDriver) Resize(context.Context, int64, blk.Prealloc) error { return blk.ErrNotSupported }

// EdgeClaim implements graph.Permer. Where the target is below the source, what is between is not
// consistent while the job runs, and is written to.
func (f *filterDriver) EdgeClaim(_ string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	c := perm.Default(role, up, !readOnly, false)
	if f.job.below {
		c.Need &^= perm.ConsistentRead
		c.Share |= perm.Write
	}
	return c
}

// ImageInfo implements graph.Informer: clusters and the dirty flag are those of the source.
func (f *filterDriver) ImageInfo(info *types.ImageInfo) { f.child().ShowImage(info) }
