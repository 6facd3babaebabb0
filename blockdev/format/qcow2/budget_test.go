package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// crafted is an image of hostile content: an empty one with tables where none would be.
type crafted struct {
	f   *drivertest.MemFile
	cs  int64
	end int64 // where the next table goes
}

func craft(t testing.TB, clusterBits uint, size uint64) *crafted {
	t.Helper()
	cs := int64(1) << clusterBits
	f := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(cs))})
	c := &crafted{f: f, cs: cs, end: 16 << 20}
	c.u64(layout.OffSize, size)
	n := layout.Geometry{ClusterBits: clusterBits, RefcountOrder: 4}.L1Entries(size)
	c.u32(layout.OffL1Size, uint32(n))
	c.u64(layout.OffL1Size+4, uint64(c.place(int64(n)*8)))
	return c
}

func (c *crafted) u32(off int64, v uint32) { c.f.Poke(off, binary.BigEndian.AppendUint32(nil, v)) }
func (c *crafted) u64(off int64, v uint64) { c.f.Poke(off, binary.BigEndian.AppendUint64(nil, v)) }

func (c *crafted) get(off int64, n int) []byte {
	b := make([]byte, n)
	if err := c.f.ReadAt(req(), blk.Buf(b), off, 0); err != nil {
		panic(err)
	}
	return b
}

// place finds n bytes of clusters, which are a hole.
func (c *crafted) place(n int64) int64 {
	off := c.end
	c.end += blk.AlignUp(max(n, 1), c.cs)
	c.f.Poke(c.end-1, []byte{0})
	return off
}

// directory enters bitmaps into the header. They are all like e; each changes what differs.
func (c *crafted) directory(n int, e layout.BitmapEntry, each func(i int, e *layout.BitmapEntry)) {
	var l []layout.BitmapEntry
	for i := range n {
		e := e
		e.Name = fmt.Sprintf("b%06d", i)
		if each != nil {
			each(i, &e)
		}
		l = append(l, e)
	}
	dir := layout.AppendBitmapDirectory(nil, l)
	off := c.place(int64(len(dir)))
	c.f.Poke(off, dir)
	h, err := layout.Parse(c.get(0, int(c.cs)), false)
	if err != nil {
		panic(err)
	}
	h.AutoclearFeatures |= layout.AutoclearBitmaps
	x := layout.Bitmaps{NbBitmaps: uint32(n), DirectorySize: uint64(len(dir)), DirectoryOffset: uint64(off)}
	b, err := h.Marshal(&layout.Extensions{Bitmaps: &x}, "")
	if err != nil {
		panic(err)
	}
	c.f.Poke(0, b)
}

// opened opens the image and returns what that has allocated, the image included.
func (c *crafted) opened(t testing.TB, cfg config) (*image, uint64) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	s := mustOpen(t, mem{c.f}, cfg)
	runtime.ReadMemStats(&after)
	return s, after.TotalAlloc - before.TotalAlloc
}

// TestTablesInHoles: tables of any length cost what is in them.
func TestTablesInHoles(t *testing.T) {
	for _, o := range []struct {
		bits uint
		size uint64
	}{{21, 1 << 60}, {21, 1<<61 - 1<<30}, {16, 1 << 51}, {9, 1 << 37}} {
		c := craft(t, o.bits, o.size)
		last := int64(binary.BigEndian.Uint32(c.get(layout.OffL1Size, 4))) - 1
		at := int64(binary.BigEndian.Uint64(c.get(layout.OffL1Size+4, 8)))
		c.u64(at+last*8, uint64(c.place(c.cs)))
		s, used := c.opened(t, config{readOnly: true})
		if limit := uint64(2<<20 + 2*c.cs); used > limit {
			t.Errorf("clusters of 2^%d, disk of %d: %d bytes to open it, limit %d", o.bits, o.size, used, limit)
		}
		b := make([]byte, 512)
		for _, off := range []int64{0, int64(o.size) - 512} {
			if err := s.ReadAt(req(), blk.Buf(b), off, 0); err != nil {
				t.Error(err)
			}
		}
		mustClose(t, s)
	}
}

