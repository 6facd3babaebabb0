package qcow2

import (
	"context"
	"errors"

	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// measure tells how large an image would be. As in QEMU, what is required includes the tables of a
// disk that has been written as a whole, and a data file makes no difference.
func measure(ctx context.Context, m *driver.Measuring, o *types.QblockdMeasureQcow2) (*types.BlockMeasureInfo, error) {
	g, err := measuredGeometry(o)
	if err != nil {
		return nil, err
	}
	header := int64(0)
	if o.Encrypt != nil {
		if header, err = luks.Room(o.Encrypt); err != nil {
			return nil, err
		}
	}
	// Of a size that rounding up could not represent there are too many tables in any case.
	if m.Size > maxLength || g.L1Entries(uint64(m.Size))*8 > layout.MaxL1Bytes {
		return nil, errors.New("The image size is too large (try using a larger cluster size)")
	}
	disk := g.RoundUp(m.Size)
	all := blk.AlignUp(header, g.ClusterSize()) + fullSize(g, disk)
	data := int64(0)
	mode := pick(o.Preallocation, types.PreallocModeOff)
	switch {
	case mode == types.PreallocModeFull || mode == types.PreallocModeFalloc, pick(o.BackingFile, false) && m.Source != nil:
		data = disk
	case m.Source != nil:
		if data, err = clustersWithData(ctx, m, g); err != nil {
			return nil, err
		}
	}
	info := &types.BlockMeasureInfo{Required: all - disk + data, FullyAllocated: all}
	if m.Bitmaps != nil && pick(o.Version, types.BlockdevQcow2VersionV3) == types.BlockdevQcow2VersionV3 {
		n := bitmapsSize(g, m.Size, m.Bitmaps)
		info.Bitmaps = &n
	}
	return info, nil
}

// measuredGeometry checks the options and gives the geometry of the image.
func measuredGeometry(o *types.QblockdMeasureQcow2) (g layout.Geometry, err error) {
	if g.ClusterBits, err = clusterBits(pick(o.ClusterSize, layout.DefaultClusterSize)); err != nil {
		return g, err
	}
	if g.Extended = pick(o.ExtendedL2, false); g.Extended && g.ClusterBits < layout.MinExtendedBits {
		return g, errSmallExtended
	}
	v2 := pick(o.Version, types.BlockdevQcow2VersionV3) == types.BlockdevQcow2VersionV2
	g.RefcountOrder, err = refcountOrder(pick(o.RefcountBits, 16), v2)
	return g, err
}

// fullSize is the length of an image whose disk, of so many bytes, has been written as a whole.
func fullSize(g layout.Geometry, disk int64) int64 {
	cs := g.ClusterSize()
	entries := blk.AlignUp(g.Clusters(disk), 1<<g.L2Bits())
	l2 := entries << g.EntryBits()
	l1 := blk.AlignUp(l2/cs*8, cs)
	clusters := 1 + (l2+l1+disk)/cs
	// Blocks and table count themselves, too.
	own := int64(0)
	for {
		blocks := (clusters + own + 1<<g.RefblockBits() - 1) >> g.RefblockBits()
		n := blocks + g.Clusters(blocks*8)
		if n == own {
			return (clusters + own) << g.ClusterBits
		}
		own = n
	}
}

// clustersWithData is how many bytes the clusters take that hold data of the source.
func clustersWithData(ctx context.Context, m *driver.Measuring, g layout.Geometry) (n int64, err error) {
	end := int64(0) // of the clusters counted
	err = m.Each(ctx, func(off, size int64) {
		to := g.RoundUp(off + size)
		n += to - max(g.RoundDown(off), end)
		end = to
	})
	return n, err
}

// bitmapsSize is how much bitmaps of a disk of size bytes take: all of their bits, their tables and
// the directory.
func bitmapsSize(g layout.Geometry, size int64, l []driver.MeasuredBitmap) (n int64) {
	dir := int64(0)
	for _, b := range l {
		granules := (size + b.Granularity - 1) / b.Granularity
		clusters := g.Clusters((granules + 7) / 8)
		n += clusters<<g.ClusterBits + g.RoundUp(clusters*8)
		e := layout.NewBitmap(b.Name, b.Granularity, 0)
		dir += e.Size()
	}
	return n + g.RoundUp(dir)
}
