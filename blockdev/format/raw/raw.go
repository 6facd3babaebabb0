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

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// image is a node's driver. Requests pass with offset added; all generic duties fall on
// the node below, so raw itself asks for no alignment and splits nothing.
type image struct {
	file *graph.Edge
	part atomic.Pointer[window]

	guess  *driver.Guess // nil: the user says that it is raw, whatever the file begins with
	warn   func(msg string)
	warned atomic.Bool
}

// window is the part of the file that is shown.
type window struct {
	offset int64
	fixed  bool  // the option size was given
	size   int64 // that option; only if fixed
}

// role is the role of raw's file child: without a window raw behaves like a filter.
func role(opts *types.BlockdevOptionsRaw) perm.Role {
	if types.Or(opts.Offset, 0) != 0 || opts.Size != nil {
		return perm.Data | perm.Primary
	}
	return perm.Filtered | perm.Primary
}

func open(o *driver.Opening, u *types.BlockdevOptionsRaw) (graph.Driver, error) {
	d := &image{file: o.Node.File()}
	d.guess, d.warn = o.Guessed, o.Warn
	if d.file == nil {
		return nil, errors.New("raw has no file")
	}
	w, err := newWindow(u, d.file.Size())
	if err != nil {
		return nil, err
	}
	d.part.Store(w)
	if !o.Node.ReadOnly() {
		d.warnGuess()
	}
	return d, nil
}

// newWindow checks the options against the size of the file.
func newWindow(opts *types.BlockdevOptionsRaw, below int64) (*window, error) {
	w := &window{offset: types.Or(opts.Offset, 0)}
	size := opts.Size
	if w.offset < 0 {
		return nil, errors.New("Parameter 'offset' expects a non-negative number below 2^64")
	}
	if size != nil && *size < 0 {
		return nil, errors.New("Parameter 'size' expects a non-negative number below 2^64")
	}
	if w.offset > below {
		return nil, fmt.Errorf("Offset (%d) cannot be greater than size of the containing file (%d)", w.offset, below)
	}
	if size == nil {
		return w, nil
	}
	if below-w.offset < *size {
		return nil, fmt.Errorf("The sum of offset (%d) and size (%d) has to be smaller or equal to the  actual size of the containing file (%d)", w.offset, *size, below)
	}
	if *size%blk.SectorSize != 0 {
		return nil, errors.New("Specified size is not multiple of 512")
	}
	w.fixed, w.size = true, *size
	return w, nil
}

// reopen: the window may move.
func reopen(open graph.Driver, u *types.BlockdevOptionsRaw, _ *graph.Options) (graph.Participant, error) {
	d := open.(*image)
	w, err := newWindow(u, d.file.Size())
	if err != nil {
		return nil, err
	}
	return graph.OnCommit(func() { d.part.Store(w) }), nil
}

// Caps implements graph.Driver. All flags pass; the node below emulates what its driver lacks.
func (d *image) Caps() graph.Caps {
	below := d.file.Caps()
	return graph.Caps{
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		ZeroFlags:  blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
		ZeroInit:   below.ZeroInit,
		Limits:     d.limits(below.Limits),
	}
}

// cluster is the allocation unit, if the window keeps it in place.
func (d *image) cluster(below int64) int64 {
	if below > 0 && d.part.Load().offset%below == 0 {
		return below
	}
	return 0
}

// Size implements graph.Driver: what the file has of the window, rounded up to sectors.
func (d *image) Size() int64 {
	w := d.part.Load()
	size := max(d.file.Size()-w.offset, 0)
	if w.fixed {
		return min(size, w.size)
	}
	return blk.AlignUp(size, blk.SectorSize)
}

// Offset is where in its file the node begins.
func (d *image) Offset() int64 { return d.part.Load().offset }

// Close implements graph.Driver.
func (d *image) Close() error { return nil }

// within is the place in the file of a request, which must stay in a window of fixed size.
func (d *image) within(off, n int64, e syscall.Errno) (int64, error) {
	w := d.part.Load()
	if w.fixed && (off > w.size || n > w.size-off) {
		return 0, e
	}
	if off > math.MaxInt64-w.offset {
		return 0, syscall.EINVAL
	}
	return off + w.offset, nil
}

// ReadAt implements graph.Driver.
func (d *image) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	at, err := d.within(off, v.Len(), syscall.EINVAL)
	if err != nil {
		return err
	}
	d.file.DebugEvent(r, blk.EvReadAio)
	return d.file.ReadAt(r, v, at, f)
}

// WriteAt implements graph.Writer.
func (d *image) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	at, err := d.changes(r, v, off, v.Len())
	if err != nil {
		return err
	}
	d.file.DebugEvent(r, blk.EvWriteAio)
	return d.file.WriteAt(r, v, at, f)
}

// Zero implements graph.Zeroer.
func (d *image) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	at, err := d.changes(r, blk.Vec{}, off, n)
	if err != nil {
		return err
	}
	return d.file.Zero(r, at, n, f)
}

// Discard implements graph.Discarder.
func (d *image) Discard(r *blk.Req, off, n int64) error {
	at, err := d.changes(r, blk.Vec{}, off, n)
	if err != nil {
		return err
	}
	return d.file.Discard(r, at, n)
}

// Status implements graph.BlockStatuser: the answer is the file's.
func (d *image) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Raw: true, OffValid: true, MapOff: off + d.part.Load().offset, In: d.file}, nil
}

// Map implements graph.Mapper.
func (d *image) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	at, err := d.within(off, n, syscall.EINVAL)
	if err != nil {
		return err
	}
	return d.file.Map(r, at, n, m)
}

// CopyFrom implements graph.CopyRanger.
func (d *image) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	at, err := d.within(off, blk.Total(src), syscall.ENOSPC)
	if err != nil {
		return err
	}
	if d.guards(at) {
		return blk.ErrNotSupported // what is written has to be looked at
	}
	return d.file.CopyFrom(r, at, src, f)
}

// Resize implements graph.Resizer.
func (d *image) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	w := d.part.Load()
	if w.fixed {
		return errors.New("Cannot resize fixed-size raw disks")
	}
	if math.MaxInt64-size < w.offset {
		return errors.New("Disk size too large for the chosen offset")
	}
	return d.file.Resize(ctx, size+w.offset, true, m)
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
	return 0, blk.ErrNotSupported
}

// ImageInfo implements graph.Informer: clusters and the dirty flag are those of the file. What else
// that has of its format it tells itself.
func (d *image) ImageInfo(info *types.ImageInfo) {
	if i, ok := d.file.Node().Driver().(graph.Informer); ok {
		var below types.ImageInfo
		i.ImageInfo(&below)
		info.ClusterSize, info.DirtyFlag = below.ClusterSize, below.DirtyFlag
	}
}
