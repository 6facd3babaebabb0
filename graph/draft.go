package graph

import (
	"fmt"
	"slices"

	"qblockd/graph/perm"
)

// txDraft is the graph as a Tx would leave it.
type txDraft struct {
	*perm.Draft[*Node, *Edge]
	prims   []func(*installer) // what install does, in order
	refs    map[*Node]*refs
	refd    []*Node              // the keys of refs in order
	again   map[*Node]bool       // tell the driver its claim in any case
	frozen  map[*Edge]*freeze    // in place of Edge.frozen
	opts    map[*Node]*Options   // in place of Node.opts
	lent    map[*Node]*Options   // in place of Node.lent
	wants   map[*Edge]perm.Claim // in place of Root.want
	edges   []*Edge              // attached, detached, retargeted
	drains  []*Node              // quiet during the commit
	roots   []*Root              // the same
	reserve []*Node              // further nodes to reserve
	links   []link               // new edges between nodes
}

// refs are changes of the references to a node other than parents.
type refs struct {
	owned, publish bool
	pins           int32 // to be added to the node's
}

// link is an edge between nodes that a committing Tx is about to make.
type link struct{ parent, child *Node }

func newTxDraft() *txDraft {
	d := &txDraft{
		refs:   map[*Node]*refs{},
		again:  map[*Node]bool{},
		frozen: map[*Edge]*freeze{},
		opts:   map[*Node]*Options{},
		lent:   map[*Node]*Options{},
		wants:  map[*Edge]perm.Claim{},
	}
	d.Draft = perm.NewDraft[*Node, *Edge](draftView{d: d})
	return d
}

// draftView is the graph as it is, but nodes that the draft discards claim nothing new: their
// driver may want what it could not get, which is why they are discarded.
type draftView struct {
	baseView
	d *txDraft
}

func (v draftView) EdgeClaim(e *Edge, x perm.Edge[*Node], parent perm.Node, up perm.Claim) perm.Claim {
	n := x.Parent
	if r := v.d.refs[n]; r != nil && n.state == nodeHidden && !r.publish && n.pins+r.pins <= 0 {
		return x.Claim
	}
	return v.baseView.EdgeClaim(e, x, parent, up)
}

func (d *txDraft) ref(n *Node) *refs {
	r := d.refs[n]
	if r == nil {
		r = &refs{owned: n.owned}
		d.refs[n] = r
		d.refd = append(d.refd, n)
	}
	return r
}

// eachHidden calls f for n and for the hidden nodes below it that still have their opener's pin.
func (d *txDraft) eachHidden(n *Node, f func(*Node)) {
	if n.state != nodeHidden || n.pins+d.ref(n).pins <= 0 {
		return
	}
	f(n)
	for _, e := range d.Children(n) {
		d.eachHidden(d.Target(e), f)
	}
}

// present refuses edges that are no part of the graph (any more).
func (d *txDraft) present(e *Edge) error {
	if d.Gone(e) || !e.attached && !slices.Contains(d.siblings(e), e) {
		return fmt.Errorf("The '%s' link of %s does not exist any more", e.name, e.Parent().Describe())
	}
	return nil
}

// siblings are the edges among which the not yet installed e must be found.
func (d *txDraft) siblings(e *Edge) []*Edge {
	if e.pnode != nil {
		return d.Children(e.pnode)
	}
	return slices.Collect(d.Parents(d.Target(e)))
}

// changeable is present for edges that must not be frozen either.
func (d *txDraft) changeable(e *Edge) error {
	if err := d.present(e); err != nil {
		return err
	}
	if d.isFrozen(e) {
		return fmt.Errorf("Cannot change frozen '%s' link from '%s' to '%s'", e.name, e.parentName(), d.Target(e).name)
	}
	return nil
}

// isFrozen tells whether the Tx may not change e.
func (d *txDraft) isFrozen(e *Edge) bool {
	if f, set := d.frozen[e]; set {
		return f != nil
	}
	return e.frozen != nil
}

