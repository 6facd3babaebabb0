package graph

import (
	"sync/atomic"

	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Node is one instance of a driver: a vertex of the graph. The graph owns it from NewNode
// until its last reference goes (monitor, parents, the opener's pin), then it is closed.
type Node struct {
	g    *Graph
	name string
	seq  uint64 // order of NewNode; position in Nodes

	opts     atomic.Pointer[Options]
	drv      Driver // set by SetDriver while hidden, never changed after
	readOnly atomic.Bool
	inactive atomic.Bool          // written under g.mu
	kids     atomic.Pointer[kids] // replaced under g.mu, read anywhere; changes only while the node is drained

	info generation

	sizeSeen atomic.Int32 // parent edges with Edge.showsSize; written under g.mu

	guard   guard
	io      IO
	bitmaps Bitmaps

	// Guarded by g.mu from here.
	state     nodeState
	away      bool     // it was inactive once
	noWriters error    // as in perm.Node
	lent      *Options // as in NodeState: it is writable for a time only; nil: it is not lent
	owned     bool     // by the monitor
	pins      int32
	quiesce   quiescence  // drains of this node + child edges whose node is quiesced
	counts    perm.Counts // over all parent edges
	applied   perm.Claim  // what the driver was last told (PermCommit)
	parents   list[Edge]  // newest first
	listed    item[Node]  // of Graph.published
	byMonitor item[Node]  // of Graph.owned
	rare      *nodeRare   // allocated when first needed, then kept
}

// nodeState is where a node is in its life: hidden -> published -> closing -> closed, or
// hidden -> closing -> closed.
type nodeState uint8

const (
	nodeHidden nodeState = iota
	nodePublished
	nodeClosing
	nodeClosed
)

// nodeRare is what few nodes have.
type nodeRare struct {
	blockers []*opBlocker // newest last
	drainer  drainerState
	held     bool          // somebody has a Hold
	closes   bool          // to be closed when that ends
	shut     chan struct{} // made when the driver begins to be closed, closed when that is done
}

// Name is the node name, unique among nodes and backends.
func (n *Node) Name() string { return n.name }

// Graph is the graph the node belongs to.
func (n *Node) Graph() *Graph { return n.g }

// Options are the generic options; the value is immutable, a reopen replaces it.
func (n *Node) Options() *Options { return n.opts.Load() }

// Driver is nil until SetDriver.
func (n *Node) Driver() Driver { return n.drv }

// DriverName is the QAPI name of the driver.
func (n *Node) DriverName() string { return n.opts.Load().DriverName }

// Kind is the kind of the driver.
func (n *Node) Kind() Kind { return n.opts.Load().Kind }

// ReadOnly tells whether the node refuses writes now; it may differ from Options().ReadOnly under
// auto-read-only.
func (n *Node) ReadOnly() bool { return n.readOnly.Load() }

// Size is the driver's size in bytes; 0 before SetDriver.
func (n *Node) Size() int64 {
	if n.drv == nil {
		return 0
	}
	return n.drv.Size()
}

// Describe implements Parent.
func (n *Node) Describe() string { return "node '" + n.name + "'" }

// GraphNode implements Parent.
func (n *Node) GraphNode() (types.XDbgBlockGraphNodeType, string) { return KindDriver, n.name }