// TestTablesBetweenHoles: of a table with several holes only what lies between them is read.
func TestTablesBetweenHoles(t *testing.T) {
	f := drivertest.NewMemFile(32 << 20)
	s := mustOpen(t, mem{mustCreate(t, CreateOptions{Size: 1 << 20})}, config{readOnly: true})
	s.file = mem{f}
	want := []int64{1 << 20, 8 << 20, 20<<20 - 8}
	for _, off := range want {
		f.Poke(off, []byte{1, 2, 3, 4, 5, 6, 7, 8})
	}
	f.Reads.Store(0)
	l1, err := s.readTable(req(), 0, 32<<20/8)
	if err != nil {
		t.Fatal(err)
	}
	var got []int64
	for i, e := l1.next(0); e != 0; i, e = l1.next(i + 1) {
		if e != 0x0102030405060708 {
			t.Errorf("entry %d: %#x", i, e)
		}
		got = append(got, i*8)
	}
	if !slices.Equal(got, want) || f.Reads.Load() > 2*int64(len(want)) {
		t.Errorf("%d reads of it, entries at %d; in the file at %d", f.Reads.Load(), got, want)
	}
}

// TestBitmapTablesInOnePlace: what several bitmaps claim is nobody's, and costs nothing.
func TestBitmapTablesInOnePlace(t *testing.T) {
	const n = 600
	c := craft(t, 9, 1<<20)
	const entries = 512 << 20 / 512
	table := c.place(entries * 8)
	c.u64(table+(entries-1)*8, 0x5200)
	e := layout.NewBitmap("", 1<<16, layout.BitmapAuto)
	e.TableOffset, e.TableSize = uint64(table), entries
	c.directory(n, e, nil)
	k := &memKeeper{}
	s, used := c.opened(t, config{readOnly: true, keeper: k})
	if used > 4<<20 {
		t.Errorf("%d bytes to open it", used)
	}
	if len(k.list) != n || !k.list[0].inconsistent || !k.list[n-1].inconsistent {
		t.Errorf("%d bitmaps, the first: %+v", len(k.list), k.list[:min(1, len(k.list))])
	}
	mustClose(t, s)
}

// TestBitmapDataInOnePlace: a cluster is the data of one bitmap, at one place of it.
func TestBitmapDataInOnePlace(t *testing.T) {
	c := craft(t, 16, 1<<40)
	perBitmap := int64(1) << 40 / 512 / 8 / 65536
	data := c.place(65536)
	c.f.Poke(data, []byte{0x55})
	e := layout.NewBitmap("", 512, layout.BitmapAuto)
	e.TableSize = uint32(perBitmap)
	// The first has each cluster once, the second one cluster at all places, the third that of the
	// first.
	c.directory(3, e, func(i int, e *layout.BitmapEntry) {
		at := c.place(perBitmap * 8)
		e.TableOffset = uint64(at)
		switch i {
		case 0:
			c.u64(at, uint64(data))
		case 1:
			other := c.place(65536)
			for j := range perBitmap {
				c.u64(at+8*j, uint64(other))
			}
		case 2:
			c.u64(at+8, uint64(data))
		}
	})
	k := &memKeeper{}
	s, _ := c.opened(t, config{readOnly: true, keeper: k})
	if len(k.list) != 3 || k.list[0].inconsistent || !k.list[1].inconsistent || !k.list[2].inconsistent {
		t.Errorf("%+v", k.list)
	}
	if n := k.list[0].bits.Count(); n != 4*512 {
		t.Errorf("%d bytes are dirty", n)
	}
	mustClose(t, s)
}

