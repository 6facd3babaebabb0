package crypto

import "qblockd/graph/blk"

// MaxBounce is the most that a request has in a buffer of ours, in bytes.
const MaxBounce = 1 << 20

// Read reads whole sectors into v by read, which gets each part of v and its place in it, and
// decrypts them. The first sector has that number.
func (c *Cipher) Read(v blk.Vec, sector uint64, read func(part blk.Vec, at int64) error) error {
	if !v.Aligned(0, SectorSize) {
		return c.readBounced(v, sector, read)
	}
	if err := read(v, 0); err != nil {
		return err
	}
	if b, ok := v.Single(); ok {
		c.Decrypt(b, b, sector)
		return nil
	}
	v.Each(func(b []byte) {
		c.Decrypt(b, b, sector)
		sector += uint64(len(b)) / SectorSize
	})
	return nil
}

// readBounced reads where a buffer ends within a sector.
func (c *Cipher) readBounced(v blk.Vec, sector uint64, read func(part blk.Vec, at int64) error) error {
	size := v.Len()
	bounce := blk.GetBuf(int(min(size, MaxBounce)), 0)
	defer blk.PutBuf(bounce)
	for done := int64(0); done < size; {
		b := bounce.B[:min(size-done, MaxBounce)]
		if err := read(blk.Buf(b), done); err != nil {
			return err
		}
		c.Decrypt(b, b, sector+uint64(done)/SectorSize)
		v.Slice(done, int64(len(b))).CopyIn(b)
		done += int64(len(b))
	}
	return nil
}

// Write encrypts the whole sectors in v and writes them by write, which gets each part and its
// place in v. What is written stays as it is for others who have it. More than MaxBounce bytes are
// written in several parts.
func (c *Cipher) Write(v blk.Vec, sector uint64, write func(part blk.Vec, at int64) error) error {
	size := v.Len()
	bounce := blk.GetBuf(int(min(size, MaxBounce)), 0)
	defer blk.PutBuf(bounce)
	for done := int64(0); done < size; {
		b := bounce.B[:min(size-done, MaxBounce)]
		if src, ok := v.Single(); ok {
			c.Encrypt(b, src[done:][:len(b)], sector+uint64(done)/SectorSize)
		} else {
			v.Slice(done, int64(len(b))).CopyOut(b)
			c.Encrypt(b, b, sector+uint64(done)/SectorSize)
		}
		if err := write(blk.Buf(b), done); err != nil {
			return err
		}
		done += int64(len(b))
	}
	return nil
}
