package graph

import (
	"slices"

	"qblockd/graph/perm"
)

// installer makes the single changes of a commit, under g.mu.
type installer struct {
	g        *Graph
	reopened []*Node
}

// link adds e above child and among its parent's children.
// +checklocks:in.g.mu
func (in *installer) link(e *Edge, child *Node) {
	e.node.Store(child)
	e.attached = true
	if p := e.pnode; p != nil {
		p.kids.Store(makeKids(slices.Concat([]*Edge{e}, p.Children())))
		p.Bump()
	}
	in.above(e, child)
}

// unlink takes e out.
// +checklocks:in.g.mu
func (in *installer) unlink(e *Edge) {
	in.off(e)
	e.attached = false
	if p := e.pnode; p != nil {
		i := slices.Index(p.Children(), e)
		p.kids.Store(makeKids(slices.Delete(slices.Clone(p.Children()), i, i+1)))
		p.Bump()
	}
}

// retarget moves e above n.
// +checklocks:in.g.mu
func (in *installer) retarget(e *Edge, n *Node) {
	in.off(e)
	e.node.Store(n)
	in.above(e, n)
	switch {
	case e.pnode != nil:
		e.pnode.Bump()
		if e.showsSize() {
			showSizeLocked(e.pnode, func(*Node) {}) // +checklocksignore: of the same graph
		}
	case e.root.spec.Resized != nil:
		e.root.spec.Resized()
	}
}

// above puts e on top of n's parents.
// +checklocks:in.g.mu
func (in *installer) above(e *Edge, n *Node) {
	n.parents.insert(&e.above, e, n.parents.first)
	in.count(e, n, 1)
}

// off takes e away from there.
// +checklocks:in.g.mu
func (in *installer) off(e *Edge) {
	n := e.node.Load()
	n.parents.remove(&e.above)
	in.count(e, n, -1)
}

// count adds by (1 or -1) to what n counts of its parents; if n is quiet, so is e's parent.
// +checklocks:in.g.mu
func (in *installer) count(e *Edge, n *Node, by int32) {
	n.counts.Add(e.Claim(), by)
	if e.showsSize() {
		n.sizeSeen.Add(by)
	}
	if n.quiesce.quiet() {
		e.quiesceParentLocked(by)
	}
}

// showsSize tells whether the size of the node below is that of the parent: roots, filters and raw
// formats.
func (e *Edge) showsSize() bool {
	return e.root != nil || e.role&(perm.COW|perm.Metadata) == 0 && e.role&perm.Primary != 0
}

func (in *installer) setClaim(e *Edge, c perm.Claim) {
	n := e.node.Load()
	n.counts.Add(e.Claim(), -1)
	n.counts.Add(c, 1)
	e.claim.Store(packClaim(c))
}

// addRoot enters r, before its edge is linked, and opens its gate.
// +checklocks:in.g.mu
func (in *installer) addRoot(r *Root) {
	r.attached = true
	in.g.roots.insert(&r.listed, r, in.g.roots.first)
	if !r.quiesce.quiet() {
		r.openGate()
	}
}

// removeRoot takes r out for good.
// +checklocks:in.g.mu
func (in *installer) removeRoot(r *Root) {
	r.attached = false
	in.g.roots.remove(&r.listed)
	r.shut()
}

// insertPublishedLocked puts n where its age belongs; usually at the head or close to it.
// +checklocks:g.mu
func (g *Graph) insertPublishedLocked(n *Node) {
	at := g.published.first
	for at != nil && at.of.seq > n.seq {
		at = at.next
	}
	g.published.insert(&n.listed, n, at)
}

// +checklocks:g.mu
func (g *Graph) setOwnedLocked(n *Node, owned bool) {
	if n.owned == owned {
		return
	}
	if n.owned = owned; owned {
		g.owned.insert(&n.byMonitor, n, nil)
	} else {
		g.owned.remove(&n.byMonitor)
	}
}