// TestOddBitmaps: what we do not know of a bitmap, or what lies over other metadata, is left as it
// is, and the bitmap cannot be used.
func TestOddBitmaps(t *testing.T) {
	for name, odd := range map[string]func(c *crafted, entry int64){
		"type":              func(c *crafted, at int64) { c.f.Poke(at+16, []byte{2}) },
		"flags":             func(c *crafted, at int64) { c.u32(at+12, layout.BitmapAuto|4) },
		"unaligned":         func(c *crafted, at int64) { c.u64(at, 0x30008) },
		"no table":          func(c *crafted, at int64) { c.u32(at+8, 0) },
		"at 0":              func(c *crafted, at int64) { c.u64(at, 0) },
		"over header":       func(c *crafted, at int64) { c.u64(at, 0) },
		"over reftable":     func(c *crafted, at int64) { c.u64(at, 0x10000) },
		"over itself":       func(c *crafted, at int64) { c.u64(at, uint64(at)) },
		"beyond the end":    func(c *crafted, at int64) { c.u64(at, 1<<40) },
		"far beyond":        func(c *crafted, at int64) { c.u64(at, 1<<63) },
		"longer than a map": func(c *crafted, at int64) { c.u32(at+8, 1<<30) },
	} {
		t.Run(name, func(t *testing.T) {
			c := craft(t, 16, 1<<30)
			e := layout.NewBitmap("", 1<<16, layout.BitmapAuto)
			e.TableOffset, e.TableSize = uint64(c.place(8)), 1
			c.directory(2, e, func(i int, e *layout.BitmapEntry) {
				e.TableOffset += uint64(i) * uint64(c.place(8)-int64(e.TableOffset))
			})
			img := c.get(0, int(c.cs))
			h, _ := layout.Parse(img, false)
			x, _ := h.ParseExtensions(img)
			odd(c, int64(x.Bitmaps.DirectoryOffset))
			before := [2][]byte{c.get(0x10000, 8), c.get(0x20000, 6)} // the refcount table, and refcounts of header and tables
			k := &memKeeper{}
			s := mustOpen(t, mem{c.f}, config{readOnly: true, keeper: k})
			if len(k.list) != 2 || !k.list[0].inconsistent || k.list[1].inconsistent {
				t.Fatalf("%+v", k.list)
			}
			mustClose(t, s)
			// Opened for writing and closed it is still there, in use; removing it touches nothing
			// of what it named.
			k = &memKeeper{}
			s = mustOpen(t, mem{c.f}, config{keeper: k})
			mustClose(t, s)
			k = &memKeeper{}
			s = mustOpen(t, mem{c.f}, config{keeper: k})
			if len(k.list) != 2 || !k.list[0].inconsistent || k.list[1].inconsistent {
				t.Fatalf("%+v after it was written to", k.list)
			}
			name := k.list[0].name
			k.list = k.list[1:]
			if err := s.RemoveBitmap(req(), name); err != nil {
				t.Fatal(err)
			}
			mustClose(t, s)
			if after := [2][]byte{c.get(0x10000, 8), c.get(0x20000, 6)}; !reflect.DeepEqual(before, after) {
				t.Errorf("refcounts were %x and are %x", before, after)
			}
		})
	}
}

// TestManyBitmapsOpenInLinearTime, though each has an entry of its own.
func TestManyBitmapsOpenInLinearTime(t *testing.T) {
	const n = 65535
	c := craft(t, 16, 1<<30)
	e := layout.NewBitmap("", 1<<16, layout.BitmapAuto|layout.BitmapInUse)
	e.TableOffset, e.TableSize = uint64(c.place(8)), 1
	c.directory(n, e, nil)
	k := &memKeeper{}
	begun := time.Now()
	s, used := c.opened(t, config{readOnly: true, keeper: k})
	if took := time.Since(begun); took > 20*time.Second || len(k.list) != n {
		t.Errorf("%d bitmaps after %v", len(k.list), took)
	}
	if used > n*1024 {
		t.Errorf("%d bytes, %d a bitmap", used, used/n)
	}
	mustClose(t, s)
}

