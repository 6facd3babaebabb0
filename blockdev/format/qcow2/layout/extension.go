package layout

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
)

// Types of header extensions (qcow2.txt, Header extensions).
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureTable  = 0x6803f857
	extCrypto        = 0x0537be77
	extBitmaps       = 0x23852875
	extDataFile      = 0x44415441
	extMarks         = 0x71626d6b // "qbmk", ours
)

const featureEntrySize = 48

// MaxBitmapDirectory is the most that the directory of bitmaps takes, in bytes.
const MaxBitmapDirectory = 1024 * 65535

// Bitmaps is the bitmaps extension: where the directory of persistent bitmaps lies.
type Bitmaps struct {
	NbBitmaps       uint32
	DirectorySize   uint64
	DirectoryOffset uint64
}

// Crypto is the full disk encryption header pointer: where the header with the keys lies, in bytes.
type Crypto struct{ Offset, Length uint64 }

// RawExtension is one we know nothing about, kept as it was.
type RawExtension struct {
	Magic uint32
	Data  []byte
}

// Extensions are all header extensions of an image but the feature name table, which is written
// anew.
type Extensions struct {
	BackingFormat string
	// DataFile is the name of the file that has the guest data; it counts if the header says so.
	DataFile string
	// Crypto is nil unless the image is encrypted as by LUKS.
	Crypto *Crypto
	// Bitmaps is nil without the extension, or if no program kept it up to date (autoclear
	// bit 0 is clear); then BitmapsStale is set.
	Bitmaps      *Bitmaps
	BitmapsStale bool
	// Marks are the places of the tables of bitmaps that hold although they are in use; empty if
	// AutoclearMarks is clear.
	Marks   []uint64
	Unknown []RawExtension
}

// each walks over the extensions in the first cluster b.
func (h *Header) each(b []byte, f func(magic uint32, data []byte) error) error {
	off, end := uint64(h.HeaderLength), h.extEnd()
	for off < end {
		if off+8 > end || off+8 > uint64(len(b)) {
			return fmt.Errorf("Header extension too large")
		}
		magic := binary.BigEndian.Uint32(b[off:])
		n := uint64(binary.BigEndian.Uint32(b[off+4:]))
		off += 8
		if n > end-off {
			return fmt.Errorf("Header extension too large")
		}
		if magic == extEnd {
			return nil
		}
		if err := f(magic, b[off:off+n]); err != nil {
			return err
		}
		off += (n + 7) &^ 7
	}
	return nil
}

