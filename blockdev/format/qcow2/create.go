package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/bits"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/driver"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Create makes an image as o says in the node below root, with its data in that below data unless
// that is nil; the references are not looked at. Its texts are those that end a create job. It
// blocks as long as the storage does.
func Create(
	ctx context.Context, root, data *graph.Root, o *types.BlockdevCreateOptionsQcow2, c *driver.Creation,
) error {
	if _, err := newHeader(o); err != nil {
		return err
	}
	if c.Started != nil {
		c.Started()
	}
	r, err := root.Begin(ctx)
	if err != nil {
		return err
	}
	defer root.End(r)
	words := func(secret string) (*crypto.Key, error) { return driver.Password(c.Objects, secret) }
	if data == nil {
		return createWith(r, grower{root.Edge()}, nil, "", o, words)
	}
	rd, err := data.Begin(ctx) // a request of the data file's node has a pass of its own
	if err != nil {
		return err
	}
	defer data.End(rd)
	return createWith(r, grower{root.Edge()}, grower{data.Edge()}, c.Filename(data.Edge().Node()), o, words)
}

// grower is a root's edge through which writes may make the node longer.
type grower struct{ *graph.Edge }

// WriteAt implements file.
func (g grower) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return g.Edge.WriteAt(r, v, off, f|blk.Grow)
}

// Zero implements file.
func (g grower) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return g.Edge.Zero(r, off, n, f|blk.Grow)
}

// newHeader checks the options in QEMU's order and makes the header of an empty image.
func newHeader(o *types.BlockdevCreateOptionsQcow2) (*layout.Header, error) {
	if o.Size%blk.SectorSize != 0 {
		return nil, fmt.Errorf("Image size must be a multiple of %d bytes", blk.SectorSize)
	}
	h := &layout.Header{Version: 3, RefcountTableClusters: 1}
	if pick(o.Version, types.BlockdevQcow2VersionV3) == types.BlockdevQcow2VersionV2 {
		h.Version = 2
	}
	cs := pick(o.ClusterSize, layout.DefaultClusterSize)
	cb, err := clusterBits(cs)
	if err != nil {
		return nil, err
	}
	h.ClusterBits = uint32(cb)
	extended := pick(o.ExtendedL2, false)
	if extended {
		if h.Version < 3 {
			return nil, errors.New("Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)")
		}
		if h.ClusterBits < layout.MinExtendedBits {
			return nil, errSmallExtended
		}
		h.IncompatibleFeatures |= layout.IncompatExtL2
	}
	h.RefcountTableOffset = cs
	if o.BackingFile != nil && !extended && pick(o.Preallocation, types.PreallocModeOff) != types.PreallocModeOff {
		return nil, errors.New("Backing file and preallocation can only be used at the same time if extended_l2 is on")
	}
	if o.DataFile != nil {
		if h.Version < 3 {
			return nil, errors.New("External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)")
		}
		h.IncompatibleFeatures |= layout.IncompatDataFile
	}
	if pick(o.DataFileRaw, false) {
		if o.DataFile == nil {
			return nil, errors.New("data-file-raw requires data-file")
		}
		if o.BackingFile != nil {
			return nil, errors.New("Backing file and data-file-raw cannot be used at the same time")
		}
		h.AutoclearFeatures |= layout.AutoclearDataFileRaw
	}
	if o.BackingFmt != nil && o.BackingFile == nil {
		return nil, errors.New("Backing format cannot be used without backing file")
	}
	lazy := pick(o.LazyRefcounts, false)
	if h.Version < 3 && lazy {
		return nil, errors.New("Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)")
	}
	order, err := refcountOrder(pick(o.RefcountBits, 16), h.Version < 3)
	if err != nil {
		return nil, err
	}
	h.RefcountOrder = uint32(order)
	if lazy {
		h.CompatibleFeatures |= layout.CompatLazyRefcounts
	}
	if pick(o.CompressionType, types.Qcow2CompressionTypeZlib) == types.Qcow2CompressionTypeZstd {
		if h.Version < 3 {
			return nil, errors.New("Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)")
		}
		h.CompressionType = layout.CompressionZstd
		h.IncompatibleFeatures |= layout.IncompatCompression
	}
	return h, nil
}

// clusterBits is log2 of a cluster size, if that is one.
func clusterBits(cs uint64) (uint, error) {
	if bits.OnesCount64(cs) != 1 || cs < 1<<layout.MinClusterBits || cs > 1<<layout.MaxClusterBits {
		return 0, fmt.Errorf("Cluster size must be a power of two between %d and %dk",
			1<<layout.MinClusterBits, 1<<(layout.MaxClusterBits-10))
	}
	return uint(bits.TrailingZeros64(cs)), nil
}

