package blockjob

import (
	"context"
	"sync/atomic"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// copyFilterName is how the filter shows itself, as that of QEMU's block-stream.
const copyFilterName = "copy-on-read"

// MakeCopyFilter makes the job's filter above a node that the job copies into, and inserts it: one
// that passes everything through, as it is the job itself that copies. It is transparent. Guests is
// set whenever a request of a guest passes; who looks clears it.
func (s *Site) MakeCopyFilter(tx *graph.Tx, name string, top *graph.Node) (guests *atomic.Bool, err error) {
	n, err := s.MakeFilter(tx, name, graph.Options{DriverName: copyFilterName, Discard: true})
	if err != nil {
		return nil, err
	}
	d := &filterDriver{Passthrough: graph.Through(n)}
	n.SetDriver(d)
	if _, err := tx.InsertFilter(n, "file", top); err != nil {
		return nil, err
	}
	return &d.guests, tx.Try()
}

type filterDriver struct {
	graph.Passthrough
	guests atomic.Bool
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
