package graph_test

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// buggy is a driver that panics in the methods named by at.
type buggy struct {
	*drivertest.MemFile
	at     atomic.Value
	failed atomic.Bool
}

func (b *buggy) call(name string) {
	if b.at.Load() == name {
		panic("bug in " + name)
	}
}

func (b *buggy) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	b.call("read")
	return b.MemFile.ReadAt(r, v, off, f)
}

func (b *buggy) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	b.call("write")
	return b.MemFile.WriteAt(r, v, off, f)
}

func (b *buggy) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	b.call("zero")
	return b.MemFile.Zero(r, off, n, f)
}

func (b *buggy) Flush(r *blk.Req) error {
	b.call("flush")
	return b.MemFile.Flush(r)
}

func (b *buggy) Discard(r *blk.Req, off, n int64) error {
	b.call("discard")
	return b.MemFile.Discard(r, off, n)
}

func (b *buggy) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	b.call("status")
	return b.MemFile.Status(r, off, n)
}

func (b *buggy) Close() error {
	b.call("close")
	return b.MemFile.Close()
}

func (b *buggy) PermPrepare(context.Context, perm.Claim) error { b.call("prepare"); return nil }
func (b *buggy) PermCommit()                                   { b.call("commit") }
func (b *buggy) PermAbort()                                    { b.call("abort") }
func (b *buggy) NodeFailed()                                   { b.failed.Store(true) }

func quietLog(t *testing.T) {
	old := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	t.Cleanup(func() { slog.SetDefault(old) })
}

// within ends the test where something hangs.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// A panic in a driver fails its request and its node, and nothing else: requests to others go on,
// and the node can be drained and taken away.
func TestDriverPanics(t *testing.T) {
	defer panics.Contain()()
	quietLog(t)
	requests := map[string]func(root *graph.Root, r *blk.Req) error{
		"read":    func(root *graph.Root, r *blk.Req) error { return root.ReadAt(r, blk.Buf(make([]byte, 512)), 0, 0) },
		"write":   func(root *graph.Root, r *blk.Req) error { return root.WriteAt(r, blk.Buf(make([]byte, 512)), 0, 0) },
		"zero":    func(root *graph.Root, r *blk.Req) error { return root.Zero(r, 0, 512, 0) },
		"discard": func(root *graph.Root, r *blk.Req) error { return root.Discard(r, 0, 512) },
		"flush":   func(root *graph.Root, r *blk.Req) error { return root.Flush(r) },
		"status":  func(root *graph.Root, r *blk.Req) error { _, err := root.Status(r, 0, 512); return err },
	}
	for name, do := range requests {
		t.Run(name, func(t *testing.T) {
			ctx := within(t)
			g, sink := drivertest.NewGraphSink(t)
			b := &buggy{MemFile: drivertest.NewMemFile(1 << 20)}
			b.at.Store(name)
			bad, good := drivertest.AddNode(t, g, "bad", b), drivertest.AddNode(t, g, "good", drivertest.NewMemFile(1<<20))
			root, other := attach(t, g, bad), drivertest.AddRoot(t, g, good, drivertest.Writer)
			ask := func(root *graph.Root, do func(root *graph.Root, r *blk.Req) error) error {
				r, err := root.Begin(ctx)
				if err != nil {
					return err
				}
				defer root.End(r)
				return do(root, r)
			}
			if name == "flush" {
				_ = ask(root, requests["write"]) // there has to be something to flush
			}
			var p *panics.Error
			if err := ask(root, do); !errors.As(err, &p) || !errors.Is(err, syscall.EIO) {
				t.Fatalf("the request: %v", err)
			}
			b.at.Store("")
			for again, do := range requests {
				if err := ask(root, do); !errors.Is(err, syscall.EIO) || errors.As(err, &p) {
					t.Errorf("then %s: %v", again, err)
				}
				if err := ask(other, do); err != nil {
					t.Errorf("%s of another node: %v", again, err)
				}
			}
			if !bad.Failed() || !b.failed.Load() || good.Failed() {
				t.Error("not just the bad node has failed")
			}
			events := 0
			for _, e := range sink.Events() {
				if e, ok := e.(types.BlockImageCorruptedEvent); ok && *e.NodeName == "bad" && e.Fatal {
					events++
				}
			}
			if events != 1 {
				t.Errorf("%d events", events)
			}
			undrain, err := g.Drain(ctx, bad)
			if err != nil {
				t.Fatal(err)
			}
			undrain()
			if err := g.CloseRoot(ctx, root); err != nil {
				t.Fatal(err)
			}
			remove(t, g, "bad")
		})
	}
}

