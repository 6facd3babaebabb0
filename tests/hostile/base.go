package hostile

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
)

var be = binary.BigEndian

// Spec is what a base image is like.
type Spec struct {
	Name        string
	Version     uint32
	ClusterBits uint
	Order       uint  // log2 of the refcount width
	Size        int64 // bytes of the disk
	Snapshots   bool
	Bitmaps     bool
	Zstd        bool
	Lazy        bool
	Dirty       bool
	Corrupt     bool
	Extras      bool  // extensions, fields and autoclear bits that nobody knows
	Prealloc    bool  // every cluster has a place
	Extended    bool  // L2 entries have bitmaps of subclusters
	Tail        int64 // bytes that the file lacks at its end

	Backing, BackingFormat string

	// Every tells that all damage is done to it; to the others what their kind is about, and a
	// share of the rest.
	Every bool
}

// Specs are the base images. Their names are part of how a case is told.
var Specs = []Spec{
	{Name: "v3-64k", Version: 3, ClusterBits: 16, Order: 4, Size: 513 << 20, Snapshots: true, Bitmaps: true, Every: true},
	{Name: "v3-4k", Version: 3, ClusterBits: 12, Order: 4, Size: 2<<20 + 40960, Snapshots: true, Bitmaps: true, Every: true},
	{Name: "v3-512", Version: 3, ClusterBits: 9, Order: 4, Size: 96 << 10, Snapshots: true, Bitmaps: true, Every: true},
	{Name: "v3-2m", Version: 3, ClusterBits: 21, Order: 4, Size: 64 << 20, Snapshots: true, Bitmaps: true, Every: true},
	{Name: "v2-64k", Version: 2, ClusterBits: 16, Order: 4, Size: 2 << 20, Snapshots: true},
	{Name: "v2-512", Version: 2, ClusterBits: 9, Order: 4, Size: 66560, Snapshots: true},
	{Name: "width-1", Version: 3, ClusterBits: 12, Order: 0, Size: 3 << 20, Bitmaps: true},
	{Name: "width-2", Version: 3, ClusterBits: 9, Order: 1, Size: 64 << 10, Snapshots: true},
	{Name: "width-4", Version: 3, ClusterBits: 12, Order: 2, Size: 2 << 20, Snapshots: true},
	{Name: "width-8", Version: 3, ClusterBits: 16, Order: 3, Size: 2 << 20, Snapshots: true},
	{Name: "width-32", Version: 3, ClusterBits: 12, Order: 5, Size: 2 << 20, Snapshots: true},
	{Name: "width-64", Version: 3, ClusterBits: 9, Order: 6, Size: 64 << 10, Snapshots: true, Bitmaps: true},
	{Name: "width-1-2m", Version: 3, ClusterBits: 21, Order: 0, Size: 1 << 30},
	{Name: "lazy", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Lazy: true, Bitmaps: true},
	{Name: "dirty", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Lazy: true, Dirty: true, Snapshots: true},
	{Name: "dirty-512", Version: 3, ClusterBits: 9, Order: 4, Size: 64 << 10, Lazy: true, Dirty: true,
		Snapshots: true, Bitmaps: true},
	{Name: "over-raw", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Backing: "back.raw", BackingFormat: "raw", Snapshots: true},
	{Name: "over-guessed", Version: 3, ClusterBits: 12, Order: 4, Size: 2 << 20, Backing: "back.raw"},
	{Name: "over-qcow2", Version: 3, ClusterBits: 12, Order: 4, Size: 2 << 20, Backing: "back.qcow2", BackingFormat: "qcow2", Bitmaps: true},
	{Name: "over-any", Version: 2, ClusterBits: 16, Order: 4, Size: 2 << 20, Backing: "back.qcow2"},
	{Name: "zstd", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Zstd: true, Snapshots: true},
	{Name: "zstd-512", Version: 3, ClusterBits: 9, Order: 4, Size: 64 << 10, Zstd: true},
	{Name: "corrupt", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Corrupt: true, Snapshots: true},
	{Name: "tail", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Tail: 60000, Snapshots: true, Bitmaps: true},
	{Name: "full", Version: 3, ClusterBits: 12, Order: 4, Size: 128 << 10, Prealloc: true},
	{Name: "extras", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Extras: true, Bitmaps: true},
	{Name: "empty", Version: 3, ClusterBits: 16, Order: 4, Size: 0},
	{Name: "subs", Version: 3, ClusterBits: 16, Order: 4, Size: 257 << 20, Extended: true,
		Snapshots: true, Bitmaps: true, Every: true},
	{Name: "subs-16k", Version: 3, ClusterBits: 14, Order: 4, Size: 2 << 20, Extended: true, Snapshots: true,
		Backing: "back.raw", BackingFormat: "raw"},
	{Name: "subs-2m", Version: 3, ClusterBits: 21, Order: 3, Size: 64 << 20, Extended: true, Zstd: true},
	{Name: "subs-dirty", Version: 3, ClusterBits: 16, Order: 4, Size: 2 << 20, Extended: true, Lazy: true, Dirty: true,
		Snapshots: true, Bitmaps: true},
}

