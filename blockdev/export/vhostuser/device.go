package vhostuser

import (
	"errors"
	"sync/atomic"

	"qblockd/blockdev/export"
	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// What guests see of a disk; it is what they see of QEMU's.
const (
	serial     = "vhost_user_blk"
	maxSectors = 32768 // of a discard, and of a write of zeroes
	maxSegs    = 126   // of a request's data: what a queue of 128 has room for
)

// device is the disk that front ends see. What can change is atomic: it may be used by any
// goroutine.
type device struct {
	x         *export.Export
	features  uint64
	blockSize uint32
	queues    uint16
	limits    virtio.BlkLimits
	// writeBack: what the guest has chosen, if it can: writes are durable only when flushed.
	writeBack atomic.Bool
}

func (d *device) init(x *export.Export) {
	v := x.Options.U.(*types.BlockExportOptionsVhostUserBlk)
	d.x = x
	d.queues = types.Or(v.NumQueues, 1)
	if d.blockSize = uint32(types.Or(v.LogicalBlockSize, minBlock)); d.blockSize == 0 {
		d.blockSize = minBlock
	}
	d.limits = virtio.BlkLimits{BlockSize: int64(d.blockSize), MaxDiscardSectors: maxSectors, MaxDiscardSegments: 1,
		MaxZeroSectors: maxSectors, MaxZeroSegments: 1}
	d.features = virtio.FVersion1 | virtio.FIndirect | virtio.FEventIdx | virtio.FPacked | vhostwire.FLogAll |
		vhostwire.FProtocolFeatures |
		virtio.BlkFSizeMax | virtio.BlkFSegMax | virtio.BlkFBlockSize | virtio.BlkFFlush | virtio.BlkFTopology |
		virtio.BlkFConfigWCE | virtio.BlkFMultiQueue | virtio.BlkFDiscard | virtio.BlkFWriteZeroes
	if !x.Writable() {
		d.features |= virtio.BlkFReadOnly
	}
	d.reset()
}

// reset takes back what a guest has chosen.
func (d *device) reset() { d.writeBack.Store(!types.Or(d.x.Options.Writethrough, false)) }

// config is the configuration space as it is now.
func (d *device) config() [virtio.BlkConfigSize]byte {
	sectors := d.blockSize / blk.SectorSize
	c := virtio.BlkConfig{
		Capacity: uint64(d.x.Size() / blk.SectorSize), SegMax: maxSegs, BlockSize: d.blockSize, MinIO: 1, OptIO: 1,
		WriteBack: d.writeBack.Load(), Queues: d.queues,
		MaxDiscardSectors: maxSectors, MaxDiscardSegments: 1, DiscardAlign: sectors,
		MaxZeroSectors: maxSectors, MaxZeroSegments: 1, ZeroMayUnmap: true,
	}
	return c.Encode()
}

// setConfig changes the one byte of the space that guests may write.
func (d *device) setConfig(off uint32, b []byte) error {
	if off != virtio.BlkConfigWCE || len(b) != 1 {
		return errors.New("the configuration can be written at the byte for the cache only")
	}
	d.writeBack.Store(b[0] != 0)
	return nil
}

// durable tells whether writes have to be on stable storage when they are acknowledged: the guest
// does not flush, or does not want to.
func (d *device) durable(features uint64) bool {
	return features&virtio.BlkFFlush == 0 || !d.writeBack.Load()
}

// do performs r, with the flags of a write. It needs no lock. The error is that of the node, or
// says what is wrong with r (errRefused).
func (d *device) do(u *blk.Req, r *virtio.Request, f blk.Flags) error {
	return virtio.Guard(func() error {
		root := d.x.Root
		switch r.Op {
		case virtio.OpRead:
			return d.transfer(u, r, 0)
		case virtio.OpWrite:
			return d.transfer(u, r, f)
		case virtio.OpFlush:
			return root.Flush(u)
		case virtio.OpGetID:
			return r.SetID(serial)
		case virtio.OpDiscard, virtio.OpWriteZeroes:
			return d.ranges(u, r, f)
		}
		return errRefused
	})
}

// errRefused: the request asks for what cannot be.
var errRefused = errors.New("request is not valid")

// transfer reads or writes.
func (d *device) transfer(u *blk.Req, r *virtio.Request, f blk.Flags) error {
	if !d.inside(r.Off, r.N) || r.N&(d.limits.BlockSize-1) != 0 {
		return errRefused
	}
	if r.Op == virtio.OpRead {
		return d.x.Root.ReadAt(u, r.Data, r.Off, 0)
	}
	if !d.x.Writable() {
		return errRefused
	}
	return d.x.Root.WriteAt(u, r.Data, r.Off, f)
}

// ranges discards or zeroes.
func (d *device) ranges(u *blk.Req, r *virtio.Request, f blk.Flags) error {
	if !d.x.Writable() {
		return errRefused
	}
	for _, s := range r.Segments {
		if !d.inside(s.Off, s.N) || s.N&(d.limits.BlockSize-1) != 0 {
			return errRefused
		}
	}
	for i, s := range r.Segments {
		if i > 0 && u.NoWait {
			return blk.ErrWouldBlock // what comes after the first may turn out to wait when that is done
		}
		var err error
		switch {
		case r.Op == virtio.OpDiscard:
			err = d.x.Root.Discard(u, s.Off, s.N)
		case s.Unmap:
			err = d.x.Root.Zero(u, s.Off, s.N, f|blk.MayUnmap)
		default:
			err = d.x.Root.Zero(u, s.Off, s.N, f)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// inside tells whether a range is within the disk.
func (d *device) inside(off, n int64) bool {
	size := d.x.Size()
	return off <= size && n <= size-off
}

// status is what guests are told of err.
func status(r *virtio.Request, err error) virtio.Status {
	switch {
	case r.Op == virtio.OpRefused:
		return r.Status
	case err == nil:
		return virtio.StatusOK
	case errors.Is(err, blk.ErrNotSupported):
		return virtio.StatusUnsupported
	}
	return virtio.StatusIOErr
}

// operation is what r counts as among errors.
func operation(r *virtio.Request) types.IoOperationType {
	if r.Op == virtio.OpRead {
		return types.IoOperationTypeRead
	}
	return types.IoOperationTypeWrite
}
