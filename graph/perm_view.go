package graph

import (
	"iter"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// baseView is the installed graph as package perm sees it. Use under g.mu.
type baseView struct{}

var _ perm.View[*Node, *Edge] = baseView{}

func (baseView) Node(n *Node) perm.Node {
	o := n.opts.Load()
	s := perm.Node{Name: n.name, ReadOnly: n.readOnly.Load(), Inactive: n.inactive.Load(), NoWriters: n.noWriters,
		ForceShare: o.ForceShare}
	if n.drv != nil && !s.ReadOnly {
		a := n.io.drv.align
		s.Unaligned = a > blk.SectorSize && blk.AlignUp(n.drv.Size(), blk.SectorSize)%a != 0
	}
	return s
}

func (baseView) Edge(e *Edge) perm.Edge[*Node] {
	return perm.Edge[*Node]{Name: e.name, Role: e.role, Parent: e.pnode, Node: e.node.Load(), Claim: e.Claim()}
}

func (baseView) Children(n *Node) []*Edge { return n.kids.Load().all }

func (baseView) Parents(n *Node) iter.Seq[*Edge] { return n.parents.all() }

func (baseView) Counts(n *Node) perm.Counts { return n.counts }

func (baseView) EdgeClaim(e *Edge, v perm.Edge[*Node], parent perm.Node, up perm.Claim) perm.Claim {
	if p, ok := v.Parent.drv.(Permer); ok {
		c := p.EdgeClaim(e.name, e.role, up, parent.ReadOnly || parent.Inactive)
		if i, ok := p.(Idler); ok && parent.Idle {
			c = i.IdleClaim(e.name, c)
		}
		if parent.Inactive { // whatever it is for
			c.Need, c.Share = c.Need&^perm.Changes, c.Share|perm.Changes
		}
		return c
	}
	readOnly := parent.ReadOnly
	if c, ok := v.Parent.drv.(Checker); ok && c.Repairs() {
		readOnly = false
	}
	return perm.Default(e.role, up, !readOnly && !parent.Inactive, parent.Inactive)
}

func (baseView) Describe(e *Edge, _ perm.Edge[*Node]) string { return e.Parent().Describe() }
