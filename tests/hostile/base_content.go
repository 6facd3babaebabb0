package hostile

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"

	"qblockd/blockdev/format/qcow2/layout"
)

// guest makes the L2 tables and what they name. The first table has an entry of each kind.
func (b *Base) guest(l1, l1n int64) {
	per := int64(1) << b.geometry().L2Bits()
	clusters := (b.Size + b.cs() - 1) >> b.ClusterBits
	l2 := b.alloc("l2", 1)
	b.put64(l1, uint64(l2)|layout.Copied)
	b.field("l1[0]", l1, 8, Pointer)
	entry := func(table, i int64, name string, c Class, v uint64) {
		at := b.slot(table, i)
		b.put64(at, v)
		if name != "" {
			b.field("l2."+name, at, 8, c)
		}
		if !b.Extended {
			return
		}
		switch {
		case c == Packed:
		case v&layout.OffsetMask != 0:
			b.put64(at+8, layout.AllAlloc)
		}
		if name != "" {
			b.field("bits."+name, at+8, 8, Bits)
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
	switch {
	case b.Extended:
		b.subclusters(l2, entry)
	case b.Version >= 3:
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
			if be.Uint64(b.get(b.slot(l2, i), 8)) == 0 {
				b.put64(b.slot(l2, i), uint64(b.alloc("", 1))|layout.Copied)
			}
		}
	}
}

// slot is where entry i of an L2 table is.
func (b *Base) slot(table, i int64) int64 { return table + i<<b.geometry().EntryBits() }

// subclusters makes entries that have some of theirs, zeroes with a place and without, and places
// without anything.
func (b *Base) subclusters(l2 int64, entry func(table, i int64, name string, c Class, v uint64)) {
	for _, x := range []struct {
		i    int64
		name string
		bits uint64
		host bool
	}{
		{4, "zero", layout.AllZero, false}, {5, "kept", layout.AllZero, true}, {7, "placed", 0, true},
		{8, "mixed", 0x0f0f00ff | 0xf0f0ff00<<layout.Subclusters, true}, {9, "zeroes", 0xff00ff << layout.Subclusters, false},
		{11, "some", 0xf, true},
	} {
		v := uint64(0)
		if x.host {
			off := b.alloc(x.name, 1)
			b.data(off, byte(0x70+x.i))
			v = uint64(off) | layout.Copied
		}
		entry(l2, x.i, x.name, Pointer, v)
		b.put64(b.slot(l2, x.i)+8, x.bits)
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

// deflated is p compressed as well as that goes.
func deflated(p []byte) []byte {
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, flate.BestCompression)
	if err == nil {
		_, err = w.Write(p)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		panic(err)
	}
	return out.Bytes()
}

// pack compresses a cluster. A zstd frame of one byte over and over needs no library.
func (b *Base) pack(plain []byte) []byte {
	if !b.Zstd {
		return deflated(plain)
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
		at := b.slot(0, 13)
		shared := be.Uint64(b.get(l2+at, 8)) & layout.OffsetMask
		b.put64(sl2+at, shared)
		b.put64(l2+at, shared)
		if b.Extended {
			b.put64(sl2+8, layout.AllAlloc)
			b.put64(sl2+at+8, layout.AllAlloc)
		}
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
		b.field(name+"l2.shared", sl2+at, 8, Pointer)
		b.fields(name, table+int64(len(entries)), snapshotFields)
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
	b.field("l2.shared", l2+b.slot(0, 13), 8, Pointer)
	b.put(table, entries)
	return table
}

var snapshotFields = []Field{
	{"l1_table_offset", 0, 8, Pointer, 0}, {"l1_size", 8, 4, Count, 0}, {"id_str_size", 12, 2, Count, 0},
	{"name_size", 14, 2, Count, 0}, {"date_sec", 16, 4, Dull, 0}, {"vm_clock_nsec", 24, 8, Dull, 0},
	{"vm_state_size", 32, 4, Count, 0}, {"extra_data_size", 36, 4, Count, 0}, {"extra.vm_state_size", 40, 8, Count, 0},
	{"extra.disk_size", 48, 8, Count, 0}, {"id_str", 64, 1, Dull, 0}, {"name", 65, 2, Dull, 0},
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
		b.fields(fmt.Sprintf("b%d.", i), at+int64(i*len(dir)/3), []Field{
			{"bitmap_table_offset", 0, 8, Pointer, 0}, {"bitmap_table_size", 8, 4, Count, 0}, {"flags", 12, 4, Bits, 0},
			{"type", 16, 1, Count, 0}, {"granularity_bits", 17, 1, Count, 0}, {"name_size", 18, 2, Count, 0},
			{"extra_data_size", 20, 4, Count, 0}, {"name", 24, 2, Dull, 0}})
	}
	return &layout.Bitmaps{NbBitmaps: 3, DirectorySize: uint64(len(dir)), DirectoryOffset: uint64(at)}
}
