// Package raw is the format without a format: a node shows its file, or a window of it,
// byte for byte.
package raw

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// image is a node's driver. Requests pass with offset added; all generic duties fall on
// the node below, so raw itself asks for no alignment and splits nothing.
type image struct {
	file   *graph.Edge
	offset int64
	fixed  bool         // the option size was given
	size   atomic.Int64 // that option; only if fixed
}

// Role is the role of raw's file child: without a window raw behaves like a filter.
func Role(opts *types.BlockdevOptionsRaw) perm.Role {
	if opts != nil && (opts.Offset != nil && *opts.Offset != 0 || opts.Size != nil) {
		return perm.Data | perm.Primary
	}
	return perm.Filtered | perm.Primary
}

// Open opens a raw node on its child "file"; o.Options is a *types.BlockdevOptionsRaw, nil means no window.
func Open(o *graph.Opening) (graph.Driver, error) {
	d := &image{file: o.Node.File()}
	if d.file == nil {
		return nil, errors.New("raw has no file")
	}
	opts, _ := o.Options.(*types.BlockdevOptionsRaw)
	if opts == nil {
		return d, nil
	}
	if err := d.window(opts.Offset, opts.Size); err != nil {
		return nil, err
	}
	return d, nil
}

// window checks and sets the part of the file that is shown.
func (d *image) window(offset, size *int64) error {
	below := d.file.Size()
	if offset != nil {
		if *offset < 0 {
			return errors.New("Parameter 'offset' expects a non-negative number below 2^64")
		}
		d.offset = *offset
	}
	if size != nil && *size < 0 {
		return errors.New("Parameter 'size' expects a non-negative number below 2^64")
	}
	if d.offset > below {
		return fmt.Errorf("Offset (%d) cannot be greater than size of the containing file (%d)", d.offset, below)
	}
	if size == nil {
		return nil
	}
	if below-d.offset < *size {
		return fmt.Errorf("The sum of offset (%d) and size (%d) has to be smaller or equal to the  actual size of the containing file (%d)",
			d.offset, *size, below)
	}
	if *size%512 != 0 {
		return errors.New("Specified size is not multiple of 512")
	}
	d.fixed = true
	d.size.Store(*size)
	return nil
}

// Caps implements graph.Driver. All flags pass; the node below emulates what its driver lacks.
func (d *image) Caps() graph.Caps {
	below := d.file.Caps()
	return graph.Caps{
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		ZeroFlags:  blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
		ZeroInit:   below.ZeroInit,
		Limits:     blk.Limits{OptTransfer: below.Limits.OptTransfer, ClusterSize: d.cluster(below.Limits.ClusterSize)},
	}
}

// cluster is the allocation unit, if the window keeps it in place.
func (d *image) cluster(below int64) int64 {
	if below > 0 && d.offset%below == 0 {
		return below
	}
	return 0
}

// Size implements graph.Driver: what the file has of the window, rounded up to sectors.
func (d *image) Size() int64 {
	size := max(d.file.Size()-d.offset, 0)
	if d.fixed {
		return min(size, d.size.Load())
	}
	return blk.AlignUp(size, 512)
}

// Close implements graph.Driver.
func (d *image) Close() error { return nil }

// within checks that a request stays in a window of fixed size.
func (d *image) within(off, n int64, e syscall.Errno) error {
	if d.fixed && (off > d.size.Load() || n > d.size.Load()-off) {
		return e
	}
	if off > math.MaxInt64-d.offset {
		return syscall.EINVAL
	}
	return nil
}

// ReadAt implements graph.Driver.
func (d *image) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := d.within(off, v.Len(), syscall.EINVAL); err != nil {
		return err
	}
	return d.file.ReadAt(r, v, off+d.offset, f)
}

// WriteAt implements graph.Writer.
func (d *image) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := d.within(off, v.Len(), syscall.ENOSPC); err != nil {
		return err
	}
	return d.file.WriteAt(r, v, off+d.offset, f)
}

// Zero implements graph.Zeroer.
func (d *image) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	if err := d.within(off, n, syscall.ENOSPC); err != nil {
		return err
	}
	return d.file.Zero(r, off+d.offset, n, f)
}

// Discard implements graph.Discarder.
func (d *image) Discard(r *blk.Req, off, n int64) error {
	if err := d.within(off, n, syscall.ENOSPC); err != nil {
		return err
	}
	return d.file.Discard(r, off+d.offset, n)
}

// Status implements graph.Statuser: the answer is the file's.
func (d *image) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Raw: true, OffValid: true, MapOff: off + d.offset, In: d.file}, nil
}

// Map implements graph.Mapper.
func (d *image) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	if err := d.within(off, n, syscall.EINVAL); err != nil {
		return err
	}
	return d.file.Map(r, off+d.offset, n, m)
}

// CopyFrom implements graph.CopyRanger.
func (d *image) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	var n int64
	for i := range src {
		n += src[i].N
	}
	if err := d.within(off, n, syscall.ENOSPC); err != nil {
		return err
	}
	return d.file.CopyFrom(r, off+d.offset, src, f)
}

// Resize implements graph.Resizer.
func (d *image) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	if d.fixed {
		return errors.New("Cannot resize fixed-size raw disks")
	}
	if math.MaxInt64-size < d.offset {
		return errors.New("Disk size too large for the chosen offset")
	}
	return d.file.Resize(ctx, size+d.offset, true, m)
}

// EdgeClaim implements graph.Permer: writing and resizing are claimed on the file only
// when a parent does so, so that raw stands on a read-only file until somebody writes.
func (d *image) EdgeClaim(child string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	const asked = perm.Write | perm.Resize
	c := perm.Default(role, up, !readOnly, false)
	c.Need = c.Need&^asked | up.Need&asked
	return c
}

// ActualSize implements graph.Sizer.
func (d *image) ActualSize() (int64, error) {
	if s, ok := d.file.Node().Driver().(graph.Sizer); ok {
		return s.ActualSize()
	}
	return d.file.Size(), nil
}

// ImageInfo implements graph.Informer: clusters and the dirty flag are those of the file. What else that has of its
// format it tells itself.
func (d *image) ImageInfo(info *types.ImageInfo) {
	if i, ok := d.file.Node().Driver().(graph.Informer); ok {
		var below types.ImageInfo
		i.ImageInfo(&below)
		info.ClusterSize, info.DirtyFlag = below.ClusterSize, below.DirtyFlag
	}
}