// Place is a structure of a base image.
type Place struct {
	Name   string
	Off, N int64 // bytes
}

// Class is what a field means, and so which values are interesting.
type Class int

const (
	Pointer  Class = iota // a place in the file, with flags in the bits that an aligned offset leaves
	Count                 // a number or length
	Dull                  // something that hardly matters
	Bits                  // flags
	Refcount              // one refcount; Field.Index of the block at Field.Off
	Packed                // an L2 entry of compressed data
	Stream                // compressed data
	Name                  // backing file name
	Format                // backing format
)

// Field is something in an image that can be damaged.
type Field struct {
	Name  string
	Off   int64
	Width int // bytes
	Class Class
	Index int64 // Refcount: entry
}

// Base is an image as damage finds it.
type Base struct {
	Spec
	Places []Place
	Fields []Field
	Length int64   // of the file
	Runs   []Piece // its content; zeroes between them
	// Probes are the parts of the disk that are read and compared.
	Probes []Piece

	pages map[int64][]byte
	refs  map[int64]uint64
	next  int64 // first cluster not in use
}

// Piece is bytes at an offset. For probes only the length of B counts.
type Piece struct {
	Off int64
	B   []byte
}

const pageSize = 4096

func (b *Base) cs() int64 { return 1 << b.ClusterBits }

func (b *Base) geometry() layout.Geometry {
	return layout.Geometry{ClusterBits: b.ClusterBits, RefcountOrder: b.Order, Extended: b.Extended}
}

// put writes to the image.
func (b *Base) put(off int64, p []byte) {
	for len(p) > 0 {
		at := off &^ (pageSize - 1)
		page := b.pages[at]
		if page == nil {
			page = make([]byte, pageSize)
			b.pages[at] = page
		}
		n := copy(page[off-at:], p)
		p, off = p[n:], off+int64(n)
	}
}

// get reads from the image.
func (b *Base) get(off int64, n int) []byte {
	out := make([]byte, n)
	for i := 0; i < n; {
		at := (off + int64(i)) &^ (pageSize - 1)
		from := off + int64(i) - at
		if page := b.pages[at]; page != nil {
			copy(out[i:], page[from:])
		}
		i += int(pageSize - from)
	}
	return out
}

func (b *Base) put64(off int64, v uint64) { b.put(off, be.AppendUint64(nil, v)) }

// alloc takes n clusters for a structure.
func (b *Base) alloc(name string, n int64) int64 {
	off := b.next << b.ClusterBits
	for i := range n {
		b.refs[b.next+i] = 1
	}
	b.next += n
	if name != "" {
		b.Places = append(b.Places, Place{name, off, n << b.ClusterBits})
	}
	return off
}

func (b *Base) ref(off int64) { b.refs[off>>b.ClusterBits]++ }

func (b *Base) field(name string, off int64, width int, c Class) {
	b.Fields = append(b.Fields, Field{Name: name, Off: off, Width: width, Class: c})
}

// fields lists those of the structure at off, with a name before theirs.
func (b *Base) fields(name string, off int64, l []Field) {
	for _, f := range l {
		b.field(name+f.Name, off+f.Off, f.Width, f.Class)
	}
}

// data fills a cluster with something that tells where it belongs.
func (b *Base) data(off int64, seed byte) {
	p := make([]byte, min(b.cs(), 64<<10))
	for i := range p {
		p[i] = seed + byte(i>>9)*3
	}
	b.put(off, p)
	if b.cs() > int64(len(p)) {
		b.put(off+b.cs()-pageSize, p[:pageSize])
	}
}

