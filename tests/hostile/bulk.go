package hostile

import (
	"bytes"
	"fmt"
	"math"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
)

// u32 and u64 are a number in place.
func u32(off int64, v uint32) Piece { return Piece{off, be.AppendUint32(nil, v)} }
func u64(off int64, v uint64) Piece { return Piece{off, be.AppendUint64(nil, v)} }

// bulk are damages that make a small image mean a lot: tables that are as long as they may be and
// full of the same, names as long as they may be, disks of any size. Each goes behind the end of
// the file.
func (b *Base) bulk() (out []*Damage) {
	cs := b.cs()
	end := (b.Length + cs - 1) &^ (cs - 1)
	add := func(field, value string, build func() []Piece) {
		counted := func() []Piece { return b.counted(end, build()) }
		out = append(out, &Damage{Field: field, Value: value, Build: counted})
	}
	fill := func(n int64, v uint64) []byte { return bytes.Repeat(be.AppendUint64(nil, v), int(n)) }
	reftable := func(value string, table func() []Piece) {
		add("reftable", "8 MiB "+value, func() []Piece {
			return append([]Piece{u64(48, uint64(end)), u32(56, uint32((8<<20)/cs))}, table()...)
		})
	}
	for _, to := range []string{"refblock", "data", "header"} {
		reftable("that name "+to, func() []Piece { return []Piece{{end, fill(1<<20, uint64(b.place(to)))}} })
	}
	for _, first := range []uint64{0, uint64(b.place("refblock"))} {
		reftable(fmt.Sprintf("that name an empty block, after %#x", first), func() []Piece {
			empty := (end + 8<<20 + cs - 1) &^ (cs - 1)
			t := fill(1<<20, uint64(empty))
			if first != 0 {
				be.PutUint64(t, first)
			}
			return []Piece{{end, t}, u64(empty+cs-8, 0)}
		})
	}
	reftable("of nothing", func() []Piece { return []Piece{u64(end+8<<20-8, 0)} })
	for _, n := range []int64{1 << 12, 1 << 18, 4 << 20} {
		for _, flags := range []uint64{layout.Copied, 0} {
			size := min(n, math.MaxInt64/(cs*cs/8)-1) * (cs * cs / 8) &^ 511
			add("l1", fmt.Sprintf("%d entries that name one table, flags %#x", n, flags), func() []Piece {
				return []Piece{u64(24, uint64(size)), u32(36, uint32(n)), u64(40, uint64(end)),
					{end, fill(n, flags|uint64(b.place("l2")))}}
			})
		}
	}
	data := uint64(b.place("data"))
	packed := b.geometry().CompressedEntry(max(cs, b.place("packed")), 64)
	for _, e := range []uint64{data, data | layout.Copied, packed} {
		add("l2", fmt.Sprintf("full of %#x", e), func() []Piece { return []Piece{{b.place("l2"), fill(cs/8, e)}} })
	}
	for _, bits := range []uint{40, 46, 50, 52, 56, 60, 61, 62} {
		if n := int64(1) << bits / (cs * cs / 8); n >= 1 && n <= 4<<20 {
			add("size", fmt.Sprintf("2^%d and as many tables", bits), func() []Piece {
				return []Piece{u64(24, 1<<bits), u32(36, uint32(n)), u64(40, uint64(end)),
					u64(end, uint64(b.place("l2"))|layout.Copied), u64(end+n*8-8, 0)}
			})
		}
	}
	if b.Snapshots {
		b.bulkSnapshots(end, add)
	}
	if b.Bitmaps {
		b.bulkBitmaps(end, add)
	}
	return out
}

func (b *Base) bulkSnapshots(end int64, add func(field, value string, build func() []Piece)) {
	for _, x := range []struct{ n, id, name int }{
		{65535, 5, 1}, {2000, 5, 6}, {200, 65535, 65535}, {200, 4, 65535}, {1000, 200, 1000},
	} {
		add("snapshots", fmt.Sprintf("%d with IDs of %d and names of %d bytes", x.n, x.id, x.name), func() []Piece {
			var t []byte
			for i := range x.n {
				t = be.AppendUint64(t, uint64(b.place("s0.l1")))
				t = be.AppendUint32(t, 1)
				t = be.AppendUint16(be.AppendUint16(t, uint16(x.id)), uint16(x.name))
				t = append(t, make([]byte, 24)...)
				id := fmt.Appendf(nil, "%d", i+1)
				id = id[:min(len(id), x.id)]
				t = append(append(t, id...), bytes.Repeat([]byte{1}, x.id-len(id)+x.name)...)
				t = append(t, make([]byte, -len(t)&7)...)
			}
			return []Piece{u32(60, uint32(x.n)), u64(64, uint64(end)), {end, t}}
		})
	}
}

func (b *Base) bulkBitmaps(end int64, add func(field, value string, build func() []Piece)) {
	i := slices.IndexFunc(b.Fields, func(f Field) bool { return f.Name == "ext[0x23852875].nb_bitmaps" })
	ext := b.Fields[i].Off
	for _, x := range []struct {
		n, name        int
		entries, flags uint32
	}{
		{60000, 6, 1, bitmapAuto}, {60000, 6, 1, bitmapInUse}, {600, 6, 1 << 20, bitmapAuto},
		{600, 6, 1 << 20, bitmapInUse}, {8, 6, math.MaxUint32, 0}, {1000, 1023, 1, bitmapAuto},
	} {
		what := fmt.Sprintf("%d with names of %d bytes and %d entries, flags %d", x.n, x.name, x.entries, x.flags)
		add("bitmaps", what, func() []Piece {
			var t []byte
			for i := range x.n {
				t = be.AppendUint64(t, uint64(b.place("b0.table")))
				t = be.AppendUint32(be.AppendUint32(t, x.entries), x.flags)
				t = be.AppendUint16(append(t, 1, 16), uint16(x.name))
				t = append(be.AppendUint32(t, 0), bytes.Repeat([]byte{'x'}, x.name-6)...)
				t = fmt.Appendf(t, "%06d", i)
				t = append(t, make([]byte, -len(t)&7)...)
			}
			e := be.AppendUint64(be.AppendUint32(nil, uint32(x.n)), 0)[:8]
			e = be.AppendUint64(be.AppendUint64(e, uint64(len(t))), uint64(end))
			return []Piece{{ext, e}, {end, t}}
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
