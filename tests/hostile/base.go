package hostile

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
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
	{Name: "dirty-512", Version: 3, ClusterBits: 9, Order: 4, Size: 64 << 10, Lazy: true, Dirty: true, Snapshots: true, Bitmaps: true},
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
	return layout.Geometry{ClusterBits: b.ClusterBits, RefcountOrder: b.Order}
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
	h := &layout.Header{Version: s.Version, ClusterBits: uint32(s.ClusterBits), Size: uint64(s.Size), L1Size: uint32(l1n),
		L1TableOffset: uint64(l1), RefcountTableOffset: uint64(reft), RefcountTableClusters: 1, RefcountOrder: uint32(s.Order)}
	x := &layout.Extensions{BackingFormat: s.BackingFormat}
	if s.Snapshots {
		h.NbSnapshots = 2
		h.SnapshotsOffset = uint64(b.snapshots(l1, l1n))
	}
	if s.Bitmaps {
		h.AutoclearFeatures |= layout.AutoclearBitmaps
		x.Bitmaps = b.bitmaps()
	}
	flags := []struct {
		on   bool
		bits *uint64
		bit  uint64
	}{
		{s.Lazy, &h.CompatibleFeatures, layout.CompatLazyRefcounts}, {s.Dirty, &h.IncompatibleFeatures, layout.IncompatDirty},
		{s.Corrupt, &h.IncompatibleFeatures, layout.IncompatCorrupt}, {s.Zstd, &h.IncompatibleFeatures, layout.IncompatCompression},
		{s.Extras, &h.AutoclearFeatures, 1 << 40}, {s.Extras, &h.CompatibleFeatures, 1 << 41},
	}
	for _, f := range flags {
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

// guest makes the L2 tables and what they name. The first table has an entry of each kind.
func (b *Base) guest(l1, l1n int64) {
	per := int64(1) << (b.ClusterBits - 3)
	clusters := (b.Size + b.cs() - 1) >> b.ClusterBits
	l2 := b.alloc("l2", 1)
	b.put64(l1, uint64(l2)|layout.Copied)
	b.field("l1[0]", l1, 8, Pointer)
	entry := func(table, i int64, name string, c Class, v uint64) {
		b.put64(table+i*8, v)
		if name != "" {
			b.field("l2."+name, table+i*8, 8, c)
		}
	}
	for _, d := range []struct {
		i    int64
		name string
	}{{0, "data"}, {1, ""}, {10, "data2"}, {13, ""}} {
		off := b.alloc(d.name, 1)
		b.data(off, byte(17*d.i+1))
		entry(l2, d.i, d.name, Pointer, uint64(off)|layout.Copied)
	}
	b.compressed(l2, entry)
	if b.Version >= 3 {
		entry(l2, 4, "zero", Pointer, layout.ZeroFlag)
		off := b.alloc("kept", 1)
		b.data(off, 0x77)
		entry(l2, 5, "kept", Pointer, uint64(off)|layout.Copied|layout.ZeroFlag)
	}
	entry(l2, 6, "hole", Pointer, 0)
	if l1n > 1 {
		second := b.alloc("second", 1)
		b.put64(l1+8, uint64(second)|layout.Copied)
		b.field("l1[1]", l1+8, 8, Pointer)
		off := b.alloc("", 1)
		b.data(off, 0x31)
		entry(second, 0, "second", Pointer, uint64(off)|layout.Copied)
	}
	if l1n > 2 {
		b.field("l1[2]", l1+16, 8, Pointer)
	}
	if b.Prealloc {
		for i := range min(per, clusters) {
			if be.Uint64(b.get(l2+i*8, 8)) == 0 {
				b.put64(l2+i*8, uint64(b.alloc("", 1))|layout.Copied)
			}
		}
	}
}

// compressed makes two compressed clusters that lie in one.
func (b *Base) compressed(l2 int64, entry func(table, i int64, name string, c Class, v uint64)) {
	plain := make([]byte, b.cs())
	for i := range plain {
		plain[i] = 0xc0 + byte(i>>12)
	}
	packed := b.pack(plain)
	host := b.alloc("packed", 1)
	at := host
	for i := int64(2); i < 4; i++ {
		if at+int64(len(packed)) > host+b.cs() || i == 3 && b.Order == 0 {
			break // no room, or a refcount of two does not fit
		}
		if i == 3 {
			b.ref(host)
		}
		b.put(at, packed)
		entry(l2, i, fmt.Sprintf("packed[%d]", i-2), Packed, b.geometry().CompressedEntry(at, int64(len(packed))))
		b.field(fmt.Sprintf("stream[%d]", i-2), at, len(packed), Stream)
		at += int64(len(packed))
	}
}

// pack compresses a cluster. A zstd frame of one byte over and over needs no library.
func (b *Base) pack(plain []byte) []byte {
	if !b.Zstd {
		var out bytes.Buffer
		w, err := flate.NewWriter(&out, flate.BestCompression)
		if err != nil {
			panic(err)
		}
		if _, err := w.Write(plain); err != nil {
			panic(err)
		}
		if err := w.Close(); err != nil {
			panic(err)
		}
		return out.Bytes()
	}
	le := binary.LittleEndian
	f := le.AppendUint32(nil, 0xfd2fb528)
	f = append(f, 0xa0) // one segment, its size in four bytes
	f = le.AppendUint32(f, uint32(len(plain)))
	for n := len(plain); n > 0; {
		part := min(n, 128<<10)
		n -= part
		block := uint32(part)<<3 | 1<<1 // run length
		if n == 0 {
			block |= 1
		}
		f = append(f, byte(block), byte(block>>8), byte(block>>16), 0xc5)
	}
	return f
}

// snapshots makes two internal snapshots: one with tables of its own and data that changed since,
// one that shares the second L2 table with the disk where there is one. Returns where their table
// is.
func (b *Base) snapshots(l1, l1n int64) int64 {
	l2 := int64(be.Uint64(b.get(l1, 8)) & layout.OffsetMask)
	table := b.alloc("snapshots", 1)
	var entries []byte
	for i := range 2 {
		sl1 := b.alloc(fmt.Sprintf("s%d.l1", i), b.geometry().Clusters(l1n*8))
		sl2 := b.alloc(fmt.Sprintf("s%d.l2", i), 1)
		b.put64(sl1, uint64(sl2)|layout.Copied)
		// The disk's clusters 0 and 1 are younger than the snapshot; 13 is shared.
		old := b.alloc(fmt.Sprintf("s%d.data", i), 1)
		b.data(old, 0xe0+byte(i))
		b.put64(sl2, uint64(old)|layout.Copied)
		shared := be.Uint64(b.get(l2+13*8, 8)) & layout.OffsetMask
		b.put64(sl2+13*8, shared)
		b.put64(l2+13*8, shared)
		b.ref(int64(shared))
		if i == 1 && l1n > 1 {
			second := be.Uint64(b.get(l1+8, 8)) & layout.OffsetMask
			b.put64(sl1+8, second)
			b.put64(l1+8, second)
			b.ref(int64(second))
			d := be.Uint64(b.get(int64(second), 8)) & layout.OffsetMask
			b.put64(int64(second), d)
			b.ref(int64(d))
		}
		name := fmt.Sprintf("s%d.", i)
		b.field(name+"l1[0]", sl1, 8, Pointer)
		b.field(name+"l2.data", sl2, 8, Pointer)
		b.field(name+"l2.shared", sl2+13*8, 8, Pointer)
		b.snapshotFields(name, table+int64(len(entries)))
		entries = be.AppendUint64(entries, uint64(sl1))
		entries = be.AppendUint32(entries, uint32(l1n))
		entries = append(entries, 0, 1, 0, 5)              // lengths of ID and name
		entries = be.AppendUint64(entries, 1700000000<<32) // date
		entries = append(entries, make([]byte, 12)...)     // clock and state of the machine
		entries = be.AppendUint32(entries, 24)             // bytes that follow before the ID
		entries = be.AppendUint64(entries, 0)              // state of the machine
		entries = be.AppendUint64(entries, uint64(b.Size)) // disk
		entries = be.AppendUint64(entries, ^uint64(0))     // instruction count
		entries = append(entries, fmt.Sprintf("%dsnap%d", i+1, i)...)
		entries = append(entries, make([]byte, -len(entries)&7)...)
	}
	b.field("l2.shared", l2+13*8, 8, Pointer)
	b.put(table, entries)
	return table
}

func (b *Base) snapshotFields(name string, at int64) {
	b.field(name+"l1_table_offset", at, 8, Pointer)
	for _, f := range []struct {
		name       string
		off, width int
		class      Class
	}{{"l1_size", 8, 4, Count}, {"id_str_size", 12, 2, Count}, {"name_size", 14, 2, Count}, {"date_sec", 16, 4, Dull}, {"vm_clock_nsec", 24, 8, Dull},
		{"vm_state_size", 32, 4, Count}, {"extra_data_size", 36, 4, Count}, {"extra.vm_state_size", 40, 8, Count}, {"extra.disk_size", 48, 8, Count},
		{"id_str", 64, 1, Dull}, {"name", 65, 2, Dull}} {
		b.field(name+f.name, at+int64(f.off), f.width, f.class)
	}
}

// Flags of bitmaps, and the fixed part of an entry of their directory and of one of the snapshot
// table.
const (
	bitmapInUse, bitmapAuto = 1, 2

	bitmapHeader, snapshotHeader = 24, 40
)

// bitmaps makes three: one that records, one in use, one that is dirty all over without data of its
// own.
func (b *Base) bitmaps() *layout.Bitmaps {
	gran := int64(max(9, min(16, int(b.ClusterBits))))
	n := b.geometry().Clusters((b.Size>>gran + 8) / 8)
	var dir []byte
	for i, flags := range []uint32{bitmapAuto, bitmapInUse, 0} {
		name := fmt.Sprintf("b%d", i)
		table := b.alloc(name+".table", b.geometry().Clusters(n*8))
		if i < 2 {
			data := b.alloc(name+".data", 1)
			b.put(data, []byte{0x35, 0, 0x80})
			b.put64(table, uint64(data))
		} else {
			b.put64(table, 1)
		}
		b.field(name+".table[0]", table, 8, Pointer)
		dir = be.AppendUint64(dir, uint64(table))
		dir = be.AppendUint32(dir, uint32(n))
		dir = be.AppendUint32(dir, flags)
		dir = append(dir, 1, byte(gran), 0, byte(len(name)), 0, 0, 0, 0)
		dir = append(append(dir, name...), make([]byte, -len(name)&7)...)
	}
	at := b.alloc("bitmaps", b.geometry().Clusters(int64(len(dir))))
	b.put(at, dir)
	for i := range 3 {
		name, e := fmt.Sprintf("b%d.", i), at+int64(i*len(dir)/3)
		b.field(name+"bitmap_table_offset", e, 8, Pointer)
		b.field(name+"bitmap_table_size", e+8, 4, Count)
		b.field(name+"flags", e+12, 4, Bits)
		for j, f := range []string{"type", "granularity_bits"} {
			b.field(name+f, e+16+int64(j), 1, Count)
		}
		b.field(name+"name_size", e+18, 2, Count)
		b.field(name+"extra_data_size", e+20, 4, Count)
		b.field(name+"name", e+24, 2, Dull)
	}
	return &layout.Bitmaps{NbBitmaps: 3, DirectorySize: uint64(len(dir)), DirectoryOffset: uint64(at)}
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
	b.field("reftable[0]", reft, 8, Pointer)
	b.field("reftable[1]", reft+8, 8, Pointer)
	b.field("reftable[2]", reft+16, 8, Pointer)
	b.field("reftable[7]", reft+56, 8, Pointer)
	for _, p := range append(slices.Clone(b.Places), Place{"after", b.next << b.ClusterBits, b.cs()}) {
		c := p.Off >> b.ClusterBits
		if c/per < int64(len(blocks)) {
			b.Fields = append(b.Fields, Field{Name: "refcount." + p.Name, Off: blocks[c/per], Class: Refcount, Index: c % per})
		}
	}
}

// header lists the fields of the header and its extensions, which enc is.
func (b *Base) header(enc []byte, h *layout.Header) {
	fields := []Field{
		{"magic", 0, 4, Dull, 0}, {"version", 4, 4, Count, 0}, {"backing_file_offset", 8, 8, Pointer, 0}, {"backing_file_size", 16, 4, Count, 0},
		{"cluster_bits", 20, 4, Count, 0}, {"size", 24, 8, Count, 0}, {"crypt_method", 32, 4, Count, 0}, {"l1_size", 36, 4, Count, 0},
		{"l1_table_offset", 40, 8, Pointer, 0}, {"refcount_table_offset", 48, 8, Pointer, 0}, {"refcount_table_clusters", 56, 4, Count, 0},
		{"nb_snapshots", 60, 4, Count, 0}, {"snapshots_offset", 64, 8, Pointer, 0},
	}
	if b.Version >= 3 {
		fields = append(fields, Field{"incompatible_features", 72, 8, Bits, 0}, Field{"compatible_features", 80, 8, Bits, 0},
			Field{"autoclear_features", 88, 8, Bits, 0}, Field{"refcount_order", 96, 4, Count, 0}, Field{"header_length", 100, 4, Count, 0},
			Field{"compression_type", 104, 1, Count, 0}, Field{"reserved", 105, 7, Bits, 0})
	}
	for off := int64(h.HeaderLength); off+8 <= int64(len(enc)); {
		magic, n := be.Uint32(enc[off:]), int64(be.Uint32(enc[off+4:]))
		name := fmt.Sprintf("ext[%#x].", magic)
		fields = append(fields, Field{name + "type", off, 4, Count, 0}, Field{name + "length", off + 4, 4, Count, 0})
		if magic == 0 {
			break
		}
		switch magic {
		case 0x23852875:
			fields = append(fields, Field{name + "nb_bitmaps", off + 8, 4, Count, 0}, Field{name + "reserved", off + 12, 4, Count, 0},
				Field{name + "bitmap_directory_size", off + 16, 8, Count, 0}, Field{name + "bitmap_directory_offset", off + 24, 8, Pointer, 0})
		case 0xe2792aca:
			fields = append(fields, Field{"backing_format", off + 8, int(n), Format, 0})
		}
		off += 8 + (n+7)&^7
	}
	if b.Backing != "" {
		fields = append(fields, Field{"backing_name", int64(h.BackingFileOffset), len(b.Backing), Name, 0})
	}
	b.Fields = append(fields, b.Fields...)
}

// finish makes runs of the pages and chooses what to read.
func (b *Base) finish() {
	var at []int64
	for off := range b.pages {
		at = append(at, off)
	}
	slices.Sort(at)
	for _, off := range at {
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
	perTable := b.cs() << (b.ClusterBits - 3)
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
