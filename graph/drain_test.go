package graph

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

var readAll = perm.Claim{Need: perm.ConsistentRead, Share: perm.All}

func TestGate(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	r := addRoot(t, g, n, readAll)
	if a := testing.AllocsPerRun(1000, func() {
		q, err := r.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		r.End(q)
	}); a != 0 && !raceEnabled {
		t.Errorf("Begin and End allocate %v times", a)
	}
	q := r.TryBegin()
	drained := make(chan func())
	go func() {
		undrain, err := g.Drain(context.Background(), n)
		if err != nil {
			t.Error(err)
		}
		drained <- undrain
	}()
	for !r.Drained() {
		time.Sleep(time.Millisecond)
	}
	if r.TryBegin() != nil {
		t.Error("the gate is open")
	}
	select {
	case <-drained:
		t.Error("drained with a unit in flight")
	default:
	}
	r.End(q)
	undrain := <-drained
	// Nested.
	undrain2, err := g.Drain(context.Background(), n)
	if err != nil {
		t.Fatal(err)
	}
	undrain()
	if r.TryBegin() != nil {
		t.Error("the gate is open under the second drain")
	}
	begun := make(chan *blk.Req)
	go func() {
		q, err := r.Begin(context.Background())
		if err != nil {
			t.Error(err)
		}
		begun <- q
	}()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := r.Begin(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Begin: %v", err)
	}
	undrain2()
	r.End(<-begun)
	if err := g.CloseRoot(context.Background(), r); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Begin(context.Background()); !errors.Is(err, blk.ErrClosed) {
		t.Errorf("Begin on a closed root: %v", err)
	}
}

func TestDrainTimeout(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	r := addRoot(t, g, n, readAll)
	q := r.TryBegin()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := g.Drain(ctx, n); !errors.Is(err, context.Canceled) {
		t.Errorf("Drain: %v", err)
	}
	if r.Drained() {
		t.Error("a failed drain stays")
	}
	r.End(q)
}

// TestNewParentOfDrained: what is put above a drained node is quiet from the start.
func TestNewParentOfDrained(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	undrain, err := g.Drain(context.Background(), n)
	if err != nil {
		t.Fatal(err)
	}
	top := add(t, g, Options{Name: "top", Kind: Filter}, over, child{"file", perm.Filtered | perm.Primary, n})
	r := addRoot(t, g, top, readAll)
	if r.TryBegin() != nil {
		t.Error("a request passes to a drained node")
	}
	undrain()
	q := r.TryBegin()
	if q == nil {
		t.Fatal("the gate stays closed")
	}
	r.End(q)
}

// holdDriver holds requests back until it is told to let go.
type holdDriver struct {
	overDriver
	mu     sync.Mutex
	let    chan struct{}
	begins int
	quiet  atomic.Bool
}

func (d *holdDriver) DrainBegin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.begins++
	close(d.let)
}
func (d *holdDriver) Quiet() bool { return d.quiet.Load() }
func (d *holdDriver) DrainEnd() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.begins--
	d.let = make(chan struct{})
}

// TestDrainerBelow: draining the top lets go what a filter below holds; Quiet is waited for.
func TestDrainerBelow(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	var hold *holdDriver
	f := add(t, g, Options{Name: "hold", Kind: Filter}, func(n *Node) Driver {
		hold = &holdDriver{overDriver: overDriver{n: n}, let: make(chan struct{})}
		return hold
	}, child{"file", perm.Filtered | perm.Primary, n})
	top := add(t, g, Options{Name: "top", Kind: Filter}, over, child{"file", perm.Filtered | perm.Primary, f})
	r := addRoot(t, g, top, readAll)
	hold.mu.Lock()
	let := hold.let
	hold.mu.Unlock()
	q := r.TryBegin()
	go func() { // a request stuck in the filter
		<-let
		r.End(q)
		hold.quiet.Store(true)
	}()
	undrain, err := g.Drain(context.Background(), top)
	if err != nil {
		t.Fatal(err)
	}
	undrain2, err := g.Drain(context.Background(), n)
	if err != nil {
		t.Fatal(err)
	}
	undrain()
	if hold.begins != 1 {
		t.Errorf("the filter was told %d times", hold.begins)
	}
	undrain2()
	if hold.begins != 0 {
		t.Errorf("after the end: %d", hold.begins)
	}
}

