package graph

import (
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
	if e.pnode != nil {
		k := e.pnode.kids.Load()
		all := make([]*Edge, 0, len(k.all)+1)
		e.pnode.setKids(append(append(all, e), k.all...))
		e.pnode.Bump()
	}
	in.above(e, child)
}

// unlink takes e out.
// +checklocks:in.g.mu
func (in *installer) unlink(e *Edge) {
	in.off(e)
	e.attached = false
	if e.pnode != nil {
		k := e.pnode.kids.Load()
		all := make([]*Edge, 0, len(k.all))
		for _, x := range k.all {
			if x != e {
				all = append(all, x)
			}
		}
		e.pnode.setKids(all)
		e.pnode.Bump()
	}
}

// retarget moves e above n.
// +checklocks:in.g.mu
func (in *installer) retarget(e *Edge, n *Node) {
	in.off(e)
	e.node.Store(n)
	in.above(e, n)
	if e.pnode != nil {
		e.pnode.Bump()
	}
}

// above puts e on top of n's parents; if n is quiet, so becomes e's parent.
func (in *installer) above(e *Edge, n *Node) {
	n.parents.push(e)
	n.counts.Add(e.Claim(), 1)
	if e.role&perm.COW != 0 {
		n.cowParents++
	}
	if e.showsSize() {
		n.sizeSeen.Add(1)
	}
	if n.quiesce > 0 {
		e.quiesceParentLocked(1)
	}
}

func (in *installer) off(e *Edge) {
	n := e.node.Load()
	n.parents.remove(e)
	n.counts.Add(e.Claim(), -1)
	if e.role&perm.COW != 0 {
		n.cowParents--
	}
	if e.showsSize() {
		n.sizeSeen.Add(-1)
	}
	if n.quiesce > 0 {
		e.quiesceParentLocked(-1)
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
	r.next = in.g.roots
	if r.next != nil {
		r.next.prev = r
	}
	in.g.roots = r
	if r.quiesce == 0 {
		r.openGate()
	}
}

// removeRoot takes r out for good.
// +checklocks:in.g.mu
func (in *installer) removeRoot(r *Root) {
	r.attached = false
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		in.g.roots = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	}
	r.prev, r.next = nil, nil
	r.shut()
}

// setKids installs the children, newest first.
func (n *Node) setKids(all []*Edge) { n.kids.Store(makeKids(all)) }

// insertPublished puts n where its age belongs; usually at the head or close to it.
// +checklocks:g.mu
func (g *Graph) insertPublishedLocked(n *Node) {
	var prev *Node
	next := g.head
	for next != nil && next.seq > n.seq {
		prev, next = next, next.next
	}
	n.prev, n.next = prev, next
	if prev != nil {
		prev.next = n
	} else {
		g.head = n
	}
	if next != nil {
		next.prev = n
	}
	g.published++
}

// +checklocks:g.mu
func (g *Graph) removePublishedLocked(n *Node) {
	if n.prev != nil {
		n.prev.next = n.next
	} else {
		g.head = n.next
	}
	if n.next != nil {
		n.next.prev = n.prev
	}
	n.prev, n.next = nil, nil
	g.published--
}

// +checklocks:g.mu
func (g *Graph) setOwnedLocked(n *Node, owned bool) {
	if n.owned == owned {
		return
	}
	n.owned = owned
	if owned {
		n.mprev, n.mnext = g.mtail, nil
		if g.mtail != nil {
			g.mtail.mnext = n
		} else {
			g.mhead = n
		}
		g.mtail = n
		return
	}
	if n.mprev != nil {
		n.mprev.mnext = n.mnext
	} else {
		g.mhead = n.mnext
	}
	if n.mnext != nil {
		n.mnext.mprev = n.mprev
	} else {
		g.mtail = n.mprev
	}
	n.mprev, n.mnext = nil, nil
}
