package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// addQcow2 publishes a qcow2 node over file.
func addQcow2(
	t testing.TB, g *graph.Graph, name string, file *graph.Node, ro bool,
	o *types.BlockdevOptionsQcow2, more ...drivertest.Child,
) *graph.Node {
	t.Helper()
	if o == nil {
		o = &types.BlockdevOptionsQcow2{}
	}
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: name, Kind: graph.Format, DriverName: "qcow2", ReadOnly: ro},
		Children: append([]drivertest.Child{drivertest.File(file)}, more...),
		Open:     Def.With(o),
	})
}

// created makes an image of the given options in a node on d and returns the node.
func created(t testing.TB, g *graph.Graph, d graph.Driver, o *types.BlockdevCreateOptionsQcow2) *graph.Node {
	t.Helper()
	n, _ := createdWith(t, g, d, nil, o)
	return n
}

// createdWith is created with a node on ext for the data, unless that is nil.
func createdWith(
	t testing.TB, g *graph.Graph, d, ext graph.Driver, o *types.BlockdevCreateOptionsQcow2,
) (n, data *graph.Node) {
	t.Helper()
	ctx := context.Background()
	var roots []*graph.Root
	add := func(name string, d graph.Driver) *graph.Node {
		c := drivertest.Writer
		c.Need |= 8 // resize
		n := drivertest.AddNode(t, g, name, d)
		r, err := g.AddRoot(ctx, graph.RootSpec{EdgeName: "root", Claim: c}, n)
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, r)
		return n
	}
	n = add("file", d)
	below := (*graph.Root)(nil)
	if ext != nil {
		data = add("data", ext)
		below = roots[1]
	}
	err := Create(ctx, roots[0], below, o, &driver.Creation{Filename: (*graph.Node).Name})
	for _, r := range roots {
		err = errors.Join(err, g.CloseRoot(ctx, r))
	}
	if err != nil {
		t.Fatal(err)
	}
	return n, data
}

// TestSuite runs the conformance suite over files of several kinds.
func TestSuite(t *testing.T) {
	data := &types.BlockdevRef{Reference: ptr("data")}
	for _, c := range []struct {
		name string
		file func(t testing.TB) graph.Driver
		o    types.BlockdevCreateOptionsQcow2
	}{
		{"mem", func(testing.TB) graph.Driver { return drivertest.NewMemFile(0) }, types.BlockdevCreateOptionsQcow2{}},
		{"data", func(t testing.TB) graph.Driver { return drivertest.NewHostFile(t, 0) },
			types.BlockdevCreateOptionsQcow2{DataFile: data, ClusterSize: ptr(uint64(4096))}},
		{"raw data", func(t testing.TB) graph.Driver { return drivertest.NewHostFile(t, 0) },
			types.BlockdevCreateOptionsQcow2{DataFile: data, DataFileRaw: ptr(true)}},
		{"extended data", func(testing.TB) graph.Driver { return drivertest.NewMemFile(0) },
			types.BlockdevCreateOptionsQcow2{DataFile: data, ClusterSize: ptr(uint64(16384)), ExtendedL2: ptr(true)}},
		{"data in a slow file", func(testing.TB) graph.Driver {
			return drivertest.NewMemFileOptions(0, drivertest.MemOptions{Slow: true, NoZero: true, NoDiscard: true})
		}, types.BlockdevCreateOptionsQcow2{DataFile: data, DataFileRaw: ptr(true)}},
		{"host", func(t testing.TB) graph.Driver { return drivertest.NewHostFile(t, 0) }, types.BlockdevCreateOptionsQcow2{}},
		{"small", func(testing.TB) graph.Driver {
			limits := blk.Limits{RequestAlign: 512, MemAlign: 512, MaxTransfer: 8192}
			return drivertest.NewMemFileOptions(0, drivertest.MemOptions{Limits: limits})
		}, types.BlockdevCreateOptionsQcow2{ClusterSize: ptr(uint64(512)), RefcountBits: ptr(int64(64))}},
		{"v2", func(t testing.TB) graph.Driver { return drivertest.NewHostFile(t, 0) },
			types.BlockdevCreateOptionsQcow2{ClusterSize: ptr(uint64(4096)), Version: ptr(types.BlockdevQcow2VersionV2)}},
		{"extended", func(t testing.TB) graph.Driver { return drivertest.NewHostFile(t, 0) },
			types.BlockdevCreateOptionsQcow2{ClusterSize: ptr(uint64(16384)), ExtendedL2: ptr(true)}},
		{"slow", func(testing.TB) graph.Driver {
			return drivertest.NewMemFileOptions(0, drivertest.MemOptions{Slow: true, NoZero: true, NoDiscard: true})
		}, types.BlockdevCreateOptionsQcow2{ClusterSize: ptr(uint64(65536))}},
	} {
		t.Run(c.name, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Steps: 200,
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					o := c.o
					o.Size = uint64(size)
					if o.DataFile == nil {
						return addQcow2(t, g, "q", created(t, g, c.file(t), &o), ro, nil)
					}
					file, data := createdWith(t, g, c.file(t), c.file(t), &o)
					return addQcow2(t, g, "q", file, ro, nil, drivertest.Child{Name: dataFile, Role: perm.Data, Node: data})
				},
				Check: func(t *testing.T, n *graph.Node) { sound(t, n.Driver().(*Driver).image, true) },
			})
		})
	}
}