// TestReplaceUnderLoad puts overlays above a node and takes them off while requests run.
func TestReplaceUnderLoad(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	const workers = 4
	var stop atomic.Bool
	var wg sync.WaitGroup
	var units atomic.Int64
	roots := make([]*Root, workers)
	for i := range roots {
		roots[i] = addRoot(t, g, n, perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All})
	}
	for i, r := range roots {
		wg.Go(func() {
			buf := []byte{byte(i + 1)}
			for !stop.Load() {
				q, err := r.Begin(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				if err := r.WriteAt(q, blk.Buf(buf), int64(i), 0); err != nil {
					t.Error(err)
				}
				got := []byte{0}
				if err := r.ReadAt(q, blk.Buf(got), int64(i), 0); err != nil || got[0] != buf[0] {
					t.Errorf("read %v: %v", got, err)
				}
				r.End(q)
				units.Add(1)
			}
		})
	}
	for rounds := 0; rounds < 50 || units.Load() < 100; rounds++ {
		tx := g.Begin(context.Background())
		top, err := tx.NewNode(&Options{Name: "top", Kind: Filter})
		if err != nil {
			t.Fatal(err)
		}
		top.SetDriver(over(top))
		_, err = tx.InsertFilter(top, "file", n)
		if err := errors.Join(err, tx.Publish(top), tx.Commit()); err != nil {
			t.Fatal(err)
		}
		tx = g.Begin(context.Background())
		if err := errors.Join(tx.RemoveFilter(top), tx.Commit()); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	wg.Wait()
	for _, r := range roots {
		if r.Node() != n || r.Drained() {
			t.Errorf("a root is at %s, drained: %v", r.Node().Name(), r.Drained())
		}
	}
}

// TestConcurrentAddDel runs many clients against each other.
func TestConcurrentAddDel(t *testing.T) {
	g := newTestGraph(t)
	base := addMem(t, g, "base")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 30 {
				n, err := tryAdd(g, Options{Kind: Filter}, over, child{"file", perm.Filtered | perm.Primary, base})
				if err != nil {
					t.Error(err)
					return
				}
				r, err := tryRoot(g, n, readAll)
				if err != nil {
					t.Error(err)
					return
				}
				if err := g.CloseRoot(context.Background(), r); err != nil {
					t.Error(err)
				}
				if err := del(g, n.Name()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if names(g) != "base" || len(base.Parents()) > 0 || base.Claim() != perm.Unused {
		t.Errorf("left: %q", names(g))
	}
}

func TestGenerations(t *testing.T) {
	g := newTestGraph(t)
	a, b := addMem(t, g, "a"), addMem(t, g, "b")
	top := addFormat(t, g, "top", a, nil)
	ta, tb, tt := a.TreeGeneration(), b.TreeGeneration(), top.TreeGeneration()
	a.Bump()
	if a.TreeGeneration() == ta || top.TreeGeneration() == tt || b.TreeGeneration() != tb {
		t.Error("a change below does not show, or shows elsewhere")
	}
	tt, own := top.TreeGeneration(), a.InfoGeneration()
	tx := g.Begin(context.Background())
	if err := errors.Join(tx.SetReadOnly(b, true), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	if b.TreeGeneration() == tb || top.TreeGeneration() != tt || a.InfoGeneration() != own || !b.ReadOnly() {
		t.Error("SetReadOnly does not show, or shows elsewhere")
	}
	filter := add(t, g, Options{Name: "filter", Kind: Filter}, over, child{"file", perm.Filtered | perm.Primary, top})
	own = filter.InfoGeneration()
	a.Resized()
	if filter.InfoGeneration() != own {
		t.Error("the size of a file shows above its format")
	}
	top.Resized()
	if filter.InfoGeneration() == own {
		t.Error("the size of a node does not show in a filter above it")
	}
}

// TestClose: a node with a stuck request is reported, all others are flushed and closed.
func TestClose(t *testing.T) {
	g := New(nullSink{})
	bad, good := &memDriver{data: make([]byte, 1)}, &memDriver{data: make([]byte, 1)}
	var flushed atomic.Int64
	bad.onFlush, good.onFlush = func() { flushed.Add(1) }, func() { flushed.Add(1) }
	nb := add(t, g, Options{Name: "bad"}, memOf(bad))
	ng := add(t, g, Options{Name: "good"}, memOf(good))
	add(t, g, Options{Name: "fmt", Kind: Filter}, over, child{"file", perm.Filtered | perm.Primary, ng})
	for _, n := range []*Node{ng, nb} {
		r := addRoot(t, g, n, perm.Claim{Need: perm.Write, Share: perm.All})
		q := r.TryBegin()
		if err := r.WriteAt(q, blk.Buf([]byte{1}), 0, 0); err != nil {
			t.Fatal(err)
		}
		if n == nb {
			break // still in its unit when the graph is closed
		}
		r.End(q)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	err := g.Close(ctx)
	var ce *CloseError
	if !errors.As(err, &ce) || len(ce.Stuck) != 1 || ce.Stuck[0] != "bad" || len(ce.Errs) != 0 {
		t.Errorf("Close: %v", err)
	}
	if !good.closed.Load() || bad.closed.Load() || flushed.Load() != 2 {
		t.Errorf("good closed %v, bad closed %v, %d flushes", good.closed.Load(), bad.closed.Load(), flushed.Load())
	}
	if ctx.Err() != nil {
		t.Error("Close took all its time")
	}
}

func benchAdd(b *testing.B, present int) {
	g := newTestGraph(b)
	for range present {
		addMem(b, g, "")
	}
	b.ReportAllocs()
	for b.Loop() {
		n := addMem(b, g, "x")
		if err := del(g, n.Name()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAddDel10(b *testing.B)    { benchAdd(b, 10) }
func BenchmarkAddDel10000(b *testing.B) { benchAdd(b, 10000) }

// TestMovedAway: a root that another Tx moves away from a node being drained is not waited for any
// more.
func TestMovedAway(t *testing.T) {
	g := newTestGraph(t)
	n, m := addMem(t, g, "n"), addMem(t, g, "m")
	f := add(t, g, Options{Name: "f", Kind: Filter}, over, child{"file", perm.Filtered | perm.Primary, n})
	r := addRoot(t, g, f, readAll)
	g.mu.Lock()
	d := g.beginDrainLocked([]*Node{n}, nil)
	g.mu.Unlock()
	if r.TryBegin() != nil {
		t.Fatal("the gate is open")
	}
	tx := g.Begin(context.Background())
	defer tx.Abort()
	if err := errors.Join(tx.Replace(f.File(), m), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	q := r.TryBegin()
	if q == nil {
		t.Fatal("the gate stays closed")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := d.wait(ctx); err != nil {
		t.Error("the drain waits for it:", err)
	}
	d.end()
	r.End(q)
}

// benchParents adds and deletes a user of a node that has many others.
func benchParents(b *testing.B, present int) {
	g := newTestGraph(b)
	base := addMem(b, g, "base")
	kid := child{"file", perm.Filtered | perm.Primary, base}
	for range present {
		add(b, g, Options{Kind: Filter}, over, kid)
	}
	b.ReportAllocs()
	for b.Loop() {
		n := add(b, g, Options{Name: "x", Kind: Filter}, over, kid)
		if err := del(g, n.Name()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParents10(b *testing.B)    { benchParents(b, 10) }
func BenchmarkParents10000(b *testing.B) { benchParents(b, 10000) }
