package qcow2

import (
	"context"
	"fmt"
	"sync/atomic"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/driver"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

var (
	_ graph.Driver         = (*Driver)(nil)
	_ graph.Writer         = (*Driver)(nil)
	_ graph.Zeroer         = (*Driver)(nil)
	_ graph.Flusher        = (*Driver)(nil)
	_ graph.Discarder      = (*Driver)(nil)
	_ graph.BlockStatuser  = (*Driver)(nil)
	_ graph.Mapper         = (*Driver)(nil)
	_ graph.CopyRanger     = (*Driver)(nil)
	_ graph.Resizer        = (*Driver)(nil)
	_ graph.Backed         = (*Driver)(nil)
	_ graph.BackingChanger = (*Driver)(nil)
	_ graph.Informer       = (*Driver)(nil)
	_ graph.Inactivator    = (*Driver)(nil)
	_ graph.Activator      = (*Driver)(nil)
	_ graph.Deactivator    = (*Driver)(nil)
	_ graph.BitmapStore    = (*Driver)(nil)
	_ graph.Ejecter        = (*Driver)(nil)
	_ graph.Checker        = (*Driver)(nil)
	_ file                 = (*graph.Edge)(nil)
)

// Driver is an open qcow2 node.
type Driver struct {
	*image
	node      *graph.Node
	repairing atomic.Int32 // repairs that are about to be made, or under way
}

// open opens an image. A writable one is repaired if it is dirty.
func open(o *driver.Opening, opt *types.BlockdevOptionsQcow2) (graph.Driver, error) {
	n := o.Node
	d := &Driver{node: n}
	c := config{
		file: n.File(),
		backing: func() file {
			if e := n.Backing(); e != nil {
				return e
			}
			return nil
		},
		readOnly:  n.ReadOnly() || n.Inactive(),
		unmap:     n.Options().Discard,
		options:   *opt,
		corrupted: d.corrupted,
		warn:      func(msg string) { o.Warn(fmt.Sprintf("Node '%s': %s", n.Name(), msg)) },
		allocated: d.fileAllocated,
		changed:   n.Bump,
		keeper:    nodeBitmaps{n},
		debug:     n.File().DebugEvent,
		password:  func(secret string) (*crypto.Key, error) { return driver.Password(o.Objects, secret) },
	}
	if e := n.Child(dataFile); e != nil {
		c.external = e
	}
	var err error
	if d.image, err = openImage(o.Req, c); err != nil {
		return nil, err
	}
	if n.Inactive() {
		d.Deactivated()
	}
	return d, nil
}

// nodeBitmaps keeps persistent bitmaps as the dirty bitmaps of the node.
type nodeBitmaps struct{ *graph.Node }

func (n nodeBitmaps) loaded(l []persisted, readOnly bool) error {
	specs := make([]graph.DirtyBitmapSpec, len(l))
	for i, p := range l {
		specs[i] = graph.DirtyBitmapSpec{
			Name: p.name, Bits: p.bits, Disabled: !p.enabled || p.inconsistent,
			Persistent: true, Inconsistent: p.inconsistent, ReadOnly: readOnly,
		}
	}
	_, err := n.Bitmaps().NewAll(specs)
	return err
}

func (n nodeBitmaps) records(name string) bool {
	d := n.Bitmaps().Find(name)
	return d != nil && d.Persistent() && d.Enabled() && !d.Inconsistent()
}

func (n nodeBitmaps) readOnly(ro bool) { n.Bitmaps().SetReadOnly(ro) }

func (n nodeBitmaps) forget(name string) {
	if d := n.Bitmaps().Find(name); d != nil && d.Persistent() {
		d.Remove()
	}
}

func (n nodeBitmaps) persisted() (l []persisted) {
	n.each(func(d *graph.DirtyBitmap) { l = append(l, persistedOf(d)) })
	return l
}

func (n nodeBitmaps) find(name string) *persisted {
	d := n.Bitmaps().Find(name)
	if d == nil || !kept(d) {
		return nil
	}
	p := persistedOf(d)
	return &p
}

func (n nodeBitmaps) names(f func(name string)) {
	n.each(func(d *graph.DirtyBitmap) { f(d.Name()) })
}

// each calls f for the bitmaps that are to be stored.
func (n nodeBitmaps) each(f func(d *graph.DirtyBitmap)) {
	for _, d := range n.Bitmaps().All() {
		if kept(d) {
			f(d)
		}
	}
}

func kept(d *graph.DirtyBitmap) bool { return d.Persistent() && d.Pending() != graph.PendingRemove }

func persistedOf(d *graph.DirtyBitmap) persisted {
	return persisted{d.Name(), d.Recorded(), d.Enabled() && d.Pending() != graph.PendingDisable, d.Inconsistent()}
}

// corrupted emits BLOCK_IMAGE_CORRUPTED.
func (d *Driver) corrupted(msg string, off, n int64, fatal bool) {
	name := d.node.Name()
	e := types.BlockImageCorruptedEvent{NodeName: &name, Msg: msg, Fatal: fatal}
	if off >= 0 {
		e.Offset = &off
	}
	if n >= 0 {
		e.Size = &n
	}
	d.node.Graph().Sink().Emit(e)
	d.node.Bump()
}

// fileAllocated asks the driver below for the bytes that the file takes.
func (d *Driver) fileAllocated() (int64, error) {
	if e := d.node.File(); e != nil {
		if z, ok := e.Node().Driver().(graph.Sizer); ok {
			return z.ActualSize()
		}
	}
	return 0, blk.ErrNotSupported
}

// Ejected tells whether fatal corruption ended the use of the image; the node then answers
// every request with blk.ErrNoMedium.
func (d *Driver) Ejected() bool { return d.dead.Load() }

// NodeFailed implements graph.FailureTaker: as after fatal corruption, nothing is written any more;
// but the image on disk is sound. Who waits for a request that has panicked hears of it.
func (s *image) NodeFailed() {
	s.dead.Store(true)
	panics.Go("the end of a failed image", func() { // others may have mu for long
		s.mu.Lock()
		defer s.mu.Unlock()
		s.wake.Broadcast()
	}, nil)
}

// Caps implements graph.Driver.
func (d *Driver) Caps() graph.Caps {
	align, flags := int64(1), blk.Compressed
	if d.seal != nil {
		align, flags = crypto.SectorSize, 0
	}
	return graph.Caps{
		Limits: blk.Limits{
			RequestAlign: align,
			ZeroAlign:    1 << d.sb,
			DiscardAlign: d.cs,
			ClusterSize:  d.cs,
		},
		WriteFlags: flags | blk.WriteUnchanged | blk.Serialising,
		ZeroFlags:  blk.WriteUnchanged | blk.Serialising | blk.MayUnmap | blk.NoFallback,
		Backing:    true,
		ZeroInit:   true,
	}
}

// Size implements graph.Driver.
func (d *Driver) Size() int64 { return d.size.Load() }

// Resize implements graph.Resizer. Persistent bitmaps must be such that they can follow.
func (d *Driver) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	for _, b := range d.node.Bitmaps().All() {
		if b.Persistent() {
			if err := b.Check(graph.BitmapChange); err != nil {
				return err
			}
		}
	}
	return d.image.Resize(&blk.Req{Ctx: ctx}, size, m)
}