// TestOpeningEnds: an opening that takes long by the image's will ends with its context.
func TestOpeningEnds(t *testing.T) {
	gone := errors.New("the client is gone")
	images := map[string]func() *crafted{
		"L1": func() *crafted { return craft(t, 21, 1<<60) },
		"snapshots": func() *crafted {
			c := craft(t, 16, 1<<30)
			c.u32(layout.OffSnapshots, 3)
			c.u64(layout.OffSnapshots+4, uint64(c.place(1<<20)))
			return c
		},
		"bitmaps": func() *crafted {
			c := craft(t, 16, 1<<30)
			e := layout.NewBitmap("", 1<<16, layout.BitmapAuto)
			e.TableOffset, e.TableSize = uint64(c.place(8)), 1
			c.directory(100, e, nil)
			return c
		},
	}
	for name, image := range images {
		c := image()
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(gone)
		r := &blk.Req{Ctx: ctx}
		s := &struct{ err error }{}
		switch name {
		case "L1":
			_, s.err = openImage(r, config{file: mem{c.f}, readOnly: true})
		default:
			// The tables before these end it earlier.
			i := mustOpen(t, mem{c.f}, config{readOnly: true})
			i.mu.Lock()
			i.snaps, i.stored = nil, nil
			if name == "snapshots" {
				s.err = i.readSnapshots(r)
			} else {
				s.err = i.loadBitmaps(r)
			}
			i.mu.Unlock()
		}
		if !errors.Is(s.err, gone) {
			t.Errorf("%s: %v", name, s.err)
		}
	}
}

// TestRequestsUnderWay: requests that need memory for clusters of 2 MiB wait while others have what
// there is, with no lock held, and give back what they take.
func TestRequestsUnderWay(t *testing.T) {
	const cs = 2 << 20
	gone := errors.New("the client is gone")
	for _, kind := range []string{"zlib", "zstd"} {
		f := mustCreate(t, CreateOptions{Size: 8 * cs, ClusterSize: ptr(uint64(cs)), CompressionType: kind})
		s := mustOpen(t, mem{f}, config{})
		b := make([]byte, cs)
		compressed := func(r *blk.Req, i int64) error {
			b[0] = byte(i + 1)
			return s.WriteAt(r, blk.Buf(b), i*cs, blk.Compressed)
		}
		for i := range int64(3) {
			if err := compressed(req(), i); err != nil {
				t.Fatal(err)
			}
		}
		read := func(r *blk.Req) error {
			s.mu.Lock()
			s.unz = unzipped{}
			s.mu.Unlock()
			return s.ReadAt(r, blk.Buf(b[:1]), cs, 0)
		}
		write := func(r *blk.Req) error { return s.WriteAt(r, blk.Buf(b[:1]), 2*cs+1, 0) }
		for _, c := range []struct {
			what   string
			budget *blk.Budget
			do     func(r *blk.Req) error
		}{
			{"read", &s.unzipping, read}, {"decode", &s.decoding, read}, {"write", &s.copying, write}, {"write compressed", &s.zipping,
				func(r *blk.Req) error { return compressed(r, 4) }},
		} {
			if err := c.budget.Take(req(), c.budget.Limit); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(context.Background())
			cancel(gone)
			if err := c.do(&blk.Req{Ctx: ctx}); !errors.Is(err, gone) {
				t.Errorf("%s, %s: %v while there is no memory and nobody waits", kind, c.what, err)
			}
			done := make(chan error)
			go func() { done <- c.do(req()) }()
			// Others go on: no lock is held.
			if err := s.ReadAt(req(), blk.Buf(make([]byte, 1)), 7*cs, 0); err != nil {
				t.Error(err)
			}
			c.budget.Give(c.budget.Limit)
			if err := <-done; err != nil {
				t.Errorf("%s, %s: %v", kind, c.what, err)
			}
		}
		for i, x := range []*blk.Budget{&s.zipping, &s.copying, &s.unzipping, &s.decoding} {
			if err := x.Take(&blk.Req{NoWait: true}, x.Limit); err != nil {
				t.Errorf("%s: budget %d was not given back", kind, i)
			}
		}
		mustClose(t, s)
	}
}

