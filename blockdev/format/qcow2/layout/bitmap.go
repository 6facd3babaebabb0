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

	// BitmapHeaderSize is the fixed part of an entry of the bitmap directory.
	BitmapHeaderSize = 24
	// MaxBitmapName is the longest name of a bitmap in bytes.
	MaxBitmapName = 1023

	typeTracking   = 1         // the only type of bitmap there is
	maxBitmapExtra = 64 << 10  // bytes
	maxBitmapBytes = 512 << 20 // of the data of one, as others accept it
)

// BitmapEntry is one persistent bitmap in the directory (qcow2.txt, Bitmap directory).
type BitmapEntry struct {
	Name        string
	TableOffset uint64
	TableSize   uint32 // entries
	Flags       uint32
	Granularity int64 // bytes
	kind        uint8
	extra       []byte
}

// BitmapNeed tells how many bytes the entry of the bitmap directory takes whose first
// BitmapHeaderSize bytes are b; left are those that the directory still has from there. index and
// n, the number of entries, are for the error, after which nobody knows where the next one begins.
func BitmapNeed(b []byte, left int64, index, n uint32) (int, error) {
	be := binary.BigEndian
	nameLen, extra := int64(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
	size := (BitmapHeaderSize + extra + nameLen + 7) &^ 7
	switch shift := b[17]; {
	case left < BitmapHeaderSize:
		return 0, fmt.Errorf("bitmap directory ends at entry %d of %d", index, n)
	case size > left:
		return 0, fmt.Errorf("entry %d of the bitmap directory is too long", index)
	case shift < 9 || shift > 31 || nameLen == 0 || nameLen > MaxBitmapName || extra > maxBitmapExtra:
		return 0, fmt.Errorf("entry %d of the bitmap directory is invalid", index)
	}
	return int(size), nil
}

// ParseBitmap decodes one entry; b holds BitmapNeed bytes.
func ParseBitmap(b []byte) BitmapEntry {
	be := binary.BigEndian
	nameAt := BitmapHeaderSize + int(be.Uint32(b[20:]))
	e := BitmapEntry{
		Name:        string(b[nameAt : nameAt+int(be.Uint16(b[18:]))]),
		TableOffset: be.Uint64(b),
		TableSize:   be.Uint32(b[8:]),
		Flags:       be.Uint32(b[12:]),
		Granularity: 1 << b[17],
		kind:        b[16],
	}
	if nameAt > BitmapHeaderSize {
		e.extra = append([]byte(nil), b[BitmapHeaderSize:nameAt]...)
	}
	return e
}

// TableBytes is the length of the table.
func (e *BitmapEntry) TableBytes() int64 { return int64(e.TableSize) * 8 }

// Fits tells whether the entry describes a bitmap that we know: the type and the flags, no further
// data, and a table where one can be in an image with clusters of that size.
func (e *BitmapEntry) Fits(clusterSize int64) bool {
	const known = BitmapInUse | BitmapAuto
	return e.kind == typeTracking && e.Flags&^known == 0 && len(e.extra) == 0 &&
		e.TableSize != 0 && int64(e.TableSize) <= maxBitmapBytes/clusterSize &&
		e.TableOffset != 0 && e.TableOffset < 1<<MaxHostBits && e.TableOffset&uint64(clusterSize-1) == 0
}

// NewBitmap is an entry that has no table yet.
func NewBitmap(name string, granularity int64, flags uint32) BitmapEntry {
	return BitmapEntry{Name: name, Granularity: granularity, Flags: flags, kind: typeTracking}
}

// Size is the number of bytes that the entry takes in the directory.
func (e *BitmapEntry) Size() int64 {
	return int64(BitmapHeaderSize+len(e.extra)+len(e.Name)+7) &^ 7
}

// AppendBitmapDirectory appends the directory of entries to b.
func AppendBitmapDirectory(b []byte, entries []BitmapEntry) []byte {
	be := binary.BigEndian
	for i := range entries {
		e := &entries[i]
		b = be.AppendUint64(b, e.TableOffset)
		b = be.AppendUint32(b, e.TableSize)
		b = be.AppendUint32(b, e.Flags)
		b = append(b, e.kind, byte(bits.TrailingZeros64(uint64(e.Granularity))))
		b = be.AppendUint16(b, uint16(len(e.Name)))
		b = be.AppendUint32(b, uint32(len(e.extra)))
		b = append(append(b, e.extra...), e.Name...)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
	}
	return b
}