// attach adds an edge below a node, or a root's if parent is nil.
func (d *txDraft) attach(e *Edge, parent, child *Node, c perm.Claim) error {
	if err := d.bothActive(e, child); err != nil {
		return err
	}
	err := d.Attach(e, perm.Edge[*Node]{Name: e.name, Role: e.role, Parent: parent, Node: child, Claim: c})
	if err != nil {
		return err
	}
	if parent != nil {
		d.drainEnd(e)
		d.links = append(d.links, link{parent, child})
	}
	d.edges = append(d.edges, e)
	d.prims = append(d.prims, func(in *installer) { in.link(e, child) }) // +checklocksignore: install calls it
	return nil
}

func (d *txDraft) detach(e *Edge) {
	d.drainEnd(e)
	d.Detach(e)
	d.edges = append(d.edges, e)
	d.prims = append(d.prims, func(in *installer) { in.unlink(e) }) // +checklocksignore: install calls it
}

func (d *txDraft) retarget(e *Edge, n *Node) error {
	if d.Target(e) == n {
		return nil
	}
	if err := d.bothActive(e, n); err != nil {
		return err
	}
	if err := d.Retarget(e, n); err != nil {
		return err
	}
	d.drainEnd(e)
	if e.pnode != nil {
		d.links = append(d.links, link{e.pnode, n})
	} else {
		d.SetClaim(e, d.rootClaim(e, n))
	}
	d.edges = append(d.edges, e)
	d.prims = append(d.prims, func(in *installer) { in.retarget(e, n) }) // +checklocksignore: install calls it
	return nil
}

func (d *txDraft) options(n *Node) *Options {
	if o := d.opts[n]; o != nil {
		return o
	}
	return n.opts.Load()
}

func (d *txDraft) setOptions(n *Node, o *Options) {
	d.opts[n] = o
	d.prims = append(d.prims, func(*installer) { n.opts.Store(o); n.Bump() })
	if d.lentOf(n) != nil {
		d.setLent(n, true)
	}
}

// lentOf is Node.lent of n.
func (d *txDraft) lentOf(n *Node) *Options {
	if o, set := d.lent[n]; set {
		return o
	}
	return n.lent
}

// setLent makes n, as it is to be, lent or no longer.
func (d *txDraft) setLent(n *Node, lent bool) {
	var o *Options
	if lent {
		own := *d.options(n)
		own.ReadOnly, own.Inherited.ReadOnly = true, new(true)
		o = &own
	}
	if o != d.lentOf(n) {
		d.lent[n] = o
		d.prims = append(d.prims, func(*installer) { n.lent = o })
	}
}

// drainEnd has the upper end of e drained: requests that use the edge come from there. A
// hidden node serves its opener alone, who may be inside a unit of work right now.
func (d *txDraft) drainEnd(e *Edge) {
	switch {
	case e.pnode != nil && e.pnode.state != nodeHidden:
		d.drains = append(d.drains, e.pnode)
	case e.root != nil && e.attached:
		d.roots = append(d.roots, e.root)
	}
}

func (d *txDraft) replaceNode(old, new *Node) error {
	if err := usable(new); err != nil {
		return err
	}
	below := map[*Node]bool{}
	for _, n := range (View{d}).nodesBelow(new) {
		below[n] = true
	}
	for _, e := range slices.Collect(d.Parents(old)) {
		if below[old] && e.keepsChild() {
			continue
		}
		if e.pnode != nil && below[e.pnode] || e.root != nil && e.root.spec.StayAtNode {
			continue
		}
		if d.isFrozen(e) {
			return fmt.Errorf("Cannot change '%s' link to '%s'", e.name, old.name)
		}
		if err := d.retarget(e, new); err != nil {
			return err
		}
	}
	return nil
}

func (e *Edge) keepsChild() bool {
	if e.pnode == nil {
		return false
	}
	_, ok := e.pnode.drv.(ChildKeeper)
	return ok
}

// unique are all of the lists, in order, each once.
func unique[T comparable](lists ...[]T) []T {
	l := slices.Concat(lists...)
	if len(l) < 2 {
		return l
	}
	seen := make(map[T]bool, len(l))
	return slices.DeleteFunc(l, func(x T) bool {
		again := seen[x]
		seen[x] = true
		return again
	})
}