func newRoot(t testing.TB, g *graph.Graph, n *graph.Node) (*graph.Root, *blk.Req) {
	t.Helper()
	c := drivertest.Writer
	c.Need |= 8
	r := drivertest.AddRoot(t, g, n, c)
	q, err := r.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.End(q) })
	return r, q
}

// TestCorruptAtRuntime is the corpus' case: an L2 entry that points into the L1 table.
func TestCorruptAtRuntime(t *testing.T) {
	g, sink := drivertest.NewGraphSink(t)
	f := drivertest.NewMemFile(0)
	file := created(t, g, f, &types.BlockdevCreateOptionsQcow2{Size: 1 << 20})
	n := addQcow2(t, g, "q", file, false, nil)
	r, q := newRoot(t, g, n)
	if err := r.WriteAt(q, blk.Buf(make([]byte, 128<<10)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Flush(q); err != nil {
		t.Fatal(err)
	}
	d := n.Driver().(*Driver)
	d.mu.Lock()
	s, err := d.loadSlice(q, 0)
	if err != nil {
		t.Fatal(err)
	}
	d.setEntry(s, 0, 1<<63|d.hdr.L1TableOffset)
	d.l2.markClean(s) // as if it had come from the file: nothing that was acknowledged is lost
	l1 := int64(d.hdr.L1TableOffset)
	d.mu.Unlock()
	if err := r.WriteAt(q, blk.Buf(make([]byte, 64<<10)), 0, 0); !errors.Is(err, syscall.EIO) {
		t.Fatalf("overlapping write: %v", err)
	}
	if err := r.WriteAt(q, blk.Buf(make([]byte, 64<<10)), 64<<10, 0); !errors.Is(err, blk.ErrNoMedium) {
		t.Fatalf("write after corruption: %v", err)
	}
	if err := r.Discard(q, 0, 64<<10); !errors.Is(err, blk.ErrNoMedium) {
		t.Fatalf("discard after corruption, without discard=unmap: %v", err)
	}
	var got []*types.BlockImageCorruptedEvent
	for _, e := range sink.Events() {
		if e, ok := e.(types.BlockImageCorruptedEvent); ok {
			got = append(got, &e)
		}
	}
	if len(got) != 1 || got[0].Msg != "Preventing invalid write on metadata (overlaps with active L1 table)" || !got[0].Fatal ||
		*got[0].Offset != l1 || *got[0].Size != 64<<10 || *got[0].NodeName != "q" {
		t.Fatalf("events: %+v", got)
	}
	if !d.Ejected() {
		t.Fatal("not ejected")
	}
	var info types.ImageInfo
	d.ImageInfo(&info)
	if !*info.FormatSpecific.U.(*types.ImageInfoSpecificQCow2Wrapper).Data.Corrupt {
		t.Fatal("info does not say so")
	}
	if _, err := openImage(req(), config{file: mem{f}}); err == nil || err.Error() != "qcow2: Image is corrupt; cannot be opened read/write" {
		t.Fatalf("opening again: %v", err)
	}
}

// TestChain reads through a backing file, resizes over its end, and changes its name.
func TestChain(t *testing.T) {
	g := drivertest.NewGraph(t)
	back := drivertest.MemFileOf(bytes.Repeat([]byte{9}, 1<<20))
	b := drivertest.AddNode(t, g, "back", back)
	o := &types.BlockdevCreateOptionsQcow2{Size: 512 << 10, BackingFile: ptr("b.raw"), BackingFmt: ptr(types.BlockdevDriverRaw)}
	n := addQcow2(t, g, "q", created(t, g, drivertest.NewMemFile(0), o), false, nil, drivertest.Backing(b))
	d := n.Driver().(*Driver)
	if name, format := d.BackingFile(); name != "b.raw" || format != "raw" {
		t.Fatalf("backing file %q %q", name, format)
	}
	r, q := newRoot(t, g, n)
	if err := r.WriteAt(q, blk.Buf([]byte{1}), 3, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Resize(context.Background(), 2<<20, true, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 2<<20)
	copy(want, bytes.Repeat([]byte{9}, 512<<10))
	want[3] = 1
	got := make([]byte, len(want))
	if err := r.ReadAt(q, blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("content differs: %v", err)
	}
	if err := d.ChangeBackingFile(q, "x", ""); err != nil {
		t.Fatal(err)
	}
	if err := d.ChangeBackingFile(q, string(make([]byte, 1024)), ""); err == nil {
		t.Fatal("a name of 1024 bytes was taken")
	}
	if name, format := d.BackingFile(); name != "x" || format != "" {
		t.Fatalf("backing file %q %q", name, format)
	}
	sound(t, d.image, true)
}

// What is zeroed beyond the end of the backing file is still zeroes when a longer one takes its
// place, as at the end of a commit.
func TestZeroesBeyondBacking(t *testing.T) {
	const cluster = 64 << 10
	for _, version := range []types.BlockdevQcow2Version{types.BlockdevQcow2VersionV2, types.BlockdevQcow2VersionV3} {
		g := drivertest.NewGraph(t)
		o := &types.BlockdevCreateOptionsQcow2{Size: 8 * cluster, Version: &version}
		short := drivertest.AddNode(t, g, "short", drivertest.MemFileOf(make([]byte, cluster)))
		file := created(t, g, drivertest.NewMemFile(0), o)
		r, q := newRoot(t, g, addQcow2(t, g, "q", file, false, nil, drivertest.Backing(short)))
		if err := r.Zero(q, 2*cluster, 2*cluster, 0); err != nil {
			t.Fatal(err)
		}
		if x, err := r.Status(q, 2*cluster, 2*cluster); err != nil || !x.Allocated || x.N != 2*cluster {
			t.Errorf("%s: %+v, %v: a longer backing file would show", version, x, err)
		}
	}
}

// What is zeroed or discarded while the backing file that the header names is not opened stays
// zeroes when it is.
func TestZeroesBeforeBacking(t *testing.T) {
	const cluster, size = 64 << 10, 8 * 64 << 10
	for _, version := range []types.BlockdevQcow2Version{types.BlockdevQcow2VersionV2, types.BlockdevQcow2VersionV3} {
		g := drivertest.NewGraph(t)
		file := drivertest.NewMemFile(0)
		o := &types.BlockdevCreateOptionsQcow2{
			Size: size, Version: &version, BackingFile: ptr("b.raw"), BackingFmt: ptr(types.BlockdevDriverRaw),
		}
		r, q := newRoot(t, g, drivertest.MustBuild(t, g, drivertest.Spec{
			Options:  graph.Options{Name: "q", Kind: graph.Format, DriverName: "qcow2", Discard: true},
			Open:     Def.With(&types.BlockdevOptionsQcow2{}),
			Children: []drivertest.Child{drivertest.File(created(t, g, file, o))},
		}))
		one := bytes.Repeat([]byte{1}, 3*cluster)
		for i, f := range []func() error{
			func() error { return r.WriteAt(q, blk.Buf(one), cluster, 0) },
			func() error { return r.Zero(q, 0, 2*cluster, 0) },
			func() error { return r.Zero(q, 2*cluster, cluster, blk.MayUnmap) },
			func() error { return r.Discard(q, 3*cluster, 2*cluster) }, // the first was written, the second never was anything
			func() error { return r.Zero(q, 5*cluster+512, 1024, 0) },
		} {
			if err := f(); err != nil {
				t.Fatalf("%s, step %d: %v", version, i, err)
			}
		}
		want := make([]byte, size)
		if err := r.ReadAt(q, blk.Buf(want), 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := r.Flush(q); err != nil {
			t.Fatal(err)
		}
		g = drivertest.NewGraph(t)
		b := drivertest.AddNode(t, g, "back", drivertest.MemFileOf(bytes.Repeat([]byte{9}, size)))
		r, q = newRoot(t, g, addQcow2(t, g, "q", drivertest.AddNode(t, g, "file", file.Clone()), false, nil, drivertest.Backing(b)))
		got := make([]byte, size)
		if err := r.ReadAt(q, blk.Buf(got), 0, 0); err != nil {
			t.Fatal(err)
		}
		zeroed := 4 * cluster
		if version == types.BlockdevQcow2VersionV3 {
			zeroed = 5 * cluster
		}
		if i := bytes.IndexByte(got[:3*cluster], 9); i >= 0 || !bytes.Equal(got[:zeroed], want[:zeroed]) {
			t.Errorf("%s: differs; the backing file shows at %d", version, i)
		}
		if !bytes.Equal(got[5*cluster+512:5*cluster+1536], make([]byte, 1024)) {
			t.Errorf("%s: a part of a cluster shows the backing file", version)
		}
	}
}

// TestLease: a mapped cluster is not reused before the mapping is released.
func TestLease(t *testing.T) {
	g := drivertest.NewGraph(t)
	o := &types.BlockdevCreateOptionsQcow2{Size: 8 << 20, ClusterSize: ptr(uint64(4096))}
	n := addQcow2(t, g, "q", created(t, g, drivertest.NewHostFile(t, 0), o), false, nil)
	r, q := newRoot(t, g, n)
	write := func(v byte, off int64) {
		t.Helper()
		if err := r.WriteAt(q, blk.Buf(bytes.Repeat([]byte{v}, 4096)), off, 0); err != nil {
			t.Fatal(err)
		}
	}
	write(1, 0)
	var m blk.Mapping
	if err := r.Map(q, 0, 4096, &m); err != nil || m.N() != 4096 || m.Ranges[0].FD < 0 {
		t.Fatalf("map: %v %+v", err, m.Ranges)
	}
	h := m.Ranges[0]
	if err := r.Discard(q, 0, 4096); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		if err := r.Flush(q); err != nil {
			t.Fatal(err)
		}
		write(2, int64(i+1)*4096)
	}
	b := make([]byte, 4096)
	if _, err := syscall.Pread(h.FD, b, h.Off); err != nil || b[0] != 1 || b[4095] != 1 {
		t.Fatalf("mapped bytes were changed: %v %d", err, b[0])
	}
	m.Release()
	d := n.Driver().(*Driver)
	if err := r.Flush(q); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	left := len(d.quarantine.limbo) + len(d.quarantine.pending)
	d.mu.Unlock()
	if left != 0 {
		t.Fatalf("%d clusters are still held", left)
	}
	sound(t, d.image, false)
}

func TestNoWait(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20})
	s := mustOpen(t, mem{f}, config{})
	nw := req()
	nw.NoWait = true
	b := make([]byte, 4096)
	if err := s.WriteAt(nw, blk.Buf(b), 0, 0); !errors.Is(err, blk.ErrWouldBlock) {
		t.Fatalf("allocating write: %v", err)
	}
	if err := s.WriteAt(req(), blk.Buf(b), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.WriteAt(nw, blk.Buf(b), 0, 0); err != nil {
		t.Fatalf("overwrite: %v", err)
	}
	if err := s.ReadAt(nw, blk.Buf(b), 0, 0); err != nil {
		t.Fatalf("read: %v", err)
	}
	s.mu.Lock()
	err := s.ReadAt(nw, blk.Buf(b), 0, 0)
	s.mu.Unlock()
	if !errors.Is(err, blk.ErrWouldBlock) {
		t.Fatalf("read under a taken lock: %v", err)
	}
	mustClose(t, s)
	s = mustOpen(t, mem{f}, config{})
	if err := s.ReadAt(nw, blk.Buf(b), 0, 0); !errors.Is(err, blk.ErrWouldBlock) {
		t.Fatalf("read with a cold cache: %v", err)
	}
	mustClose(t, s)
}

func Example() {
	fmt.Println(layout.Probe([]byte("QFI\xfb\x00\x00\x00\x03" + string(make([]byte, 100)))))
	// Output: true
}
