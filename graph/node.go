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
	failed   atomic.Bool          // see Fail
	kids     atomic.Pointer[kids] // replaced under g.mu, read anywhere; changes only while the node is drained

	infoGen atomic.Uint64 // see InfoGeneration

	sizeSeen atomic.Int32 // parent edges with Edge.showsSize; written under g.mu

	io ioState // the data plane's part

	// Guarded by g.mu from here.
	state      nodeState
	inactive   bool
	owned      bool // by the monitor
	pins       int32
	quiesce    int32 // drains of this node + child edges whose node is quiesced
	cowParents int32
	counts     perm.Counts // over all parent edges
	applied    perm.Claim  // what the driver was last told (PermCommit)
	parents    edgeList    // newest first
	prev, next *Node       // g's list of published nodes, newest first
	mprev      *Node       // g's list of monitor-owned nodes
	mnext      *Node
	rare       *nodeRare // allocated when first needed, then kept

	treeGen, treeEpoch uint64 // memo of TreeGeneration, guarded by g.genMu
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
	blockers []*opBlocker  // newest last
	hold     int32         // drains that told the driver's Drainer to let go
	hook     hookState     // calls of the driver's Drainer
	held     bool          // somebody has a Hold
	closes   bool          // to be closed when that ends
	shut     chan struct{} // made when the driver begins to be closed, closed when that is done
}

// kids are a node's edges downwards, immutable.
type kids struct {
	all                     []*Edge // newest first
	file, backing, filtered *Edge
}

var noKids kids

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

// ReadOnly tells whether the node refuses writes now; it may differ from Options().ReadOnly under auto-read-only.
func (n *Node) ReadOnly() bool { return n.readOnly.Load() }

// Implicit nodes were inserted by a job, not asked for by the user.
func (n *Node) Implicit() bool { return n.opts.Load().Implicit }

// Size is the driver's size in bytes; 0 before SetDriver.
func (n *Node) Size() int64 {
	if n.drv == nil {
		return 0
	}
	return n.drv.Size()
}

// Children are the edges downwards, newest first; the slice is immutable.
func (n *Node) Children() []*Edge { return n.kids.Load().all }

// Child is the edge downwards with that name, or nil.
func (n *Node) Child(name string) *Edge {
	for _, e := range n.kids.Load().all {
		if e.name == name {
			return e
		}
	}
	return nil
}

// File is the primary child, or nil.
func (n *Node) File() *Edge { return n.kids.Load().file }

// Backing is the COW child, or nil.
func (n *Node) Backing() *Edge { return n.kids.Load().backing }

// FilteredChild is the child whose data a filter presents as its own, or nil.
func (n *Node) FilteredChild() *Edge { return n.kids.Load().filtered }

// FilterOrCOWChild is FilteredChild or Backing: the edge a backing chain follows. Nil at the end of the chain.
func (n *Node) FilterOrCOWChild() *Edge { return n.kids.Load().chain() }

// SkipFilters is the first node from n downwards that is no filter.
func (n *Node) SkipFilters() *Node {
	for n.Kind() == Filter {
		e := n.FilteredChild()
		if e == nil {
			break
		}
		n = e.Node()
	}
	return n
}

// SkipImplicitFilters is the first node from n downwards that is no implicit filter.
func (n *Node) SkipImplicitFilters() *Node {
	for n.Implicit() && n.Kind() == Filter {
		e := n.FilteredChild()
		if e == nil {
			break
		}
		n = e.Node()
	}
	return n
}

// BackingChainNext is the next node of the backing chain below n: what lies below the backing link of the first node that is no filter, without filters itself;
// nil at its end.
func (n *Node) BackingChainNext() *Node {
	e := n.SkipFilters().Backing()
	if e == nil {
		return nil
	}
	return e.Node().SkipFilters()
}

// Describe implements Parent.
func (n *Node) Describe() string { return "node '" + n.name + "'" }

// GraphNode implements Parent.
func (n *Node) GraphNode() (types.XDbgBlockGraphNodeType, string) { return KindDriver, n.name }
