package layout

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Magic is the first word of every image: "QFI\xfb".
const Magic = 0x514649fb

// Limits of the format and of what QEMU accepts.
const (
	MinClusterBits = 9
	MaxClusterBits = 21
	// MinExtendedBits is that of images with extended L2 entries.
	MinExtendedBits = 14
	// MaxL1Bytes and MaxReftableBytes bound the tables that are held in memory.
	MaxL1Bytes       = 32 << 20
	MaxReftableBytes = 8 << 20
	MaxSnapshots     = 65536
	// HeaderSize is the length of the header written by us for version 3.
	HeaderSize = 112
	// HeaderSizeV2 is the length of a version 2 header.
	HeaderSizeV2 = 72
	// DefaultClusterSize is used when create options name none.
	DefaultClusterSize = 65536
	// MaxBackingName is the longest backing file name in bytes.
	MaxBackingName = 1023
	// MaxBackingFormat is the longest name of its format.
	MaxBackingFormat = 15
)

// Byte offsets of header fields that are updated on their own.
const (
	OffL1Size            = 36 // l1_size (4), l1_table_offset (8)
	OffReftable          = 48 // refcount_table_offset (8), refcount_table_clusters (4)
	OffSize              = 24
	OffSnapshots         = 60 // nb_snapshots (4), snapshots_offset (8)
	OffIncompatFeatures  = 72
	OffAutoclearFeatures = 88
)

// Incompatible feature bits (qcow2.txt, Header).
const (
	IncompatDirty       = 1 << 0
	IncompatCorrupt     = 1 << 1
	IncompatDataFile    = 1 << 2
	IncompatCompression = 1 << 3
	IncompatExtL2       = 1 << 4
	// incompatKnown are the bits that the driver can work with.
	incompatKnown = IncompatDirty | IncompatCorrupt | IncompatDataFile | IncompatCompression |
		IncompatExtL2
)

// Compatible and autoclear feature bits.
const (
	CompatLazyRefcounts  = 1 << 0
	AutoclearBitmaps     = 1 << 0
	AutoclearDataFileRaw = 1 << 1
	// AutoclearMarks is ours: all who wrote to the image have kept the bitmaps of the marks
	// extension up to date, so that they hold although they are said to be in use. Other programs
	// clear it before they write.
	AutoclearMarks = 1 << 62
)

// Compression types.
const (
	CompressionZlib = 0
	CompressionZstd = 1
)

// Encryption methods.
const (
	CryptNone = 0
	CryptAES  = 1
	CryptLUKS = 2
)

// Header is the image header; fields carry the names of qcow2.txt. Version 2 headers are
// given the values that version 3 fields have by default.
type Header struct {
	Version               uint32
	BackingFileOffset     uint64
	BackingFileSize       uint32
	ClusterBits           uint32
	Size                  uint64 // bytes
	CryptMethod           uint32
	L1Size                uint32 // entries
	L1TableOffset         uint64
	RefcountTableOffset   uint64
	RefcountTableClusters uint32
	NbSnapshots           uint32
	SnapshotsOffset       uint64
	IncompatibleFeatures  uint64
	CompatibleFeatures    uint64
	AutoclearFeatures     uint64
	RefcountOrder         uint32
	HeaderLength          uint32
	CompressionType       uint8
	// Unknown are the header fields beyond those known, kept verbatim.
	Unknown []byte
}

// Probe tells whether b, the beginning of a file, looks like a qcow2 image.
func Probe(b []byte) bool {
	return len(b) >= HeaderSizeV2 && binary.BigEndian.Uint32(b) == Magic && binary.BigEndian.Uint32(b[4:]) >= 2
}

// Peek checks magic, version and cluster size in the first HeaderSize bytes of a file (padded with
// zeroes where the file is shorter) and returns the cluster size in bytes, which is how much Parse
// needs.
func Peek(b []byte) (clusterSize int, err error) {
	be := binary.BigEndian
	if len(b) < HeaderSizeV2 || be.Uint32(b) != Magic {
		return 0, fmt.Errorf("Image is not in qcow2 format")
	}
	if v := be.Uint32(b[4:]); v < 2 || v > 3 {
		return 0, fmt.Errorf("Unsupported qcow2 version %d", v)
	}
	bits := be.Uint32(b[20:])
	if bits < MinClusterBits || bits > MaxClusterBits {
		return 0, fmt.Errorf("Unsupported cluster size: 2^%d", bits)
	}
	return 1 << bits, nil
}

