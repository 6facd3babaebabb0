package drivertest

import (
	"context"
	"sync"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// Sink collects events.
type Sink struct {
	mu  sync.Mutex
	all []events.Event
}

// Emit implements events.Sink.
func (s *Sink) Emit(e events.Event) {
	s.mu.Lock()
	s.all = append(s.all, e)
	s.mu.Unlock()
}

// Events are those emitted so far.
func (s *Sink) Events() []events.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]events.Event(nil), s.all...)
}

// NewGraph is an empty graph that is closed when the test ends.
func NewGraph(t testing.TB) *graph.Graph {
	g, _ := NewGraphSink(t)
	return g
}

// NewGraphSink is NewGraph with the sink of its events.
func NewGraphSink(t testing.TB) (*graph.Graph, *Sink) {
	t.Helper()
	s := &Sink{}
	g := graph.New(s)
	t.Cleanup(func() {
		if err := g.Close(context.Background()); err != nil {
			t.Errorf("closing the graph: %v", err)
		}
	})
	return g, s
}

// Child is an edge to make when a node is built.
type Child struct {
	Name string
	Role perm.Role
	Node *graph.Node
}

// File is the primary data child that formats have.
func File(n *graph.Node) Child {
	return Child{"file", perm.Data | perm.Metadata | perm.Primary, n}
}

// FilteredFile is the child of a filter, and of raw without limits.
func FilteredFile(n *graph.Node) Child { return Child{"file", perm.Filtered | perm.Primary, n} }

// Backing is the backing child.
func Backing(n *graph.Node) Child { return Child{"backing", perm.COW, n} }

// Spec is a node to build.
type Spec struct {
	// Options; the kind is as given, discard is on unless NoDiscard.
	Options   graph.Options
	NoDiscard bool
	Children  []Child
	// Open makes the driver; see driver.Def.With.
	Open driver.OpenFunc
}

// Opened is the OpenFunc that returns d.
func Opened(d graph.Driver) driver.OpenFunc {
	return func(*driver.Opening) (graph.Driver, error) { return d, nil }
}

// Build builds and publishes a monitor-owned node as blockdev-add does. On error nothing is left
// behind.
func Build(g *graph.Graph, s Spec) (*graph.Node, error) {
	ctx := context.Background()
	o := s.Options
	if o.DriverName == "" {
		o.DriverName = "null-co"
	}
	o.Discard, o.Reopens = !s.NoDiscard, true
	tx := g.Begin(ctx)
	defer tx.Abort()
	n, err := tx.NewNode(&o)
	if err != nil {
		return nil, err
	}
	for _, c := range s.Children {
		if _, err := tx.Attach(n, c.Name, c.Role, c.Node); err != nil {
			return nil, err
		}
	}
	if err := tx.Commit(); err != nil {
		return nil, err
	}
	d, err := s.Open(&driver.Opening{Ctx: ctx, Node: n, Req: &blk.Req{Ctx: ctx}, Warn: func(string) {}})
	if err != nil {
		g.Discard(n)
		return nil, err
	}
	n.SetDriver(d)
	tx = g.Begin(ctx)
	defer tx.Abort()
	tx.Publish(n)
	tx.Own(n)
	if err := tx.Commit(); err != nil {
		g.Discard(n)
		return nil, err
	}
	return n, nil
}

// AddNode publishes a protocol node on d with discard on.
func AddNode(t testing.TB, g *graph.Graph, name string, d graph.Driver) *graph.Node {
	t.Helper()
	return MustBuild(t, g, Spec{Options: graph.Options{Name: name, Kind: graph.Protocol}, Open: Opened(d)})
}

// MustBuild is Build that ends the test on error.
func MustBuild(t testing.TB, g *graph.Graph, s Spec) *graph.Node {
	t.Helper()
	n, err := Build(g, s)
	if err != nil {
		t.Fatalf("node %q: %v", s.Options.Name, err)
	}
	return n
}

// Writer is the claim of a root that reads, writes and shares everything.
var Writer = perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All}

// Reader is the claim of a root that reads and shares everything.
var Reader = perm.Claim{Need: perm.ConsistentRead, Share: perm.All}

// AddRoot attaches a root to n; it goes when the test ends.
func AddRoot(t testing.TB, g *graph.Graph, n *graph.Node, c perm.Claim) *graph.Root {
	t.Helper()
	ctx := context.Background()
	r, err := g.AddRoot(ctx, graph.RootSpec{EdgeName: "root", Claim: c}, n)
	if err != nil {
		t.Fatalf("root on %q: %v", n.Name(), err)
	}
	t.Cleanup(func() {
		if err := g.CloseRoot(ctx, r); err != nil {
			t.Errorf("closing a root: %v", err)
		}
	})
	return r
}