// NewBase makes the base image of a spec, byte for byte the same each time.
func NewBase(s Spec) *Base {
	b := &Base{Spec: s, pages: map[int64][]byte{}, refs: map[int64]uint64{}}
	b.alloc("header", 1)
	reft := b.alloc("reftable", 1)
	g := b.geometry()
	l1n := max(1, int64(g.L1Entries(uint64(s.Size))))
	l1 := b.alloc("l1", g.Clusters(l1n*8))
	if s.Size > 0 {
		b.guest(l1, l1n)
	}
	h := &layout.Header{Version: s.Version, ClusterBits: uint32(s.ClusterBits), Size: uint64(s.Size),
		L1Size: uint32(l1n), L1TableOffset: uint64(l1), RefcountTableOffset: uint64(reft),
		RefcountTableClusters: 1, RefcountOrder: uint32(s.Order)}
	x := &layout.Extensions{BackingFormat: s.BackingFormat}
	if s.Snapshots {
		h.NbSnapshots = 2
		h.SnapshotsOffset = uint64(b.snapshots(l1, l1n))
	}
	if s.Bitmaps {
		h.AutoclearFeatures |= layout.AutoclearBitmaps
		x.Bitmaps = b.bitmaps()
	}
	for _, f := range []struct {
		on   bool
		bits *uint64
		bit  uint64
	}{
		{s.Lazy, &h.CompatibleFeatures, layout.CompatLazyRefcounts},
		{s.Dirty, &h.IncompatibleFeatures, layout.IncompatDirty},
		{s.Corrupt, &h.IncompatibleFeatures, layout.IncompatCorrupt},
		{s.Zstd, &h.IncompatibleFeatures, layout.IncompatCompression},
		{s.Extended, &h.IncompatibleFeatures, layout.IncompatExtL2},
		{s.Extras, &h.AutoclearFeatures, 1 << 40}, {s.Extras, &h.CompatibleFeatures, 1 << 41},
	} {
		if f.on {
			*f.bits |= f.bit
		}
	}
	if s.Zstd {
		h.CompressionType = layout.CompressionZstd
	}
	if s.Extras {
		h.Unknown = []byte{1, 2, 3, 4, 5, 6, 7, 8}
		x.Unknown = []layout.RawExtension{{Magic: 0x11223344, Data: []byte("something")}}
	}
	b.refcounts(reft)
	enc, err := h.Marshal(x, s.Backing)
	if err != nil {
		panic(fmt.Sprintf("base %s: %v", s.Name, err))
	}
	b.put(0, enc)
	b.header(enc, h)
	b.Length = b.next<<b.ClusterBits - s.Tail
	b.finish()
	return b
}

// refcounts makes the refcount blocks, which count themselves.
func (b *Base) refcounts(reft int64) {
	g := b.geometry()
	per := int64(1) << g.RefblockBits()
	var blocks []int64
	for int64(len(blocks))*per < b.next {
		name := ""
		if len(blocks) == 0 {
			name = "refblock"
		}
		blocks = append(blocks, b.alloc(name, 1))
	}
	for i, off := range blocks {
		p := make([]byte, min(b.cs(), 1<<20))
		for c, n := range b.refs {
			if c/per == int64(i) {
				g.SetRefcount(p, c%per, n)
			}
		}
		b.put(off, p)
		b.put64(reft+int64(i)*8, uint64(off))
	}
	for _, i := range []int64{0, 1, 2, 7} {
		b.field(fmt.Sprintf("reftable[%d]", i), reft+i*8, 8, Pointer)
	}
	for _, p := range append(slices.Clone(b.Places), Place{"after", b.next << b.ClusterBits, b.cs()}) {
		c := p.Off >> b.ClusterBits
		if c/per < int64(len(blocks)) {
			f := Field{Name: "refcount." + p.Name, Off: blocks[c/per], Class: Refcount, Index: c % per}
			b.Fields = append(b.Fields, f)
		}
	}
}

