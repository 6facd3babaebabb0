package mirror

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// DriverName is how the job's filter shows itself, as in QEMU.
const DriverName = "mirror_top"

// filterDriver sits above the source while the job runs. It lets the job write to both sides where
// it wants to, else it passes everything through.
type filterDriver struct {
	graph.Passthrough
	job *Job
}

// Caps implements graph.Driver. What passes it unseen leaves its traces in the source's bitmap;
// CopyFrom refuses where that is not enough.
func (f *filterDriver) Caps() graph.Caps {
	return graph.Caps{
		WriteFlags:  blk.FUA | blk.WriteUnchanged,
		ZeroFlags:   blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
		Transparent: true,
	}
}

// WriteAt implements graph.Writer.
func (f *filterDriver) WriteAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	if fl&blk.WriteUnchanged == 0 && f.job.life.both() {
		return f.job.writeBoth(r, v, off, fl)
	}
	return f.Below().WriteAt(r, v, off, fl)
}

// Zero implements graph.Zeroer.
func (f *filterDriver) Zero(r *blk.Req, off, n int64, fl blk.Flags) error {
	if fl&blk.WriteUnchanged == 0 && f.job.life.both() {
		return f.job.zeroBoth(r, off, n, fl)
	}
	return f.Below().Zero(r, off, n, fl)
}

// Discard implements graph.Discarder.
func (f *filterDriver) Discard(r *blk.Req, off, n int64) error {
	if f.job.life.both() {
		return f.job.discardBoth(r, off, n)
	}
	return f.Below().Discard(r, off, n)
}

// CopyFrom implements graph.CopyRanger.
func (f *filterDriver) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, fl blk.Flags) error {
	if f.job.life.both() {
		return blk.ErrNotSupported
	}
	return f.Below().CopyFrom(r, off, src, fl)
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
