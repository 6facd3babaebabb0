package layout

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

const (
	// BitmapInUse: a program has the bitmap in memory, or had and ended without storing it.
	BitmapInUse = 1
	// BitmapAuto: the bitmap records while the image is open.
	BitmapAuto = 2

	bitmapHeaderSize = 24
)

// BitmapEntry is one persistent bitmap in the directory (qcow2.txt, Bitmap directory).
type BitmapEntry struct {
	Name        string
	TableOffset uint64
	TableSize   uint32 // entries
	Flags       uint32
	Granularity int64 // bytes
	extra       []byte
}

// ParseBitmapDirectory decodes the n entries that fill the directory b. What it allocates is bounded by the size of b.
func ParseBitmapDirectory(b []byte, n uint32) ([]BitmapEntry, error) {
	be := binary.BigEndian
	var out []BitmapEntry
	for i := range n {
		if len(b) < bitmapHeaderSize {
			return nil, fmt.Errorf("bitmap directory ends at entry %d of %d", i, n)
		}
		nameLen := uint64(be.Uint16(b[18:]))
		nameAt := bitmapHeaderSize + uint64(be.Uint32(b[20:]))
		size := (nameAt + nameLen + 7) &^ 7
		shift := b[17]
		switch {
		case size > uint64(len(b)):
			return nil, fmt.Errorf("entry %d of the bitmap directory is too long", i)
		case shift < 9 || shift > 31 || nameLen == 0 || nameLen > 1023:
			return nil, fmt.Errorf("entry %d of the bitmap directory is invalid", i)
		}
		out = append(out, BitmapEntry{
			Name:        string(b[nameAt : nameAt+nameLen]),
			TableOffset: be.Uint64(b),
			TableSize:   be.Uint32(b[8:]),
			Flags:       be.Uint32(b[12:]),
			Granularity: 1 << shift,
			extra:       b[bitmapHeaderSize:nameAt:nameAt],
		})
		b = b[size:]
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("bitmap directory has %d bytes too many", len(b))
	}
	return out, nil
}

// AppendBitmapDirectory appends the directory of entries to b.
func AppendBitmapDirectory(b []byte, entries []BitmapEntry) []byte {
	be := binary.BigEndian
	for i := range entries {
		e := &entries[i]
		b = be.AppendUint64(b, e.TableOffset)
		b = be.AppendUint32(b, e.TableSize)
		b = be.AppendUint32(b, e.Flags)
		b = append(b, 1, byte(bits.TrailingZeros64(uint64(e.Granularity)))) // 1: a dirty tracking bitmap
		b = be.AppendUint16(b, uint16(len(e.Name)))
		b = be.AppendUint32(b, uint32(len(e.extra)))
		b = append(append(b, e.extra...), e.Name...)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
	}
	return b
}
