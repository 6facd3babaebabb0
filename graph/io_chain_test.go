package graph_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
)

const cluster = 4096

// overlay is a toy format with a backing file: a cluster is allocated or the backing node decides.
type overlay struct {
	*drivertest.MemFile
	n  *graph.Node
	mu sync.Mutex
	// allocated clusters
	has map[int64]bool
}

func openOverlay(size int64) driver.OpenFunc {
	return func(o *driver.Opening) (graph.Driver, error) {
		return &overlay{MemFile: drivertest.NewMemFile(size), n: o.Node, has: map[int64]bool{}}, nil
	}
}

func (o *overlay) Caps() graph.Caps {
	c := o.MemFile.Caps()
	c.Backing = true
	c.Limits = blk.Limits{RequestAlign: cluster, ClusterSize: cluster}
	return c
}

func (o *overlay) mark(off, n int64) {
	o.mu.Lock()
	for c := off / cluster; c*cluster < off+n; c++ {
		o.has[c] = true
	}
	o.mu.Unlock()
}

func (o *overlay) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	o.mark(off, v.Len())
	return o.MemFile.WriteAt(r, v, off, f)
}

func (o *overlay) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	o.mark(off, n)
	return o.MemFile.Zero(r, off, n, f)
}

func (o *overlay) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	for at := int64(0); at < v.Len(); at += cluster {
		o.mu.Lock()
		has := o.has[(off+at)/cluster]
		o.mu.Unlock()
		part := v.Slice(at, cluster)
		var err error
		if b := o.n.Backing(); has || b == nil {
			err = o.MemFile.ReadAt(r, part, off+at, 0)
		} else {
			err = b.ReadAt(r, part, off+at, 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (o *overlay) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	has, k := o.has[off/cluster], int64(cluster)
	for k < n && o.has[(off+k)/cluster] == has {
		k += cluster
	}
	return blk.Extent{N: k, Data: has}, nil
}

func addOverlay(t testing.TB, g *graph.Graph, name string, size int64, below *graph.Node) *graph.Node {
	s := drivertest.Spec{
		Options: graph.Options{Name: name, Kind: graph.Format, DriverName: "qcow2"}, Open: openOverlay(size)}
	if below != nil {
		s.Children = []drivertest.Child{drivertest.Backing(below)}
	}
	return drivertest.MustBuild(t, g, s)
}

// Three layers, the base short: who decides what, and zeroes beyond the base's end.
func TestStatusAbove(t *testing.T) {
	g := drivertest.NewGraph(t)
	base := addOverlay(t, g, "base", 4*cluster, nil)
	mid := addOverlay(t, g, "mid", 8*cluster, base)
	top := addOverlay(t, g, "top", 8*cluster, mid)
	root := drivertest.AddRoot(t, g, top, everything)
	r := begin(t, root)
	v := fill(1, cluster)
	ok(t, base.Driver().(*overlay).WriteAt(r, v, 0, 0))
	ok(t, base.Driver().(*overlay).WriteAt(r, v, cluster, 0))
	ok(t, mid.Driver().(*overlay).WriteAt(r, v, cluster, 0))
	ok(t, top.Driver().(*overlay).WriteAt(r, v, 6*cluster, 0))
	for _, c := range []struct {
		base    *graph.Node
		include bool
		off     int64 // clusters
		n       int64
		depth   int
		data    bool
		zero    bool
		eof     bool
	}{
		{nil, false, 0, 1, 3, true, false, false},
		{nil, false, 1, 1, 2, true, false, false},
		{nil, false, 2, 2, 0, false, true, false},   // nowhere
		{nil, false, 4, 2, 3, false, true, false},   // beyond base's end: zeroes of base
		{nil, false, 6, 1, 1, true, false, false},   // top itself
		{nil, false, 7, 1, 3, false, true, true},    // end of top
		{base, false, 0, 1, 0, false, false, false}, // base not asked
		{base, true, 0, 1, 3, true, false, false},
		{mid, false, 1, 5, 0, false, false, false},
		{top, false, 0, 8, 0, false, false, false},
		{top, true, 6, 1, 1, true, false, false},
	} {
		x, err := root.StatusAbove(r, c.base, c.include, c.off*cluster, 8*cluster-c.off*cluster)
		if err != nil || x.N != c.n*cluster || x.Depth != c.depth || x.Allocated != (c.depth > 0) ||
			x.Data != c.data || x.Zero != c.zero || x.EOF != c.eof {
			t.Errorf("cluster %d, base %v: %+v, %v", c.off, c.base, x, err)
		}
	}
}

// Growing an overlay must not show what a longer backing node has there.
func TestResizeOverLongerBacking(t *testing.T) {
	g := drivertest.NewGraph(t)
	base := drivertest.AddNode(t, g, "base", drivertest.MemFileOf(bytes.Repeat([]byte{7}, 8*cluster)))
	top := addOverlay(t, g, "top", 2*cluster, base)
	root := drivertest.AddRoot(t, g, top, everything)
	r := begin(t, root)
	ok(t, root.Resize(r.Ctx, 10*cluster, true, ""))
	b := make([]byte, 10*cluster)
	ok(t, root.ReadAt(r, blk.Buf(b), 0, 0))
	if b[0] != 7 || b[2*cluster-1] != 7 || !blk.IsZero(b[2*cluster:]) {
		t.Error("the new part shows the backing node")
	}
}

func TestCopyOnRead(t *testing.T) {
	g := drivertest.NewGraph(t)
	data := bytes.Repeat([]byte{7}, 6*cluster)
	clear(data[5*cluster : 6*cluster])
	base := drivertest.AddNode(t, g, "base", drivertest.MemFileOf(data))
	top := addOverlay(t, g, "top", 8*cluster, base)
	root := drivertest.AddRoot(t, g, top, everything)
	r := begin(t, root)
	ok(t, root.WriteAt(r, fill(8, cluster), cluster, 0))
	copy(data[cluster:], bytes.Repeat([]byte{8}, cluster))
	b := make([]byte, 3*cluster)
	ok(t, root.ReadAt(r, blk.Buf(b), 100, blk.CopyOnRead))
	if !bytes.Equal(b, data[100:100+len(b)]) {
		t.Error("wrong data")
	}
	d := top.Driver().(*overlay)
	for c := range int64(8) {
		if want := c <= 3; d.has[c] != want {
			t.Errorf("cluster %d allocated: %v", c, d.has[c])
		}
	}
	ok(t, root.Prefetch(r, 5*cluster, 10*cluster))
	if z := d.Zeros.Load(); z != 1 {
		t.Errorf("zeroes were written %d times, want once", z)
	}
	got := make([]byte, 8*cluster)
	ok(t, root.ReadAt(r, blk.Buf(got), 0, 0))
	if !d.has[5] || !d.has[7] || d.has[4] || !bytes.Equal(got, append(data, make([]byte, 2*cluster)...)) {
		t.Error("prefetch")
	}
	if top.IO().WrHighestOffset() != 2*cluster {
		t.Errorf("copies count as writes: %d", top.IO().WrHighestOffset())
	}
}

// held is a driver whose calls stop at a hook until they are let go.
type held struct {
	*drivertest.Fault
	in     chan drivertest.Op
	resume chan struct{}
}

func hold(d graph.Driver) *held {
	h := &held{drivertest.NewFault(d), make(chan drivertest.Op), make(chan struct{})}
	return h
}

func (h *held) stop(ops drivertest.Op) {
	h.Hook(func(op drivertest.Op, off, n int64) {
		if op&ops != 0 {
			h.in <- op
			<-h.resume
		}
	})
}

// A read-modify-write excludes overlapping writers, waits for those that are under way, and neither
// waits with NoWait.
func TestSerialising(t *testing.T) {
	g := drivertest.NewGraph(t)
	m := drivertest.NewMemFileOptions(1<<20, drivertest.MemOptions{Limits: blk.Limits{RequestAlign: 4096}})
	h := hold(m)
	n := node(t, g, h, nil)
	root := drivertest.AddRoot(t, g, n, everything)
	r := begin(t, root)
	h.stop(drivertest.OpRead)
	done := make(chan error, 3)
	go func() { // a read-modify-write, held in its read
		q := root.TryBegin()
		defer root.End(q)
		done <- root.WriteAt(q, fill(1, 100), 50, 0)
	}()
	<-h.in
	h.Hook(nil)
	nw := begin(t, root)
	nw.NoWait = true
	if err := root.WriteAt(nw, fill(2, 4096), 0, 0); !errors.Is(err, blk.ErrWouldBlock) {
		t.Fatalf("overlapping write: %v", err)
	}
	ok(t, root.WriteAt(nw, fill(2, 4096), 4096, 0)) // next block
	q := begin(t, root)
	go func() { done <- root.WriteAt(q, fill(3, 4096), 0, 0) }()
	ctx, cancel := context.WithCancelCause(context.Background())
	gaveUp := errors.New("gave up")
	c := begin(t, root)
	c.Ctx = ctx
	go func() { done <- root.WriteAt(c, fill(4, 4096), 0, 0) }()
	cancel(gaveUp)
	if err := <-done; !errors.Is(err, gaveUp) {
		t.Fatalf("cancelled: %v", err)
	}
	graph.AwaitRegistered(n, 2)
	select {
	case err := <-done:
		t.Fatalf("a write overtook the read-modify-write: %v", err)
	default:
	}
	h.resume <- struct{}{}
	ok(t, <-done)
	ok(t, <-done)
	b := make([]byte, 4096)
	ok(t, root.ReadAt(r, blk.Buf(b), 0, 0))
	if !bytes.Equal(b, bytes.Repeat([]byte{3}, 4096)) {
		t.Error("the later write was lost")
	}
	if n.IO().InFlight() != 0 {
		t.Errorf("%d requests in flight", n.IO().InFlight())
	}
}

// A unit of work may write inside the range it holds, also in odd pieces, while others wait for it.
func TestLockRange(t *testing.T) {
	g := drivertest.NewGraph(t)
	m := drivertest.NewMemFileOptions(1<<20, drivertest.MemOptions{Limits: blk.Limits{RequestAlign: 512}})
	n := node(t, g, m, nil)
	root := drivertest.AddRoot(t, g, n, everything)
	r := begin(t, root)
	l, err := root.Edge().LockRange(r, 1000, 5000)
	ok(t, err)
	done := make(chan error, 2)
	for i := range 2 {
		q := begin(t, root)
		go func() { done <- root.WriteAt(q, fill(byte(2+i), 1500), 1000, 0) }()
	}
	graph.AwaitRegistered(n, 3)
	for i := range int64(5) {
		ok(t, root.WriteAt(r, fill(1, 700), 1000+i*700, 0))
	}
	l.Unlock()
	ok(t, <-done)
	ok(t, <-done)
	b := make([]byte, 3500)
	ok(t, root.ReadAt(r, blk.Buf(b), 1000, 0))
	if b[0] < 2 || b[1499] != b[0] || b[1500] != 1 || b[3499] != 1 {
		t.Errorf("content %d %d %d", b[0], b[1499], b[1500])
	}
}

// With TrackReads a serialising write waits for reads under way.
func TestTrackReads(t *testing.T) {
	g := drivertest.NewGraph(t)
	h := hold(drivertest.NewMemFile(1 << 20))
	n := node(t, g, h, nil)
	root := drivertest.AddRoot(t, g, n, everything)
	release := n.IO().TrackReads()
	h.stop(drivertest.OpRead)
	done := make(chan error, 1)
	q := begin(t, root)
	go func() { done <- root.ReadAt(q, fill(0, 512), 0, 0) }()
	<-h.in
	h.Hook(nil)
	r := begin(t, root)
	r.NoWait = true
	if err := root.WriteAt(r, fill(1, 512), 0, blk.Serialising); !errors.Is(err, blk.ErrWouldBlock) {
		t.Errorf("serialising write: %v", err)
	}
	ok(t, root.WriteAt(r, fill(1, 512), 0, 0))
	var m blk.Mapping
	if ok(t, root.Map(r, 0, 512, &m)); m.N() != 0 {
		t.Error("mapped although reads are tracked")
	}
	h.resume <- struct{}{}
	ok(t, <-done)
	ok(t, root.WriteAt(r, fill(1, 512), 0, blk.Serialising))
	release()
}

// What a filter that is not transparent has to see does not pass it.
func TestMapPastFilters(t *testing.T) {
	for _, transparent := range []bool{false, true} {
		g := drivertest.NewGraph(t)
		h := drivertest.NewHostFile(t, 1<<16)
		f := drivertest.MustBuild(t, g, drivertest.Spec{
			Options:  graph.Options{Name: "f", Kind: graph.Filter, DriverName: "throttle"},
			Children: []drivertest.Child{drivertest.FilteredFile(drivertest.AddNode(t, g, "h", h))},
			Open: func(o *driver.Opening) (graph.Driver, error) {
				return &pass{o.Node.File(), transparent}, nil
			}})
		root := drivertest.AddRoot(t, g, f, everything)
		r := begin(t, root)
		var m blk.Mapping
		ok(t, root.Map(r, 0, 4096, &m))
		if (m.N() == 4096) != transparent {
			t.Errorf("transparent %v: %d bytes mapped", transparent, m.N())
		}
		err := root.CopyFrom(r, 8192, []blk.HostRange{{FD: -1, N: 4096}}, 0)
		if (err == nil) != transparent {
			t.Errorf("transparent %v: copy: %v", transparent, err)
		}
		m.Release()
		x, err := root.Status(r, 0, 4096)
		if err != nil || !x.Data || !x.OffValid || x.In == nil || x.In.ChildName() != "file" {
			t.Errorf("status: %+v, %v", x, err)
		}
	}
}

type pass struct {
	file        *graph.Edge
	transparent bool
}

func (p *pass) Caps() graph.Caps { return graph.Caps{Transparent: p.transparent} }
func (p *pass) Size() int64      { return p.file.Size() }
func (p *pass) Close() error     { return nil }
func (p *pass) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return p.file.ReadAt(r, v, off, f)
}
func (p *pass) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return p.file.WriteAt(r, v, off, f)
}

