package graph

import (
	"context"
	"sync"
	"sync/atomic"

	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// RootSpec describes a root to be attached.
type RootSpec struct {
	// EdgeName is the name of its edge: "root" for backends and exports; jobs use "main node",
	// "source", "target", ...
	EdgeName string
	// Role of the edge; usually 0 for roots.
	Role perm.Role
	// Claim on the node.
	Claim perm.Claim
	// Kind and Name are its appearance in x-debug-query-block-graph; KindBackend also makes
	// its node "in use" for blockdev-del. The empty kind hides the root from that query.
	Kind types.XDbgBlockGraphNodeType
	Name string
	// Desc names it in conflicts; "" means "an unnamed block device" for the empty Name, else
	// "block device 'NAME'".
	Desc string
	// StayAtNode: ReplaceNode does not move this root (jobs).
	StayAtNode bool
	// Job marks the requests of background work.
	Job bool
	// AllowInactive: the node may become inactive although the root writes; then its requests that
	// change something fail with EPERM.
	AllowInactive bool
	// Resized is called when the size of what the root shows may have changed, also because it shows
	// another node. The graph's lock is held: it must not wait, nor call the graph. Nil: nobody
	// cares.
	Resized func()
	// Of comes and goes with the root (see Recorder); nil: the root is not recorded.
	Of *Record
	// Ctx is the context of its requests; nil means context.Background().
	Ctx context.Context
}

// Root is where requests enter the graph: a backend, an export, a job, internal work.
//
//	Begin/TryBegin -> gate open: in flight +1 -> unit of work (I/Os) -> End: in flight -1
//	                  gate closed: Begin waits, TryBegin is nil
type Root struct {
	g    *Graph
	spec RootSpec
	edge *Edge

	gate atomic.Int64 // units in flight | gateClosed
	pool sync.Pool    // of *blk.Req
	acct atomic.Pointer[Account]

	wait sync.Mutex // guards the signals below
	open signal     // the gate opens
	idle signal     // the last unit ends
	gone bool       // detached: Begin fails

	// Guarded by g.mu.
	quiesce  quiescence
	attached bool
	want     perm.Claim // what it claims while its node is active
	listed   item[Root] // of Graph.roots
}

// Edge is the root's edge to its node.
func (r *Root) Edge() *Edge { return r.edge }

// Node is the node the root is attached to.
func (r *Root) Node() *Node { return r.edge.Node() }

// Graph is the graph the root belongs to.
func (r *Root) Graph() *Graph { return r.g }

// Spec is the description the root was attached with.
func (r *Root) Spec() *RootSpec { return &r.spec }

// Describe implements Parent.
func (r *Root) Describe() string {
	switch {
	case r.spec.Desc != "":
		return r.spec.Desc
	case r.spec.Name == "":
		return "an unnamed block device"
	default:
		return "block device '" + r.spec.Name + "'"
	}
}

// GraphNode implements Parent.
func (r *Root) GraphNode() (types.XDbgBlockGraphNodeType, string) { return r.spec.Kind, r.spec.Name }