// TestRanges compares with looking at all of them.
func TestRanges(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var l []span
		for range rnd.IntN(20) {
			off := rnd.Int64N(1000)
			l = append(l, span{off, off + rnd.Int64N(60)})
		}
		all := makeRanges(slices.Clone(l))
		for i := 1; i < len(all); i++ {
			if all[i].off <= all[i-1].end {
				t.Fatalf("%v", all)
			}
		}
		for range 50 {
			off := rnd.Int64N(1100)
			end := off + 1 + rnd.Int64N(30)
			want := slices.ContainsFunc(l, func(r span) bool { return r.off < r.end && r.off < end && off < r.end })
			if got := all.touch(off, end); got != want {
				t.Fatalf("%v, [%d, %d): %v", all, off, end, got)
			}
		}
	}
}

// TestManySnapshots: as many as there may be, with tables that lie over each other and names that
// fill the table. Opening the image, also with all checks, costs what is in the file, and a write
// does not look at each of them.
func TestManySnapshots(t *testing.T) {
	const n = 65536
	c := craft(t, 16, 1<<30)
	l1 := c.place(32 << 20)
	table := c.place(n * 1000)
	var b []byte
	for i := range int64(n) {
		e := make([]byte, layout.SnapshotHeaderSize, 1000)
		be.PutUint64(e, uint64(l1+i%16<<16))
		be.PutUint32(e[8:], 30<<20/8)
		be.PutUint16(e[12:], 5)
		be.PutUint16(e[14:], 900)
		e = fmt.Appendf(e, "%05d", i)
		b = append(b, e...)
		b = append(b, make([]byte, 952-len(e))...) // the name: a zero, and a hole
	}
	c.f.Poke(table, b)
	c.u32(layout.OffSnapshots, n)
	c.u64(layout.OffSnapshots+4, uint64(table))
	begun := time.Now()
	s, used := c.opened(t, config{options: checks("all")})
	if took := time.Since(begun); took > 20*time.Second || len(peek(s).snaps) != n {
		t.Errorf("%d snapshots after %v", len(peek(s).snaps), took)
	}
	if used > 120<<20 {
		t.Errorf("%d bytes to open it", used)
	}
	begun = time.Now()
	for i := range int64(5000) {
		if err := s.WriteAt(req(), blk.Buf(b[:512]), i%100*65536, 0); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("5000 writes took %v", took)
	}
	mustClose(t, s)
}

// TestTallyOfScatteredBitmaps: what counting references takes stays below its bound also where
// bitmaps are said to be scattered over all the space there is.
func TestTallyOfScatteredBitmaps(t *testing.T) {
	const cs, table, n, most = 512, 1 << 20, 1 << 16, 1 << 20
	img := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(cs))})
	b := make([]byte, 8*n)
	for i := range n {
		be.PutUint64(b[8*i:], uint64(i+1)<<30)
	}
	img.Poke(table, b)
	s := mustOpen(t, mem{img}, config{readOnly: true})
	peek(s).ext.Bitmaps = &layout.Bitmaps{NbBitmaps: 1, DirectorySize: 32, DirectoryOffset: 1 << 19}
	s.mu.Lock()
	s.stored = []*stored{{BitmapEntry: layout.BitmapEntry{Name: "b", TableOffset: table, TableSize: n}}}
	s.mu.Unlock()
	if c, err := count(s, most, true); err != errTooBig || c.t.bytes() > most+most/8 {
		t.Errorf("%v, and it takes %d bytes", err, c.t.bytes())
	}
}

// TestTallyOfSmallClusters: what L2 tables take beside the counts does not make fewer clusters be
// looked at, of which each table has but 64.
func TestTallyOfSmallClusters(t *testing.T) {
	const cs, n = 512, 1 << 13
	s := mustOpen(t, mem{mustCreate(t, CreateOptions{Size: n * cs, ClusterSize: ptr(uint64(cs))})}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, n*cs)), 0, 0); err != nil {
		t.Fatal(err)
	}
	c, err := count(s, n*3/2, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.step(n); err != nil {
		t.Error(err)
	}
	mustClose(t, s)
}