// ordered is a driver that wants requests in order.
type ordered struct{ *held }

func (d ordered) Caps() graph.Caps {
	c := d.held.Caps()
	c.Ordered = true
	return c
}

// TestOrdered: of requests on a driver that wants them in order no two run at the same time that
// overlap, but reads do. Others are not held up.
func TestOrdered(t *testing.T) {
	g := drivertest.NewGraph(t)
	h := hold(drivertest.NewMemFile(1 << 20))
	root := drivertest.AddRoot(t, g, node(t, g, ordered{h}, nil), everything)
	q, r := begin(t, root), begin(t, root)
	r.NoWait = true
	read := func(r *blk.Req, off int64) error { return root.ReadAt(r, fill(0, 512), off, 0) }
	write := func(r *blk.Req, off int64) error { return root.WriteAt(r, fill(1, 512), off, 0) }
	for _, c := range []struct {
		op                    drivertest.Op
		held                  func(*blk.Req, int64) error
		readBeside, writeOver error
	}{
		{drivertest.OpRead, read, nil, blk.ErrWouldBlock},
		{drivertest.OpWrite, write, blk.ErrWouldBlock, blk.ErrWouldBlock},
	} {
		h.stop(c.op)
		done := make(chan error, 1)
		go func() { done <- c.held(q, 512) }()
		<-h.in
		h.Hook(nil)
		if got := read(r, 600); !errors.Is(got, c.readBeside) {
			t.Errorf("a read beside op %d: %v", c.op, got)
		}
		if got := write(r, 400); !errors.Is(got, c.writeOver) {
			t.Errorf("a write over op %d: %v", c.op, got)
		}
		ok(t, errors.Join(read(r, 0), write(r, 0), read(r, 1024), write(r, 1024)))
		h.resume <- struct{}{}
		ok(t, <-done)
		ok(t, errors.Join(read(r, 600), write(r, 400)))
	}
}
