package stream

import (
	"context"
	"sync/atomic"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// DriverName is how the job's filter shows itself, as in QEMU.
const DriverName = "copy-on-read"

// filterDriver sits above the target while the job runs, under the name that the client chose, and
// passes everything through: the job itself copies what is read. It is transparent.
type filterDriver struct {
	node   *graph.Node
	guests atomic.Bool // a guest's request has passed; cleared by who looks
}

func (f *filterDriver) passing(r *blk.Req) {
	if !r.Job && !f.guests.Load() {
		f.guests.Store(true)
	}
}

func (f *filterDriver) child() *graph.Edge { return f.node.FilteredChild() }

func (f *filterDriver) Caps() graph.Caps {
	return graph.Caps{
		WriteFlags:  blk.FUA | blk.WriteUnchanged | blk.Compressed,
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

func (f *filterDriver) Close() error { return nil }

func (f *filterDriver) ReadAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	f.passing(r)
	return f.child().ReadAt(r, v, off, fl)
}

func (f *filterDriver) WriteAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	f.passing(r)
	return f.child().WriteAt(r, v, off, fl)
}

func (f *filterDriver) Zero(r *blk.Req, off, n int64, fl blk.Flags) error {
	return f.child().Zero(r, off, n, fl)
}

func (f *filterDriver) Discard(r *blk.Req, off, n int64) error { return f.child().Discard(r, off, n) }

func (f *filterDriver) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Raw: true, OffValid: true, MapOff: off, In: f.child()}, nil
}

func (f *filterDriver) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	f.passing(r)
	return f.child().Map(r, off, n, m)
}

func (f *filterDriver) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, fl blk.Flags) error {
	return f.child().CopyFrom(r, off, src, fl)
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

// ImageInfo implements graph.Informer: clusters and the dirty flag are those of the target.
func (f *filterDriver) ImageInfo(info *types.ImageInfo) { f.child().ShowImage(info) }
