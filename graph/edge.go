package graph

import (
	"sync/atomic"

	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// The kinds of x-debug-query-block-graph.
const (
	KindBackend types.XDbgBlockGraphNodeType = "block-backend"
	KindJob     types.XDbgBlockGraphNodeType = "block-job"
	KindDriver  types.XDbgBlockGraphNodeType = "block-driver"
)

// Parent is who an edge belongs to: a *Node or a *Root.
type Parent interface {
	// Describe names it in conflicts: "node 'X'", "an unnamed block device", "block job 'j'".
	Describe() string
	// GraphNode is its appearance in x-debug-query-block-graph.
	GraphNode() (kind types.XDbgBlockGraphNodeType, name string)
}

// Edge is the link from a parent down to a node. Name, role and parent never change; the
// node is swapped only while the parent is drained, so requests read it without locks.
type Edge struct {
	name  string
	role  perm.Role
	pnode *Node // the parent if it is a node
	root  *Root // the parent if it is a root

	node  atomic.Pointer[Node]
	claim atomic.Uint32 // Need | Share<<8

	// Guarded by g.mu.
	frozen   *freeze // who forbids changes, or nil
	attached bool
	above    item[Edge] // of node's parents
}

func packClaim(c perm.Claim) uint32 { return uint32(c.Need) | uint32(c.Share)<<8 }

// ChildName is the name of the edge: "file", "backing", "root", ...; it implements blk.Child.
func (e *Edge) ChildName() string { return e.name }

// Role is what the parent uses the node for.
func (e *Edge) Role() perm.Role { return e.role }

// Parent is the *Node or *Root above.
func (e *Edge) Parent() Parent {
	if e.root != nil {
		return e.root
	}
	return e.pnode
}

// ParentNode is the parent if it is a node, else nil.
func (e *Edge) ParentNode() *Node { return e.pnode }

// ParentRoot is the parent if it is a root, else nil.
func (e *Edge) ParentRoot() *Root { return e.root }

// Node is the node below. Within a unit of work it does not change; elsewhere it may change at any
// time.
func (e *Edge) Node() *Node { return e.node.Load() }

// Claim is what the parent takes and shares on the node now.
func (e *Edge) Claim() perm.Claim {
	c := e.claim.Load()
	return perm.Claim{Need: perm.Perm(c), Share: perm.Perm(c >> 8)}
}

// parentName names the parent in sentences that expect a node name.
func (e *Edge) parentName() string {
	if e.pnode != nil {
		return e.pnode.name
	}
	return e.root.spec.Name
}
