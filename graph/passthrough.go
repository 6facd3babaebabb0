package graph

import (
	"context"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// PassReads is the part of a filter that shows what its filtered child shows. A driver that embeds
// only this is read-only.
type PassReads struct{ Node *Node }

// Below is the filtered child; nil once the filter was taken out of the graph and waits to be
// closed.
func (p *PassReads) Below() *Edge { return p.Node.FilteredChild() }

// Size implements Driver.
func (p *PassReads) Size() int64 {
	if c := p.Below(); c != nil {
		return c.Size()
	}
	return 0
}

// Close implements Driver.
func (p *PassReads) Close() error { return nil }

// ReadAt implements Driver.
func (p *PassReads) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return p.Below().ReadAt(r, v, off, f)
}

// Status implements BlockStatuser: the answer is the child's.
func (p *PassReads) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Raw: true, OffValid: true, MapOff: off, In: p.Below()}, nil
}

// Map implements Mapper.
func (p *PassReads) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	return p.Below().Map(r, off, n, m)
}

// ImageInfo implements Informer: clusters and the dirty flag are those of the child.
func (p *PassReads) ImageInfo(info *types.ImageInfo) { p.Below().ShowImage(info) }

// Passthrough is the part of a filter that does nothing: all requests go to the filtered child of
// Node as they are. Drivers of filters embed it and override what they are there for. As to data
// that pass a filter unseen: a driver that embeds it is transparent only if it says so in its Caps.
type Passthrough struct{ PassReads }

// Through is the Passthrough of a filter at n.
func Through(n *Node) Passthrough { return Passthrough{PassReads{n}} }

// Caps implements Driver: flags that the node below takes or emulates, and its clusters.
func (p *Passthrough) Caps() Caps {
	below := p.Below().Caps()
	return Caps{
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		ZeroFlags:  blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
		ZeroInit:   below.ZeroInit,
		Limits:     blk.Limits{OptTransfer: below.Limits.OptTransfer, ClusterSize: below.Limits.ClusterSize},
	}
}

// WriteAt implements Writer.
func (p *Passthrough) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return p.Below().WriteAt(r, v, off, f)
}

// Zero implements Zeroer.
func (p *Passthrough) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return p.Below().Zero(r, off, n, f)
}

// Discard implements Discarder.
func (p *Passthrough) Discard(r *blk.Req, off, n int64) error { return p.Below().Discard(r, off, n) }

// CopyFrom implements CopyRanger.
func (p *Passthrough) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	return p.Below().CopyFrom(r, off, src, f)
}

// Resize implements Resizer.
func (p *Passthrough) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	return p.Below().Resize(ctx, size, true, m)
}

// EdgeClaim implements Permer.
func (p *Passthrough) EdgeClaim(_ string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	return perm.Default(role, up, !readOnly, false)
}
