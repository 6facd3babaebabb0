package stream

import (
	"context"
	"sync/atomic"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// DriverName is how the job's filter shows itself, as in QEMU.
const DriverName = "copy-on-read"

// filterDriver sits above the target while the job runs, under the name that the client chose, and
// passes everything through: the job itself copies what is read. It is transparent.
type filterDriver struct {
	graph.Passthrough
	guests atomic.Bool // a guest's request has passed; cleared by who looks
}

func (f *filterDriver) passing(r *blk.Req) {
	if !r.Job && !f.guests.Load() {
		f.guests.Store(true)
	}
}

func (f *filterDriver) Caps() graph.Caps {
	return graph.Caps{
		WriteFlags:  blk.FUA | blk.WriteUnchanged | blk.Compressed,
		ZeroFlags:   blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
		Transparent: true,
	}
}

func (f *filterDriver) ReadAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	f.passing(r)
	return f.Below().ReadAt(r, v, off, fl)
}

func (f *filterDriver) WriteAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	f.passing(r)
	return f.Below().WriteAt(r, v, off, fl)
}

func (f *filterDriver) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	f.passing(r)
	return f.Below().Map(r, off, n, m)
}

func (f *filterDriver) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	return blk.ErrNotSupported
}

// EdgeClaim: what the parents take, and the right to write what does not change the data; all that
// the parents share is shared.
func (f *filterDriver) EdgeClaim(_ string, _ perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	c := perm.Claim{Need: up.Need, Share: up.Share | perm.WriteUnchanged}
	if !readOnly {
		c.Need |= perm.WriteUnchanged
	}
	return c
}