// refcountOrder is log2 of the width of a refcount, if an image of its version may have that.
func refcountOrder(width int64, v2 bool) (uint, error) {
	switch {
	case width > 64 || width < 1 || bits.OnesCount64(uint64(width)) != 1:
		return 0, errors.New("Refcount width must be a power of two and may not exceed 64 bits")
	case v2 && width != 16:
		return 0, errors.New("Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)")
	}
	return uint(bits.TrailingZeros64(uint64(width))), nil
}

var errSmallExtended = fmt.Errorf("Extended L2 entries are only supported with cluster sizes of at least %d bytes",
	1<<layout.MinExtendedBits)

// create makes an image in f.
func create(r *blk.Req, f file, o *types.BlockdevCreateOptionsQcow2) error {
	return createWith(r, f, nil, "", o, nil)
}

// createWith makes an image in f: a header and an empty refcount table, then everything else by
// opening and resizing it. data, if not nil, has the data of the disk, and the header calls it
// dataName.
func createWith(
	r *blk.Req, f, data file, dataName string, o *types.BlockdevCreateOptionsQcow2, words passwords,
) error {
	h, err := newHeader(o)
	if err != nil {
		return err
	}
	cs := int64(1) << h.ClusterBits
	b := make([]byte, cs)
	enc, err := h.Marshal(&layout.Extensions{DataFile: dataName}, "")
	if err != nil {
		return err
	}
	copy(b, enc)
	if err := f.WriteAt(r, blk.Buf(b), 0, 0); err != nil {
		return wrap("Could not write qcow2 header", err)
	}
	t := make([]byte, 2*cs)
	be.PutUint64(t, uint64(2*cs))
	if err := f.WriteAt(r, blk.Buf(t), cs, 0); err != nil {
		return wrap("Could not write refcount table", err)
	}
	off := false
	options := types.BlockdevOptionsQcow2{LazyRefcounts: &off, CacheCleanInterval: new(int64)}
	s, err := openImage(r, config{
		file: f, external: data, bare: true, options: options, sealing: o.Encrypt != nil, password: words,
	})
	if err != nil {
		return err
	}
	err = s.populate(r, o)
	if err == nil {
		if err = s.Inactivate(r); err != nil {
			err = wrap("Could not write the image", err)
		}
	}
	return errors.Join(err, s.Close())
}

// maxLength is the largest size that QEMU's block layer knows.
const maxLength = math.MaxInt64 &^ (1<<30 - 1)

// populate turns the empty image into the one asked for.
func (s *image) populate(r *blk.Req, o *types.BlockdevCreateOptionsQcow2) error {
	s.mu.Lock()
	err := s.cover(r, 0, 3)
	if err == nil {
		err = s.take(r, 0, 3)
	}
	s.freeIdx = 3
	s.mu.Unlock()
	if err != nil {
		return wrap("Could not allocate clusters for qcow2 header and refcount table", err)
	}
	if err := s.ChangeBackingFile(r, "", ""); err != nil { // the feature name table
		return wrap("Could not update qcow2 header", err)
	}
	switch {
	case o.Size > math.MaxInt64:
		return errors.New("Could not resize image: Image size cannot be negative")
	case o.Size > maxLength:
		return fmt.Errorf("Could not resize image: offset(%d) exceeds maximum(%d)", o.Size, maxLength)
	}
	if err := s.Resize(r, int64(o.Size), blk.Prealloc(pick(o.Preallocation, types.PreallocModeOff))); err != nil {
		return fmt.Errorf("Could not resize image: %w", err)
	}
	if err := s.assignBacking(r, o); err != nil || o.Encrypt == nil {
		return err
	}
	return s.encrypt(r, o.Encrypt)
}

// assignBacking enters the backing file into the header.
func (s *image) assignBacking(r *blk.Req, o *types.BlockdevCreateOptionsQcow2) error {
	if o.BackingFile == nil {
		return nil
	}
	name, format := *o.BackingFile, string(pick(o.BackingFmt, ""))
	if err := s.ChangeBackingFile(r, name, format); err != nil {
		shown := format
		if o.BackingFmt == nil {
			shown = "(null)"
		}
		return wrap(fmt.Sprintf("Could not assign backing file '%s' with format '%s'", name, shown), err)
	}
	return nil
}

// CheckBackingFile implements graph.BackingChanger. A data file that shows the disk by itself has
// all of it: nothing may lie below.
func (s *image) CheckBackingFile(name, format string) error {
	if len(name) > layout.MaxBackingName || len(format) > layout.MaxBackingFormat || s.raw && name != "" {
		return errInval
	}
	return nil
}

// ChangeBackingFile implements graph.BackingChanger; an empty name and an empty format remove them.
func (s *image) ChangeBackingFile(r *blk.Req, name, format string) error {
	if err := s.CheckBackingFile(name, format); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	oldName, oldFormat := s.backName, s.ext.BackingFormat
	s.backName, s.ext.BackingFormat = name, format
	if err := s.updateHeader(r); err != nil {
		s.backName, s.ext.BackingFormat = oldName, oldFormat
		return err
	}
	return nil
}