// Parse reads and checks the header at the beginning of the first cluster b (padded with zeroes
// where the file is shorter). writable refuses images marked corrupt. Checks are made in QEMU's
// order, so that the first fault is reported as there.
func Parse(b []byte, writable bool) (*Header, error) {
	cs, err := Peek(b)
	if err != nil {
		return nil, err
	}
	if len(b) < cs {
		panic("layout: Parse needs the whole first cluster")
	}
	h := decode(b)
	if h.Version >= 3 && h.HeaderLength < 104 {
		return nil, fmt.Errorf("qcow2 header too short")
	}
	if uint64(h.HeaderLength) > uint64(cs) {
		return nil, fmt.Errorf("qcow2 header exceeds cluster size")
	}
	if h.HeaderLength > HeaderSize {
		h.Unknown = append([]byte(nil), b[HeaderSize:h.HeaderLength]...)
	}
	if h.IncompatibleFeatures&IncompatExtL2 != 0 && h.ClusterBits < MinExtendedBits {
		return nil, fmt.Errorf("Unsupported subcluster size: %d", cs/Subclusters)
	}
	if h.BackingFileOffset > uint64(cs) {
		return nil, fmt.Errorf("Invalid backing file offset")
	}
	if err := h.checkFeatures(b, writable); err != nil {
		return nil, err
	}
	if err := h.checkTables(); err != nil {
		return nil, err
	}
	return h, nil
}

// fields are the header's fields behind magic in their order in the file: those of version 2, and
// those that came with version 3.
func (h *Header) fields() (v2, v3 []any) {
	v2 = []any{&h.Version, &h.BackingFileOffset, &h.BackingFileSize, &h.ClusterBits, &h.Size, &h.CryptMethod,
		&h.L1Size, &h.L1TableOffset, &h.RefcountTableOffset, &h.RefcountTableClusters,
		&h.NbSnapshots, &h.SnapshotsOffset}
	return v2, []any{&h.IncompatibleFeatures, &h.CompatibleFeatures, &h.AutoclearFeatures, &h.RefcountOrder,
		&h.HeaderLength, &h.CompressionType}
}

func decode(b []byte) *Header {
	h := &Header{RefcountOrder: 4, HeaderLength: HeaderSizeV2}
	read := func(at int, fields []any) {
		for _, f := range fields {
			n, _ := binary.Decode(b[at:], binary.BigEndian, f)
			at += n
		}
	}
	v2, v3 := h.fields()
	read(4, v2)
	if h.Version < 3 {
		return h
	}
	read(HeaderSizeV2, v3)
	if h.HeaderLength <= 104 {
		h.CompressionType = 0
	}
	return h
}

// checkFeatures refuses what the driver cannot do. The first cluster may have the names of features
// that we do not know.
func (h *Header) checkFeatures(cluster []byte, writable bool) error {
	if err := h.checkCompression(); err != nil {
		return err
	}
	if bad := h.IncompatibleFeatures &^ incompatKnown; bad != 0 {
		return fmt.Errorf("Unsupported qcow2 feature(s): %s", featureNames(h.featureTable(cluster), bad))
	}
	if writable && h.IncompatibleFeatures&IncompatCorrupt != 0 {
		return fmt.Errorf("qcow2: Image is corrupt; cannot be opened read/write")
	}
	if h.RefcountOrder > 6 {
		return fmt.Errorf("Reference count entry width too large; may not exceed 64 bits")
	}
	if h.AutoclearFeatures&AutoclearDataFileRaw != 0 && !h.External() {
		return fmt.Errorf("data-file-raw requires a data file")
	}
	return nil
}

// External tells whether guest data are in another file.
func (h *Header) External() bool { return h.IncompatibleFeatures&IncompatDataFile != 0 }

// Raw tells whether that file shows the disk to those who know nothing of the image.
func (h *Header) Raw() bool { return h.External() && h.AutoclearFeatures&AutoclearDataFileRaw != 0 }

func (h *Header) checkCompression() error {
	bit := h.IncompatibleFeatures&IncompatCompression != 0
	switch h.CompressionType {
	case CompressionZlib:
		if bit {
			return fmt.Errorf("qcow2: Compression type incompatible feature bit must not be set")
		}
	case CompressionZstd:
		if !bit {
			return fmt.Errorf("qcow2: Compression type incompatible feature bit must be set")
		}
	default:
		return fmt.Errorf("qcow2: unknown compression type: %d", h.CompressionType)
	}
	return nil
}

