package luks

import (
	"math"
	"syscall"

	"qblockd/blockdev/crypto"
	"qblockd/graph/blk"
)

// within refuses what no offset of the file says.
func (d *disk) within(off, n int64) error {
	if off > math.MaxInt64-d.payload-n {
		return syscall.EIO
	}
	return nil
}

// ReadAt implements graph.Driver.
func (d *disk) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := d.within(off, v.Len()); err != nil {
		return err
	}
	d.file.DebugEvent(r, blk.EvReadAio)
	return d.cipher.Read(v, sector(off), func(part blk.Vec, at int64) error {
		return d.file.ReadAt(r, part, off+at+d.payload, f)
	})
}

// WriteAt implements graph.Writer.
func (d *disk) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	size := v.Len()
	if err := d.within(off, size); err != nil {
		return err
	}
	if r.NoWait && size > crypto.MaxBounce {
		return blk.ErrWouldBlock // the second part might have to, with the first one written
	}
	d.file.DebugEvent(r, blk.EvWriteAio)
	return d.cipher.Write(v, sector(off), func(part blk.Vec, at int64) error {
		return d.file.WriteAt(r, part, off+at+d.payload, f)
	})
}

// sector is the number of a sector, which counts from the beginning of the disk.
func sector(off int64) uint64 { return uint64(off) / crypto.SectorSize }
