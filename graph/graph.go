package graph

import (
	"context"
	"sync"
	"sync/atomic"

	"qblockd/events"
)

// Graph holds all nodes, edges and roots of a daemon. All methods may be called from any goroutine.
type Graph struct {
	sink events.Sink

	mu      sync.RWMutex
	names   map[string]holder // every taken name
	head    *Node             // published nodes, newest first
	mtail   *Node             // monitor-owned nodes
	mhead   *Node
	roots   *Root // newest first
	nodeSeq uint64
	autoID  uint64

	genMu sync.Mutex
	epoch atomic.Uint64

	resv reservations
}

// holder is who holds a name.
type holder struct {
	node *Node  // nil for others than nodes
	who  string // e.g. "device"
}

// New makes an empty graph that reports events to sink.
func New(sink events.Sink) *Graph {
	return &Graph{sink: sink, names: map[string]holder{}}
}

// Sink takes the events of the block layer.
func (g *Graph) Sink() events.Sink { return g.sink }

// Begin starts a transaction. ctx ends the waiting in its Commit.
func (g *Graph) Begin(ctx context.Context) *Tx { return &Tx{g: g, ctx: ctx} }

type reservations struct{}

// Node finds a published node; nil if there is none of that name.
func (g *Graph) Node(name string) *Node {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if h := g.names[name]; h.node != nil && h.node.state == nodePublished {
		return h.node
	}
	return nil
}

// Nodes are the published nodes, newest first.
func (g *Graph) Nodes() []*Node { panic("graph: being written") }

// MonitorOwned are the nodes that blockdev-add made, oldest first.
func (g *Graph) MonitorOwned() []*Node { panic("graph: being written") }

// Roots are the attached roots, newest first.
func (g *Graph) Roots() []*Root { panic("graph: being written") }

// ReserveName takes a name of the name space that nodes share with backends. who is the kind of holder ("device id").
func (g *Graph) ReserveName(name, who string) error { panic("graph: being written") }

// ReleaseName gives back what ReserveName took.
func (g *Graph) ReleaseName(name string) { panic("graph: being written") }

// Close ends the graph: drain, flush, inactivate, close all nodes, parents before children.
func (g *Graph) Close(ctx context.Context) error { panic("graph: being written") }

// CloseRoot detaches r in a Tx of its own.
func (g *Graph) CloseRoot(ctx context.Context, r *Root) error { panic("graph: being written") }

// Discard undoes the opening of hidden nodes in a Tx of its own; see Tx.Discard. It does not fail.
func (g *Graph) Discard(nodes ...*Node) { panic("graph: being written") }

// NotifyQuiet wakes drains that wait for a Drainer to become quiet.
func (g *Graph) NotifyQuiet() { panic("graph: being written") }