func (h *Header) checkTables() error {
	if h.RefcountTableClusters == 0 {
		return fmt.Errorf("Image does not contain a reference count table")
	}
	cs := uint64(1) << h.ClusterBits
	n := uint64(h.RefcountTableClusters)
	if err := CheckTable(h.RefcountTableOffset, n, cs, MaxReftableBytes, cs, "Reference count table"); err != nil {
		return err
	}
	if err := h.checkSnapshots(); err != nil {
		return err
	}
	if err := CheckTable(h.L1TableOffset, uint64(h.L1Size), 8, MaxL1Bytes, cs, "Active L1 table"); err != nil {
		return err
	}
	need := h.Geometry().L1Entries(h.Size)
	if need > math.MaxInt32 {
		return fmt.Errorf("Image is too big")
	}
	if uint64(h.L1Size) < need {
		return fmt.Errorf("L1 table is too small")
	}
	return nil
}

func (h *Header) checkSnapshots() error {
	const each = SnapshotHeaderSize
	cs := uint64(1) << h.ClusterBits
	return CheckTable(h.SnapshotsOffset, uint64(h.NbSnapshots), each, each*MaxSnapshots, cs, "Snapshot table")
}

// ForgetSnapshots takes the table of snapshots out of the header in b, if it is where it cannot be,
// and tells why.
func ForgetSnapshots(b []byte) error {
	h := decode(b)
	err := h.checkSnapshots()
	if err != nil {
		clear(b[OffSnapshots : OffSnapshots+12])
	}
	return err
}

// CheckTable checks where a table is: entries of entryLen bytes, at most maxBytes, at a cluster
// boundary and below 2^63.
func CheckTable(off, entries, entryLen, maxBytes, clusterSize uint64, name string) error {
	if entries > maxBytes/entryLen {
		return fmt.Errorf("%s too large", name)
	}
	if off > math.MaxInt64 || math.MaxInt64-entries*entryLen < off || off&(clusterSize-1) != 0 {
		return fmt.Errorf("%s offset invalid", name)
	}
	return nil
}

// BackingName returns the backing file name in the first cluster b, "" if there is none.
func (h *Header) BackingName(b []byte) (string, error) {
	if h.BackingFileOffset == 0 {
		return "", nil
	}
	n := uint64(h.BackingFileSize)
	if n > min(MaxBackingName, uint64(1)<<h.ClusterBits-h.BackingFileOffset) {
		return "", fmt.Errorf("Backing file name too long")
	}
	return cString(b[h.BackingFileOffset : h.BackingFileOffset+n]), nil
}

// extEnd is where the header extensions end at the latest.
func (h *Header) extEnd() uint64 {
	if h.BackingFileOffset != 0 {
		return h.BackingFileOffset
	}
	return uint64(1) << h.ClusterBits
}

// Marshal serialises header, extensions and backing file name as they stand at the beginning of the
// first cluster. It sets the header's length and the place of the backing name. It fails if they do
// not fit into a cluster.
func (h *Header) Marshal(x *Extensions, backing string) ([]byte, error) {
	cs := 1 << h.ClusterBits
	n := HeaderSizeV2
	if h.Version >= 3 {
		n = HeaderSize
	}
	h.HeaderLength = uint32(n + len(h.Unknown))
	b := make([]byte, n, 1024)
	b = append(b, h.Unknown...)
	b = x.appendTo(b, h)
	h.BackingFileOffset, h.BackingFileSize = 0, 0
	if backing != "" {
		h.BackingFileOffset, h.BackingFileSize = uint64(len(b)), uint32(len(backing))
		b = append(b, backing...)
	}
	if len(b) > cs {
		return nil, fmt.Errorf("No space left on device")
	}
	h.encode(b)
	return b, nil
}

func (h *Header) encode(b []byte) {
	fields, v3 := h.fields()
	if h.Version >= 3 {
		fields = append(fields, v3...)
	}
	out := binary.BigEndian.AppendUint32(nil, Magic)
	for _, f := range fields {
		out, _ = binary.Append(out, binary.BigEndian, f)
	}
	copy(b, out)
}