// header lists the fields of the header and its extensions, which enc is.
func (b *Base) header(enc []byte, h *layout.Header) {
	own := b.Fields
	b.Fields = nil
	b.fields("", 0, headerFields)
	if b.Version >= 3 {
		b.fields("", 0, headerFields3)
	}
	for off := int64(h.HeaderLength); off+8 <= int64(len(enc)); {
		magic, n := be.Uint32(enc[off:]), int64(be.Uint32(enc[off+4:]))
		name := fmt.Sprintf("ext[%#x].", magic)
		b.fields(name, off, []Field{{"type", 0, 4, Count, 0}, {"length", 4, 4, Count, 0}})
		if magic == 0 {
			break
		}
		switch magic {
		case 0x23852875:
			b.fields(name, off, []Field{{"nb_bitmaps", 8, 4, Count, 0}, {"reserved", 12, 4, Count, 0},
				{"bitmap_directory_size", 16, 8, Count, 0}, {"bitmap_directory_offset", 24, 8, Pointer, 0}})
		case 0xe2792aca:
			b.field("backing_format", off+8, int(n), Format)
		}
		off += 8 + (n+7)&^7
	}
	if b.Backing != "" {
		b.field("backing_name", int64(h.BackingFileOffset), len(b.Backing), Name)
	}
	b.Fields = append(b.Fields, own...)
}

// headerFields are those of all headers, headerFields3 those that version 3 has besides.
var (
	headerFields = []Field{
		{"magic", 0, 4, Dull, 0}, {"version", 4, 4, Count, 0}, {"backing_file_offset", 8, 8, Pointer, 0},
		{"backing_file_size", 16, 4, Count, 0}, {"cluster_bits", 20, 4, Count, 0}, {"size", 24, 8, Count, 0},
		{"crypt_method", 32, 4, Count, 0}, {"l1_size", 36, 4, Count, 0}, {"l1_table_offset", 40, 8, Pointer, 0},
		{"refcount_table_offset", 48, 8, Pointer, 0}, {"refcount_table_clusters", 56, 4, Count, 0},
		{"nb_snapshots", 60, 4, Count, 0}, {"snapshots_offset", 64, 8, Pointer, 0},
	}
	headerFields3 = []Field{
		{"incompatible_features", 72, 8, Bits, 0}, {"compatible_features", 80, 8, Bits, 0},
		{"autoclear_features", 88, 8, Bits, 0}, {"refcount_order", 96, 4, Count, 0},
		{"header_length", 100, 4, Count, 0}, {"compression_type", 104, 1, Count, 0}, {"reserved", 105, 7, Bits, 0},
	}
)

// finish makes runs of the pages and chooses what to read.
func (b *Base) finish() {
	for _, off := range slices.Sorted(maps.Keys(b.pages)) {
		p := b.pages[off][:min(pageSize, max(0, b.Length-off))]
		if n := len(b.Runs); n > 0 && b.Runs[n-1].Off+int64(len(b.Runs[n-1].B)) == off {
			b.Runs[n-1].B = append(b.Runs[n-1].B, p...)
		} else if len(p) > 0 {
			b.Runs = append(b.Runs, Piece{off, slices.Clone(p)})
		}
	}
	probe := func(off, n int64) {
		if n = min(n, b.Size-off); n > 0 && off >= 0 {
			b.Probes = append(b.Probes, Piece{off, make([]byte, n)})
		}
	}
	perTable := b.cs() << b.geometry().L2Bits()
	switch {
	case b.ClusterBits == 21:
		for c := range int64(16) {
			probe(c<<21, pageSize)
			probe(c<<21+2<<20-pageSize, pageSize)
		}
	case b.Size <= 3<<20:
		for off := int64(0); off < b.Size; off += 64 << 10 {
			probe(off, 64<<10)
		}
	default:
		for c := range int64(16) {
			probe(c<<b.ClusterBits, b.cs())
		}
		probe(perTable, 2*b.cs())
	}
}

// WriteTo writes the image with its damage to a file.
func (b *Base) WriteTo(name string, d ...*Damage) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, r := range b.Runs {
		if _, err := f.WriteAt(r.B, r.Off); err != nil {
			return err
		}
	}
	length := b.Length
	for _, x := range d {
		for _, p := range x.patches() {
			if _, err := f.WriteAt(p.B, p.Off); err != nil {
				return err
			}
			length = max(length, p.Off+int64(len(p.B)))
		}
	}
	for _, x := range d {
		if x.Patches == nil && x.Build == nil {
			length = min(length, x.Length)
		}
	}
	return f.Truncate(length)
}

// WriteEmpty writes the base without anything on its disk.
func (b *Base) WriteEmpty(name string) error {
	l1 := b.place("l1")
	d := &Damage{Patches: []Piece{{l1, make([]byte, 8*(1+b.Size>>29))}}}
	return b.WriteTo(name, d)
}