// ParseExtensions reads the header extensions in the first cluster b.
func (h *Header) ParseExtensions(b []byte) (*Extensions, error) {
	x := &Extensions{}
	err := h.each(b, func(magic uint32, data []byte) error {
		switch magic {
		case extBackingFormat:
			if len(data) >= 16 {
				return fmt.Errorf("ERROR: ext_backing_format: len=%d too large (>=16)", len(data))
			}
			x.BackingFormat = cString(data)
		case extFeatureTable:
		case extDataFile:
			x.DataFile = cString(data)
		case extCrypto:
			return x.parseCrypto(h, data)
		case extBitmaps:
			return x.parseBitmaps(h, data)
		case extMarks:
			for h.AutoclearFeatures&AutoclearMarks != 0 && len(data) >= 8 {
				x.Marks = append(x.Marks, binary.BigEndian.Uint64(data))
				data = data[8:]
			}
		default:
			x.Unknown = append(x.Unknown, RawExtension{magic, append([]byte(nil), data...)})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return x, nil
}

func (x *Extensions) parseCrypto(h *Header, data []byte) error {
	const size = 16
	if h.CryptMethod != CryptLUKS {
		return fmt.Errorf("CRYPTO header extension only expected with LUKS encryption method")
	}
	if len(data) != size {
		return fmt.Errorf("CRYPTO header extension size %d, but expected size %d", len(data), size)
	}
	c := &Crypto{binary.BigEndian.Uint64(data), binary.BigEndian.Uint64(data[8:])}
	if cs := uint64(1) << h.ClusterBits; c.Offset%cs != 0 {
		return fmt.Errorf("Encryption header offset '%d' is not a multiple of cluster size '%d'", c.Offset, cs)
	}
	x.Crypto = c
	return nil
}

func (x *Extensions) parseBitmaps(h *Header, data []byte) error {
	if len(data) != 24 {
		return fmt.Errorf("bitmaps_ext: Invalid extension length")
	}
	if h.AutoclearFeatures&AutoclearBitmaps == 0 {
		x.BitmapsStale = true
		return nil
	}
	be := binary.BigEndian
	if be.Uint32(data[4:]) != 0 {
		return fmt.Errorf("bitmaps_ext: Reserved field is not zero")
	}
	m := &Bitmaps{be.Uint32(data), be.Uint64(data[8:]), be.Uint64(data[16:])}
	const maxBitmaps = 65535
	switch {
	case m.NbBitmaps > maxBitmaps:
		return fmt.Errorf("bitmaps_ext: Image has %d bitmaps, exceeding the QEMU supported maximum of %d",
			m.NbBitmaps, maxBitmaps)
	case m.NbBitmaps == 0:
		return fmt.Errorf("found bitmaps extension with zero bitmaps")
	case m.DirectoryOffset&(1<<h.ClusterBits-1) != 0:
		return fmt.Errorf("bitmaps_ext: invalid bitmap directory offset")
	case m.DirectorySize > MaxBitmapDirectory:
		return fmt.Errorf("bitmaps_ext: bitmap directory size (%d) exceeds the maximum supported size (%d)",
			m.DirectorySize, MaxBitmapDirectory)
	}
	x.Bitmaps = m
	return nil
}

func cString(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

func appendExt(b []byte, magic uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	b = append(b, data...)
	return append(b, make([]byte, -len(data)&7)...)
}

func appendUint64s(b []byte, l []uint64) []byte {
	for _, v := range l {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// appendTo serialises in QEMU's order. Images with clusters of up to 4 KiB get no feature name
// table: it would leave no room for a backing file name.
func (x *Extensions) appendTo(b []byte, h *Header) []byte {
	if x.BackingFormat != "" {
		b = appendExt(b, extBackingFormat, []byte(x.BackingFormat))
	}
	if x.DataFile != "" {
		b = appendExt(b, extDataFile, []byte(x.DataFile))
	}
	if c := x.Crypto; c != nil {
		b = appendExt(b, extCrypto, appendUint64s(nil, []uint64{c.Offset, c.Length}))
	}
	if h.Version >= 3 && h.ClusterBits > 12 {
		var t []byte
		for _, f := range features {
			e := make([]byte, featureEntrySize)
			e[0], e[1] = f.kind, f.bit
			copy(e[2:], f.name)
			t = append(t, e...)
		}
		b = appendExt(b, extFeatureTable, t)
	}
	if m := x.Bitmaps; m != nil {
		d := []uint64{uint64(m.NbBitmaps) << 32, m.DirectorySize, m.DirectoryOffset} // 4 bytes are reserved
		b = appendExt(b, extBitmaps, appendUint64s(nil, d))
	}
	if len(x.Marks) > 0 {
		b = appendExt(b, extMarks, appendUint64s(nil, x.Marks))
	}
	for _, u := range x.Unknown {
		b = appendExt(b, u.Magic, u.Data)
	}
	return appendExt(b, extEnd, nil)
}

// feature is an entry of the feature name table.
type feature struct {
	kind, bit uint8 // kind: 0 incompatible, 1 compatible, 2 autoclear
	name      string
}

var features = []feature{
	{0, 0, "dirty bit"},
	{0, 1, "corrupt bit"},
	{0, 2, "external data file"},
	{0, 3, "compression type"},
	{0, 4, "extended L2 entries"},
	{1, 0, "lazy refcounts"},
	{2, 0, "bitmaps"},
	{2, 1, "raw external data"},
}

// featureTable finds the feature name table in the first cluster b. Whatever is wrong with the
// extensions, the names found so far count.
func (h *Header) featureTable(b []byte) []feature {
	var t []feature
	_ = h.each(b, func(magic uint32, data []byte) error {
		if magic != extFeatureTable {
			return nil
		}
		t = t[:0]
		for ; len(data) >= featureEntrySize && data[2] != 0; data = data[featureEntrySize:] {
			t = append(t, feature{data[0], data[1], cString(data[2:featureEntrySize])})
		}
		return nil
	})
	return t
}

// featureNames words the incompatible bits mask by the image's own table; bits that the format
// defines have their names even without one.
func featureNames(table []feature, mask uint64) string {
	var names []string
	take := func(t []feature) {
		for _, f := range t {
			if f.kind == 0 && f.bit < 64 && mask&(1<<f.bit) != 0 {
				names = append(names, f.name)
				mask &^= 1 << f.bit
			}
		}
	}
	take(table)
	take(features)
	if mask != 0 {
		names = append(names, fmt.Sprintf("Unknown incompatible feature: %x", mask))
	}
	return strings.Join(names, ", ")
}