// BackingFile implements graph.Backed.
func (d *Driver) BackingFile() (name, format string) {
	b := d.shown.backing.Load()
	return b[0], b[1]
}

// ImageInfo implements graph.Informer.
func (d *Driver) ImageInfo(i *types.ImageInfo) {
	cs := d.cs
	bits, h := d.shown.incompat.Load(), d.shown.header.Load()
	dirty := bits&layout.IncompatDirty != 0
	i.ClusterSize, i.DirtyFlag = &cs, &dirty
	i.Snapshots = *d.shownSnapshots.Load()
	q := types.ImageInfoSpecificQCow2{
		Compat:          "0.10",
		RefcountBits:    1 << h.RefcountOrder,
		CompressionType: types.Qcow2CompressionTypeZlib,
	}
	if d.compression == layout.CompressionZstd {
		q.CompressionType = types.Qcow2CompressionTypeZstd
	}
	if name := d.shown.dataName.Load(); *name != "" {
		q.DataFile = name
	}
	if d.geo.External {
		raw := h.Raw()
		q.DataFileRaw = &raw
	}
	if d.seal != nil {
		encrypted := true
		i.Encrypted, q.Encrypt = &encrypted, d.seal.info()
	}
	if l := d.shownBitmaps.Load(); l != nil {
		q.Bitmaps = *l
	}
	if h.Version >= 3 {
		lazy, ext := h.CompatibleFeatures&layout.CompatLazyRefcounts != 0, d.geo.Extended
		corrupt := bits&layout.IncompatCorrupt != 0
		q.Compat, q.LazyRefcounts, q.Corrupt, q.ExtendedL2 = "1.1", &lazy, &corrupt, &ext
	}
	i.FormatSpecific = &types.ImageInfoSpecific{
		Type: types.ImageInfoSpecificKindQcow2,
		U:    &types.ImageInfoSpecificQCow2Wrapper{Data: q},
	}
}
