package virtio

import "encoding/binary"

// BlkConfig is the configuration space of a block device (virtio 1.2, 5.2.4). Fields hold if their
// feature was negotiated; what has no field here is zero.
type BlkConfig struct {
	Capacity uint64 // sectors of 512 bytes
	SizeMax  uint32 // bytes of a segment of a request; BlkFSizeMax
	SegMax   uint32 // segments of a request; BlkFSegMax

	BlockSize       uint32 // bytes; BlkFBlockSize
	PhysicalExp     uint8  // blocks of a physical block, as exponent of 2; BlkFTopology, as the next three
	AlignmentOffset uint8  // blocks before the first physical one
	MinIO           uint16 // blocks
	OptIO           uint32 // blocks
	WriteBack       bool   // there is a volatile cache: BlkFConfigWCE
	Queues          uint16 // BlkFMultiQueue

	MaxDiscardSectors  uint32 // BlkFDiscard, as the next two
	MaxDiscardSegments uint32
	DiscardAlign       uint32 // sectors
	MaxZeroSectors     uint32 // BlkFWriteZeroes, as the next two
	MaxZeroSegments    uint32
	ZeroMayUnmap       bool
}

const (
	// BlkConfigSize is the length of the space, in bytes, with the fields of zoned devices.
	BlkConfigSize = 96
	// BlkConfigWCE is where the byte is that the driver may write, see BlkFConfigWCE.
	BlkConfigWCE = 32
)

// Encode is the space as bytes.
func (c *BlkConfig) Encode() (b [BlkConfigSize]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], c.Capacity)
	le.PutUint32(b[8:], c.SizeMax)
	le.PutUint32(b[12:], c.SegMax)
	// 16: cylinders, heads, sectors
	le.PutUint32(b[20:], c.BlockSize)
	b[24], b[25] = c.PhysicalExp, c.AlignmentOffset
	le.PutUint16(b[26:], c.MinIO)
	le.PutUint32(b[28:], c.OptIO)
	b[BlkConfigWCE] = bit(c.WriteBack)
	le.PutUint16(b[34:], c.Queues)
	le.PutUint32(b[36:], c.MaxDiscardSectors)
	le.PutUint32(b[40:], c.MaxDiscardSegments)
	le.PutUint32(b[44:], c.DiscardAlign)
	le.PutUint32(b[48:], c.MaxZeroSectors)
	le.PutUint32(b[52:], c.MaxZeroSegments)
	b[56] = bit(c.ZeroMayUnmap)
	return b
}

func bit(v bool) byte {
	if v {
		return 1
	}
	return 0
}
