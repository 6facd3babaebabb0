package luks

import (
	"math"
	"syscall"

	"qblockd/blockdev/crypto"
	"qblockd/graph/blk"
)

// maxBounce is the most that a request has in a buffer of ours.
const maxBounce = 1 << 20

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
	if !v.Aligned(0, crypto.SectorSize) {
		return d.readBounced(r, v, off, f)
	}
	if err := d.file.ReadAt(r, v, off+d.payload, f); err != nil {
		return err
	}
	if b, ok := v.Single(); ok {
		d.cipher.Decrypt(b, b, sector(off))
		return nil
	}
	v.Each(func(b []byte) {
		d.cipher.Decrypt(b, b, sector(off))
		off += int64(len(b))
	})
	return nil
}

// readBounced reads where a buffer ends within a sector.
func (d *disk) readBounced(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	size := v.Len()
	bounce := blk.GetBuf(int(min(size, maxBounce)), 0)
	defer blk.PutBuf(bounce)
	for done := int64(0); done < size; {
		b := bounce.B[:min(size-done, maxBounce)]
		if err := d.file.ReadAt(r, blk.Buf(b), off+done+d.payload, f); err != nil {
			return err
		}
		d.cipher.Decrypt(b, b, sector(off+done))
		v.Slice(done, int64(len(b))).CopyIn(b)
		done += int64(len(b))
	}
	return nil
}

// WriteAt implements graph.Writer. What is written stays as it is for others who have it.
func (d *disk) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	size := v.Len()
	if err := d.within(off, size); err != nil {
		return err
	}
	if r.NoWait && size > maxBounce {
		return blk.ErrWouldBlock // the second piece might have to, with the first one written
	}
	d.file.DebugEvent(r, blk.EvWriteAio)
	bounce := blk.GetBuf(int(min(size, maxBounce)), 0)
	defer blk.PutBuf(bounce)
	for done := int64(0); done < size; {
		b := bounce.B[:min(size-done, maxBounce)]
		if src, ok := v.Single(); ok {
			d.cipher.Encrypt(b, src[done:][:len(b)], sector(off+done))
		} else {
			v.Slice(done, int64(len(b))).CopyOut(b)
			d.cipher.Encrypt(b, b, sector(off+done))
		}
		if err := d.file.WriteAt(r, blk.Buf(b), off+done+d.payload, f); err != nil {
			return err
		}
		done += int64(len(b))
	}
	return nil
}

// sector is the number of a sector, which counts from the beginning of the disk.
func sector(off int64) uint64 { return uint64(off) / crypto.SectorSize }
