package layout

import "encoding/binary"

// Masks and flags of table entries (qcow2.txt, Cluster mapping).
const (
	OffsetMask = 0x00fffffffffffe00 // host offset in L1 and L2 entries
	ReftMask   = 0xfffffffffffffe00 // host offset in refcount table entries
	Copied     = 1 << 63            // refcount is exactly one
	Compressed = 1 << 62
	ZeroFlag   = 1
	// reservedBits are those of L2 entries that nothing uses.
	reservedBits = ^uint64(OffsetMask | Copied | Compressed | ZeroFlag)
	MaxHostBits  = 56  // host offsets are below 2^56
	sector       = 512 // unit of compressed lengths
)

// Geometry is what follows from cluster size and refcount width.
type Geometry struct {
	ClusterBits   uint
	RefcountOrder uint
	// External: data are in another file, each cluster where it is on the disk. They have no
	// refcounts there.
	External bool
	// Extended: L2 entries have a bitmap of subclusters.
	Extended bool
}

// Geometry of the image with header h.
func (h *Header) Geometry() Geometry {
	return Geometry{ClusterBits: uint(h.ClusterBits), RefcountOrder: uint(h.RefcountOrder), External: h.External(),
		Extended: h.IncompatibleFeatures&IncompatExtL2 != 0}
}

// ClusterSize in bytes.
func (g Geometry) ClusterSize() int64 { return 1 << g.ClusterBits }

// L2Bits is log2 of the number of entries in an L2 table.
func (g Geometry) L2Bits() uint { return g.ClusterBits - g.EntryBits() }

// RefblockBits is log2 of the number of clusters that one refcount block counts.
func (g Geometry) RefblockBits() uint { return g.ClusterBits + 3 - g.RefcountOrder }

// RefcountMax is the largest refcount that fits.
func (g Geometry) RefcountMax() uint64 {
	return 1<<(uint(1)<<g.RefcountOrder-1) - 1 + 1<<(uint(1)<<g.RefcountOrder-1)
}

// L1Entries is the number of L1 entries that a disk of size bytes needs.
func (g Geometry) L1Entries(size uint64) uint64 {
	shift := g.ClusterBits + g.L2Bits()
	n := size >> shift
	if size&(1<<shift-1) != 0 {
		n++
	}
	return n
}

// RoundUp rounds n up to a multiple of the cluster size.
func (g Geometry) RoundUp(n int64) int64 {
	cs := g.ClusterSize()
	return (n + cs - 1) &^ (cs - 1)
}

// RoundDown rounds n down to a multiple of the cluster size.
func (g Geometry) RoundDown(n int64) int64 { return n &^ (g.ClusterSize() - 1) }

// Clusters is the number of clusters that n bytes take.
func (g Geometry) Clusters(n int64) int64 { return (n + g.ClusterSize() - 1) >> g.ClusterBits }

// Kind classifies an L2 entry.
type Kind uint8

const (
	Unallocated    Kind = iota
	ZeroPlain           // reads as zeroes, no host cluster
	ZeroAlloc           // reads as zeroes, host cluster kept
	Normal              // data in a host cluster
	CompressedKind      // compressed data
	Invalid             // no sound image has it
)

// KindOf classifies L2 entry e. In another file 0 is a place like others, if it has the copied
// flag. Of an extended entry it says whether it has a host cluster; SubKind says more.
func (g Geometry) KindOf(e uint64) Kind {
	switch {
	case e&Compressed != 0:
		return CompressedKind
	case g.Extended && e&OffsetMask != 0:
		return Normal
	case e&ZeroFlag != 0 && !g.Extended:
		if e&OffsetMask != 0 {
			return ZeroAlloc
		}
		return ZeroPlain
	case e&OffsetMask == 0 && (!g.External || e&Copied == 0):
		return Unallocated
	}
	return Normal
}

// Reserved are the bits that are zero in L2 entries that are not compressed.
func (g Geometry) Reserved() uint64 {
	if g.Extended {
		return reservedBits | ZeroFlag
	}
	return reservedBits
}

// HasHost tells whether entries of kind k own host clusters.
func (k Kind) HasHost() bool { return k >= ZeroAlloc }

// CompressedRange decodes the compressed L2 entry e: the data lie in [off, off+n), of which the
// last bytes may be unused.
func (g Geometry) CompressedRange(e uint64) (off, n int64) {
	shift := 62 - (g.ClusterBits - 8)
	off = int64(e & (1<<shift - 1))
	sectors := int64(e>>shift)&(1<<(g.ClusterBits-8)-1) + 1
	return off, sectors*sector - off&(sector-1)
}

// HostRange is the part of the file that L2 entry e refers to; n is 0 if there is none, as where
// data are in another file.
func (g Geometry) HostRange(e uint64) (off, n int64) {
	switch k := g.KindOf(e); {
	case g.External:
	case k == CompressedKind:
		return g.CompressedRange(e)
	case k.HasHost():
		return int64(e & OffsetMask), g.ClusterSize()
	}
	return 0, 0
}

// CompressedEntry encodes n bytes of compressed data at off.
func (g Geometry) CompressedEntry(off, n int64) uint64 {
	shift := 62 - (g.ClusterBits - 8)
	sectors := (off+n-1)/sector - off/sector
	return Compressed | uint64(sectors)<<shift | uint64(off)
}

// MaxCompressedOffset is the first offset that a compressed entry cannot express.
func (g Geometry) MaxCompressedOffset() int64 {
	return 1 << min(62-(g.ClusterBits-8), MaxHostBits)
}

// Refcount reads entry i of refcount block b (qcow2.txt, Refcount block entry).
func (g Geometry) Refcount(b []byte, i int64) uint64 {
	switch g.RefcountOrder {
	case 0, 1, 2:
		w := uint(1) << g.RefcountOrder
		bit := uint(i) * w
		return uint64(b[bit>>3]>>(bit&7)) & (1<<w - 1)
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(b[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(b[4*i:]))
	}
	return binary.BigEndian.Uint64(b[8*i:])
}

// SetRefcount writes entry i of refcount block b; v must not exceed RefcountMax.
func (g Geometry) SetRefcount(b []byte, i int64, v uint64) {
	if v > g.RefcountMax() {
		panic("layout: refcount does not fit")
	}
	switch g.RefcountOrder {
	case 0, 1, 2:
		w := uint(1) << g.RefcountOrder
		bit := uint(i) * w
		m := byte(1<<w-1) << (bit & 7)
		b[bit>>3] = b[bit>>3]&^m | byte(v)<<(bit&7)
	case 3:
		b[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(b[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(b[4*i:], uint32(v))
	default:
		binary.BigEndian.PutUint64(b[8*i:], v)
	}
}
