package layout

import (
	"bytes"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestRefcounts compares all widths with a dumb array.
func TestRefcounts(t *testing.T) {
	for order := uint(0); order <= 6; order++ {
		g := Geometry{ClusterBits: 9, RefcountOrder: order}
		n := int64(1) << g.RefblockBits()
		if n != 512*8>>order {
			t.Fatalf("order %d: %d entries", order, n)
		}
		want := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 1<<order), big.NewInt(1))
		if new(big.Int).SetUint64(g.RefcountMax()).Cmp(want) != 0 {
			t.Fatalf("order %d: max %d", order, g.RefcountMax())
		}
		b, dumb := make([]byte, 512), make([]uint64, n)
		r := rand.New(rand.NewPCG(uint64(order), 1))
		for range 5000 {
			i := r.Int64N(n)
			v := r.Uint64() & g.RefcountMax()
			g.SetRefcount(b, i, v)
			dumb[i] = v
		}
		for i, v := range dumb {
			if g.Refcount(b, int64(i)) != v {
				t.Fatalf("order %d: entry %d is %d, not %d", order, i, g.Refcount(b, int64(i)), v)
			}
		}
	}
}

// TestBitOrder: entries narrower than a byte start at the least significant bit (qcow2.txt).
func TestBitOrder(t *testing.T) {
	b := make([]byte, 512)
	Geometry{ClusterBits: 9, RefcountOrder: 0}.SetRefcount(b, 1, 1)
	Geometry{ClusterBits: 9, RefcountOrder: 2}.SetRefcount(b, 3, 0xa)
	if b[0] != 2 || b[1] != 0xa0 {
		t.Fatalf("%x", b[:2])
	}
}

func TestCompressedEntries(t *testing.T) {
	for bits := uint(MinClusterBits); bits <= MaxClusterBits; bits++ {
		g := Geometry{ClusterBits: bits, RefcountOrder: 4}
		for _, off := range []int64{512, 513, 1<<20 + 7, g.MaxCompressedOffset() - g.ClusterSize()} {
			for _, n := range []int64{1, 511, 512, g.ClusterSize() - 1} {
				e := g.CompressedEntry(off, n)
				if g.KindOf(e) != CompressedKind {
					t.Fatalf("bits %d: kind %d", bits, g.KindOf(e))
				}
				o, l := g.CompressedRange(e)
				if o != off || l < n || l >= n+512 || (o+l)%512 != 0 {
					t.Fatalf("bits %d: %d+%d came back as %d+%d", bits, off, n, o, l)
				}
			}
		}
	}
}

func TestKinds(t *testing.T) {
	for e, k := range map[uint64]Kind{
		0: Unallocated, Copied: Unallocated, 1: ZeroPlain, 1 | 0x10000: ZeroAlloc, Copied | 0x10000: Normal, 0x10000: Normal,
		Compressed | 1: CompressedKind, Compressed: CompressedKind,
	} {
		if got := (Geometry{ClusterBits: 16}).KindOf(e); got != k {
			t.Errorf("%#x is of kind %d, not %d", e, got, k)
		}
	}
}

func TestL1Entries(t *testing.T) {
	g := Geometry{ClusterBits: 16, RefcountOrder: 4}
	for size, n := range map[uint64]uint64{
		0: 0, 1: 1, 512 << 20: 1, 512<<20 + 1: 2, 1 << 63: 1 << 34, 1<<64 - 1: 1 << 35,
	} {
		if g.L1Entries(size) != n {
			t.Errorf("%d bytes: %d entries, not %d", size, g.L1Entries(size), n)
		}
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	for _, v := range []uint32{2, 3} {
		h := &Header{Version: v, ClusterBits: 16, Size: 1 << 30, L1Size: 2, L1TableOffset: 0x30000,
			RefcountTableOffset: 0x10000, RefcountTableClusters: 1, RefcountOrder: 4}
		x := &Extensions{BackingFormat: "raw", Unknown: []RawExtension{{0x11223344, []byte("abc")}}}
		if v == 3 {
			h.CompatibleFeatures, h.AutoclearFeatures = 1, 1
			h.Unknown = []byte{1, 2, 3, 4, 5, 6, 7, 8}
			x.Bitmaps = &Bitmaps{3, 72, 0x50000}
		}
		b, err := h.Marshal(x, "base.img")
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, make([]byte, 65536)...)
		p, err := Parse(b, true)
		if err != nil {
			t.Fatal(err)
		}
		y, err := p.ParseExtensions(b)
		if err != nil {
			t.Fatal(err)
		}
		name, err := p.BackingName(b)
		if err != nil || name != "base.img" || y.BackingFormat != "raw" || len(y.Unknown) != 1 || string(y.Unknown[0].Data) != "abc" {
			t.Fatalf("%v %q %+v", err, name, y)
		}
		if p.Size != h.Size || p.L1Size != 2 || p.Version != v || !bytes.Equal(p.Unknown, h.Unknown) ||
			p.AutoclearFeatures != h.AutoclearFeatures {
			t.Fatalf("%+v", p)
		}
		if v == 3 && (y.Bitmaps == nil || *y.Bitmaps != *x.Bitmaps) {
			t.Fatalf("%+v", y.Bitmaps)
		}
		again, err := p.Marshal(y, name)
		if err != nil || !bytes.Equal(again, b[:len(again)]) {
			t.Fatalf("written again it differs: %v", err)
		}
	}
}

func TestNoRoom(t *testing.T) {
	h := &Header{Version: 3, ClusterBits: 9, RefcountOrder: 4}
	if _, err := h.Marshal(&Extensions{}, strings.Repeat("x", 500)); err == nil {
		t.Fatal("a name of 500 bytes fits into a header of 512")
	}
}

// TestFeatureNames: the image's own table names what we do not know.
func TestFeatureNames(t *testing.T) {
	h := &Header{Version: 3, ClusterBits: 16, RefcountOrder: 4, RefcountTableClusters: 1, RefcountTableOffset: 0x10000,
		IncompatibleFeatures: 1<<7 | 1<<9}
	e := make([]byte, featureEntrySize)
	e[1] = 7
	copy(e[2:], "seven")
	b, err := h.Marshal(&Extensions{Unknown: []RawExtension{{extFeatureTable, e}}}, "")
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, make([]byte, 65536)...)
	_, err = Parse(b, false)
	want := "Unsupported qcow2 feature(s): seven, Unknown incompatible feature: 200"
	if err == nil || err.Error() != want {
		t.Fatalf("%v, want %q", err, want)
	}
}

func TestSnapshot(t *testing.T) {
	b := make([]byte, 200)
	copy(b, []byte{0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 2, 0, 1, 0, 3})
	b[39] = 16
	b[40+7], b[40+8+6] = 9, 2
	copy(b[56:], "1one")
	n, err := SnapshotNeed(b, 0)
	if err != nil || n != 40+16+4 {
		t.Fatalf("%d %v", n, err)
	}
	s := ParseSnapshot(b[:n], 77)
	if s.ID != "1" || s.Name != "one" || s.L1TableOffset != 0x50000 || s.L1Size != 2 ||
		s.VMStateSize != 9 || s.DiskSize != 512 || s.Icount != ^uint64(0) {
		t.Fatalf("%+v", s)
	}
	b[38] = 8
	if _, err := SnapshotNeed(b, 4); err == nil || err.Error() != "Too much extra metadata in snapshot table entry 4" {
		t.Fatal(err)
	}
}
