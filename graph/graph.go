package graph

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/events"
	"qblockd/graph/perm"
)

// Graph holds all nodes, edges and roots of a daemon. All methods may be called from any goroutine.
type Graph struct {
	sink     events.Sink
	recorder atomic.Pointer[Recorder]

	mu          sync.RWMutex
	version     uint64            // counts changes of what drafts are made from
	names       map[string]holder // every taken name
	published   list[Node]        // newest first
	owned       list[Node]        // by the monitor, oldest first
	roots       list[Root]        // newest first
	nodeSeq     uint64
	autoID      uint64             // number in the next generated name
	pending     map[*commit][]link // edges between nodes in use that commits under way will make
	pendingLess signal
	closed      bool          // Close has begun: no more transactions
	stop        chan struct{} // closed with closed

	resv  reservations // of transactions
	holds reservations // of commands: see Hold

	drainers  atomic.Int64 // nodes whose driver is a Drainer
	shutdowns atomic.Int64 // drivers that were closed

	gen   atomic.Uint64 // last InfoGeneration given out
	epoch atomic.Uint64 // changes after every Bump
	genMu sync.Mutex    // guards tree and epoch of generations
}

// holder is who holds a name.
type holder struct {
	node *Node  // nil for others than nodes
	who  string // what holds it then: "device id"
}

// New makes an empty graph that reports events to sink.
func New(sink events.Sink) *Graph {
	return &Graph{
		sink: sink, names: map[string]holder{}, pending: map[*commit][]link{}, stop: make(chan struct{}),
	}
}

// Sink takes the events of the block layer.
func (g *Graph) Sink() events.Sink { return g.sink }

// Node finds a published node; nil if there is none of that name.
func (g *Graph) Node(name string) *Node {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if n := g.names[name].node; n != nil && n.state == nodePublished {
		return n
	}
	return nil
}

// Nodes are the published nodes, newest first: in reverse order of NewNode.
func (g *Graph) Nodes() []*Node {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.Collect(g.published.all())
}

// MonitorOwned are the nodes that blockdev-add made, oldest first.
func (g *Graph) MonitorOwned() []*Node {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.Collect(g.owned.all())
}

// Roots are the attached roots, newest first.
func (g *Graph) Roots() []*Root {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.Collect(g.roots.all())
}

// RootsAbove are the roots that reach one of the nodes.
func (g *Graph) RootsAbove(nodes ...*Node) []*Root {
	g.mu.RLock()
	defer g.mu.RUnlock()
	d := &drain{g: g, nodes: nodes}
	d.collectLocked() // +checklocksignore: of the same graph
	return d.gates
}

// Dependents are n and the nodes below it that may be closed with it: neither the monitor owns
// them, nor all that leads there from n. It costs what it finds, however long the chain is.
func (n *Node) Dependents() []*Node {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	found := []*Node{n}
	for i := 0; i < len(found); i++ {
		for _, e := range found[i].kids.Load().all {
			if k := e.Node(); !k.owned && !slices.Contains(found, k) {
				found = append(found, k)
			}
		}
	}
	return found
}

// CreationSpan tells when the first and the last of the nodes, and of those below them, were made:
// a measure that only serves to compare.
func CreationSpan(nodes ...*Node) (first, last uint64) {
	first = math.MaxUint64
	for _, top := range nodes {
		for _, n := range top.NodesBelow() {
			first, last = min(first, n.seq), max(last, n.seq)
		}
	}
	return first, last
}

// EdgeInfo is an edge at one moment.
type EdgeInfo struct {
	Edge  *Edge
	Node  *Node
	Claim perm.Claim
}

// Topology is the whole graph at one moment.
type Topology struct {
	Nodes []*Node    // published, newest first
	Roots []*Root    // newest first
	Edges []EdgeInfo // of the roots, then of the nodes, in the order of those; a node's newest first
}

// Topology takes a consistent picture; it costs its size.
func (g *Graph) Topology() Topology {
	g.mu.RLock()
	defer g.mu.RUnlock()
	var t Topology
	add := func(e *Edge) { t.Edges = append(t.Edges, EdgeInfo{e, e.Node(), e.Claim()}) }
	for r := range g.roots.all() {
		t.Roots = append(t.Roots, r)
		add(r.edge)
	}
	for n := range g.published.all() {
		t.Nodes = append(t.Nodes, n)
		for _, e := range n.kids.Load().all {
			add(e)
		}
	}
	return t
}

// Do makes the changes of f in a Tx of its own: all, or none with an error of f or of Commit.
func (g *Graph) Do(ctx context.Context, f func(tx *Tx) error) error {
	tx := g.Begin(ctx)
	defer tx.Abort()
	if err := f(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// AddRoot is Tx.AttachRoot in a Tx of its own.
func (g *Graph) AddRoot(ctx context.Context, s RootSpec, n *Node) (r *Root, err error) {
	err = g.Do(ctx, func(tx *Tx) error {
		r, err = tx.AttachRoot(s, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// CloseRoot detaches r in a Tx of its own: it waits until the root's units of work are over.
func (g *Graph) CloseRoot(ctx context.Context, r *Root) error {
	return g.Do(ctx, func(tx *Tx) error {
		tx.Ending()
		return tx.DetachRoot(r)
	})
}

// Discard undoes the opening of hidden nodes; see Tx.Discard. It waits for nobody but for
// drivers that are being closed.
func (g *Graph) Discard(nodes ...*Node) {
	tx := g.Begin(context.Background())
	tx.Ending()
	for _, n := range nodes {
		ignoreClosing(tx.Discard(n))
	}
	ignoreClosing(tx.Commit())
}

// FreezeChain is Tx.FreezeChain in a Tx of its own.
func (g *Graph) FreezeChain(top, base *Node) (unfreeze func(), err error) {
	err = g.Do(context.Background(), func(tx *Tx) error {
		unfreeze, err = tx.FreezeChain(top, base)
		return err
	})
	if err != nil {
		return nil, err
	}
	return unfreeze, nil
}

// ignoreClosing is for what only a bug of ours can make fail, or Graph.Close, which ends the nodes
// itself.
func ignoreClosing(err error) {
	if err != nil && !errors.Is(err, errClosing) {
		panic("graph: " + err.Error())
	}
}