func attach(t *testing.T, g *graph.Graph, n *graph.Node) *graph.Root {
	t.Helper()
	tx := g.Begin(within(t))
	defer tx.Abort()
	r, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func remove(t *testing.T, g *graph.Graph, name string) {
	t.Helper()
	tx := g.Begin(within(t))
	defer tx.Abort()
	if err := tx.Delete(name); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if g.Node(name) != nil {
		t.Errorf("node %s is still there", name)
	}
}

type participant struct{ at string }

func (p participant) Prepare(context.Context) error { p.call("prepare"); return nil }
func (p participant) Commit()                       { p.call("commit") }
func (p participant) Abort()                        { p.call("abort") }
func (p participant) call(name string) {
	if p.at == name {
		panic("bug in " + name)
	}
}

type refuses struct{ participant }

func (refuses) Prepare(context.Context) error { return syscall.ENOSPC }

// A panic in the course of a transaction ends that; its nodes can be reserved and drained by
// others.
func TestTransactionPanics(t *testing.T) {
	defer panics.Contain()()
	quietLog(t)
	for name, c := range map[string]struct {
		driver string
		with   []graph.Participant
		check  func() error
		fails  bool
		failed bool
	}{
		"check":               {check: func() error { panic("bug in a check") }, fails: true},
		"permissions":         {driver: "prepare", fails: true, failed: true},
		"permissions, commit": {driver: "commit", failed: true},
		"permissions, abort":  {driver: "abort", with: []graph.Participant{refuses{}}, fails: true, failed: true},
		"prepare":             {with: []graph.Participant{participant{}, participant{"prepare"}}, fails: true, failed: true},
		"commit":              {with: []graph.Participant{participant{"commit"}, participant{}}, failed: true},
		"abort":               {with: []graph.Participant{participant{"abort"}, refuses{}}, fails: true, failed: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := within(t)
			g := drivertest.NewGraph(t)
			b := &buggy{MemFile: drivertest.NewMemFile(1 << 20)}
			n := drivertest.AddNode(t, g, "n", b)
			b.at.Store(c.driver)
			tx := g.Begin(ctx)
			defer tx.Abort()
			root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n)
			if err != nil {
				t.Fatal(err)
			}
			if err := tx.Drain(n); err != nil {
				t.Fatal(err)
			}
			for _, p := range c.with {
				tx.Join(p)
			}
			if c.check != nil {
				tx.Check(c.check)
			}
			if err := tx.Commit(); (err != nil) != c.fails {
				t.Errorf("the transaction: %v", err)
			}
			if n.Failed() != c.failed {
				t.Errorf("the node has failed: %v", n.Failed())
			}
			b.at.Store("")
			if !c.fails {
				if err := g.CloseRoot(ctx, root); err != nil {
					t.Fatal(err)
				}
			}
			remove(t, g, "n")
		})
	}
}

// A driver that cannot even be closed does not keep its name.
func TestClosePanics(t *testing.T) {
	defer panics.Contain()()
	quietLog(t)
	g := drivertest.NewGraph(t)
	b := &buggy{MemFile: drivertest.NewMemFile(1 << 20)}
	drivertest.AddNode(t, g, "n", b)
	b.at.Store("close")
	remove(t, g, "n")
	drivertest.AddNode(t, g, "n", drivertest.NewMemFile(512))
}

// What a driver is asked beside requests is contained as well, and not asked any more afterwards.
func TestGuardedPanics(t *testing.T) {
	defer panics.Contain()()
	quietLog(t)
	g := drivertest.NewGraph(t)
	n := drivertest.AddNode(t, g, "n", drivertest.NewMemFile(512))
	if err := n.Guarded(func() error { return syscall.ENOSPC }); err != syscall.ENOSPC || n.Failed() {
		t.Errorf("an error: %v", err)
	}
	if err := n.Guarded(func() error { panic("bug") }); !errors.Is(err, syscall.EIO) || !n.Failed() {
		t.Errorf("a panic: %v", err)
	}
	if err := n.Guarded(func() error { t.Error("the driver is asked"); return nil }); !errors.Is(err, syscall.EIO) {
		t.Errorf("then: %v", err)
	}
	remove(t, g, "n")
}
