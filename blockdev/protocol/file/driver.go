package file

import (
	"golang.org/x/sys/unix"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func open(o *driver.Opening, opts *types.BlockdevOptionsFile, device bool) (graph.Driver, error) {
	n := o.Node.Options()
	s := settings{
		name:   opts.Filename,
		driver: n.DriverName,
		device: device,
		drive:  n.DriverName == string(types.BlockdevDriverHostCdrom),
		ro:     n.ReadOnly,
		auto:   n.AutoReadOnly,
		direct: n.Direct, noFlush: n.NoFlush,
		locks: types.Or(opts.Locking, types.OnOffAutoAuto) != types.OnOffAutoOff,
		admit: o.Admit,
	}
	s.setCache(opts)
	d, err := openDisk(o.Ctx, s)
	if err != nil {
		return nil, err
	}
	if err := d.setAio(opts); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// setAio chooses how requests reach the kernel. Memory file systems need none of it.
func (d *disk) setAio(opts *types.BlockdevOptionsFile) (err error) {
	queue, failed := newUring, "Unable to use io_uring: failed to init linux io_uring ring"
	switch types.Or(opts.Aio, types.BlockdevAioOptionsThreads) {
	case types.BlockdevAioOptionsThreads:
		return nil
	case types.BlockdevAioOptionsNative:
		if !d.settings.direct {
			return blk.Text("aio=native was specified, but it requires cache.direct=on, which was not specified.", unix.EINVAL)
		}
		queue, failed = newLinuxAIO, "Unable to use native AIO: failed to create linux AIO context"
	}
	if d.memory {
		return nil
	}
	if d.engine, err = newEngine(types.Or(opts.AioMaxBatch, 0), queue); err != nil {
		return blk.Errnof(err, "%s", failed)
	}
	return nil
}

var (
	_ graph.Informer      = (*disk)(nil)
	_ graph.StatsReporter = (*disk)(nil)
)

// ImageInfo implements graph.Informer: a file is never dirty, but says so. What else it has to add
// is its extent size hint, if there is one.
func (d *disk) ImageInfo(info *types.ImageInfo) {
	info.DirtyFlag = new(bool)
	if d.hint == 0 {
		return
	}
	hint := uint64(d.hint)
	info.FormatSpecific = &types.ImageInfoSpecific{
		Type: types.ImageInfoSpecificKindFile,
		U:    &types.ImageInfoSpecificFileWrapper{Data: types.ImageInfoSpecificFile{ExtentSizeHint: &hint}},
	}
}

// DriverStats implements graph.StatsReporter.
func (d *disk) DriverStats() *types.BlockStatsSpecific {
	return &types.BlockStatsSpecific{
		Driver: types.BlockdevDriver(d.driver),
		U: &types.BlockStatsSpecificFile{
			DiscardNbOk:     uint64(d.discardOK.Load()),
			DiscardNbFailed: uint64(d.discardErr.Load()),
			DiscardBytesOk:  uint64(d.discardN.Load()),
		},
	}
}
