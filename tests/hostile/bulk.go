package hostile

import (
	"bytes"
	"fmt"
	"math"

	"qblockd/blockdev/format/qcow2/layout"
)

// bulk are damages that make a small image mean a lot: tables that are as long as they may be and
// full of the same, names as long as they may be, disks of any size. Each goes behind the end of
// the file.
func (b *Base) bulk() []*Damage {
	cs := b.cs()
	end := (b.Length + cs - 1) &^ (cs - 1)
	var out []*Damage
	add := func(field, value string, build func() []Piece) {
		out = append(out, &Damage{Field: field, Value: value, Build: func() []Piece { return b.counted(end, build()) }})
	}
	header := func(off int64, v uint32) Piece { return Piece{off, be.AppendUint32(nil, v)} }
	pointer := func(off int64, v uint64) Piece { return Piece{off, be.AppendUint64(nil, v)} }
	fill := func(n int, v uint64) []byte { return bytes.Repeat(be.AppendUint64(nil, v), n) }

	for _, to := range []string{"refblock", "data", "header"} {
		add("reftable", "8 MiB that name "+to, func() []Piece {
			return []Piece{pointer(48, uint64(end)), header(56, uint32((8<<20)/cs)), {end, fill(1<<20, uint64(b.place(to)))}}
		})
	}
	for _, first := range []uint64{0, uint64(b.place("refblock"))} {
		add("reftable", fmt.Sprintf("8 MiB that name an empty block, after %#x", first), func() []Piece {
			empty := (end + 8<<20 + cs - 1) &^ (cs - 1)
			t := fill(1<<20, uint64(empty))
			if first != 0 {
				be.PutUint64(t, first)
			}
			return []Piece{pointer(48, uint64(end)), header(56, uint32((8<<20)/cs)), {end, t}, {empty + cs - 8, make([]byte, 8)}}
		})
	}
	add("reftable", "8 MiB of nothing", func() []Piece {
		return []Piece{pointer(48, uint64(end)), header(56, uint32((8<<20)/cs)), {end + 8<<20 - 8, make([]byte, 8)}}
	})
	for _, n := range []int64{1 << 12, 1 << 18, 4 << 20} {
		for _, flags := range []uint64{layout.Copied, 0} {
			size := min(n, math.MaxInt64/(cs*cs/8)-1) * (cs * cs / 8) &^ 511
			add("l1", fmt.Sprintf("%d entries that name one table, flags %#x", n, flags), func() []Piece {
				return []Piece{pointer(24, uint64(size)), header(36, uint32(n)), pointer(40, uint64(end)), {end, fill(int(n), flags|uint64(b.place("l2")))}}
			})
		}
	}
	for _, e := range []uint64{uint64(b.place("data")), uint64(b.place("data")) | layout.Copied, b.geometry().CompressedEntry(max(cs, b.place("packed")), 64)} {
		add("l2", fmt.Sprintf("full of %#x", e), func() []Piece { return []Piece{{b.place("l2"), fill(int(cs/8), e)}} })
	}
	for _, bits := range []uint{40, 46, 50, 52, 56, 60, 61, 62} {
		n := int64(1) << bits / (cs * cs / 8)
		if n < 1 || n > 4<<20 {
			continue
		}
		add("size", fmt.Sprintf("2^%d and as many tables", bits), func() []Piece {
			return []Piece{pointer(24, 1<<bits), header(36, uint32(n)), pointer(40, uint64(end)), {end, be.AppendUint64(nil, uint64(b.place("l2"))|layout.Copied)},
				{end + n*8 - 8, make([]byte, 8)}}
		})
	}
	if b.Snapshots {
		b.bulkSnapshots(end, add, header, pointer)
	}
	if b.Bitmaps {
		b.bulkBitmaps(end, add)
	}
	return out
}

func (b *Base) bulkSnapshots(end int64, add func(string, string, func() []Piece), header func(int64, uint32) Piece, pointer func(int64, uint64) Piece) {
	table := func(n, idLen, nameLen int, l1 int64) []byte {
		var t []byte
		for i := range n {
			t = be.AppendUint64(t, uint64(l1))
			t = be.AppendUint32(t, 1)
			t = be.AppendUint16(be.AppendUint16(t, uint16(idLen)), uint16(nameLen))
			t = append(t, make([]byte, 20)...)
			t = be.AppendUint32(t, 0)
			id := fmt.Appendf(nil, "%d", i+1)
			t = append(t, id[:min(len(id), idLen)]...)
			t = append(t, bytes.Repeat([]byte{1}, idLen-min(len(id), idLen)+nameLen)...)
			t = append(t, make([]byte, -len(t)&7)...)
		}
		return t
	}
	for _, x := range []struct{ n, idLen, nameLen int }{{65535, 5, 1}, {2000, 5, 6}, {200, 65535, 65535}, {200, 4, 65535}, {1000, 200, 1000}} {
		add("snapshots", fmt.Sprintf("%d with IDs of %d and names of %d bytes", x.n, x.idLen, x.nameLen), func() []Piece {
			return []Piece{header(60, uint32(x.n)), pointer(64, uint64(end)), {end, table(x.n, x.idLen, x.nameLen, b.place("s0.l1"))}}
		})
	}
}

func (b *Base) bulkBitmaps(end int64, add func(string, string, func() []Piece)) {
	ext := int64(0)
	for _, f := range b.Fields {
		if f.Name == "ext[0x23852875].nb_bitmaps" {
			ext = f.Off
		}
	}
	for _, x := range []struct {
		n, nameLen int
		entries    uint32
		flags      uint32
	}{{60000, 6, 1, bitmapAuto}, {60000, 6, 1, bitmapInUse}, {600, 6, 1 << 20, bitmapAuto}, {600, 6, 1 << 20, bitmapInUse}, {8, 6, math.MaxUint32, 0}, {1000, 1023, 1, bitmapAuto}} {
		add("bitmaps", fmt.Sprintf("%d with names of %d bytes and %d entries, flags %d", x.n, x.nameLen, x.entries, x.flags), func() []Piece {
			var t []byte
			for i := range x.n {
				t = be.AppendUint64(t, uint64(b.place("b0.table")))
				t = be.AppendUint32(be.AppendUint32(t, x.entries), x.flags)
				t = be.AppendUint16(append(t, 1, 16), uint16(x.nameLen))
				t = be.AppendUint32(t, 0)
				t = append(t, bytes.Repeat([]byte{'x'}, x.nameLen-6)...)
				t = fmt.Appendf(t, "%06d", i)
				t = append(t, make([]byte, -len(t)&7)...)
			}
			e := be.AppendUint32(nil, uint32(x.n))
			e = be.AppendUint64(append(e, 0, 0, 0, 0), uint64(len(t)))
			return []Piece{{ext, be.AppendUint64(e, uint64(end))}, {end, t}}
		})
	}
}

// counted adds the refcounts of what pieces put behind end, where the first refcount block has
// them.
func (b *Base) counted(end int64, pieces []Piece) []Piece {
	last := end
	for _, p := range pieces {
		last = max(last, p.Off+int64(len(p.B)))
	}
	g := b.geometry()
	block := b.get(b.place("refblock"), int(b.cs()))
	for c := end >> b.ClusterBits; c<<b.ClusterBits < last && c < 1<<g.RefblockBits(); c++ {
		g.SetRefcount(block, c, 1)
	}
	return append(pieces, Piece{b.place("refblock"), block})
}
