package perm

import (
	"fmt"
	"iter"
	"slices"
)

// Node is what the rules need to know of a node.
type Node struct {
	Name     string
	ReadOnly bool
	// Inactive nodes neither write nor hold locks; their images may be written by others.
	Inactive bool
	// NoWriters is why nobody may write to it although it is not read-only; nil: they may.
	NoWriters error
	// ForceShare: whoever uses this node shares everything on it.
	ForceShare bool
	// Unaligned: the size is no multiple of the request alignment, so that writing takes Resize
	// too.
	Unaligned bool
	// Idle: it has no parents. A Draft tells EdgeClaim so; a View need not.
	Idle bool
}

// Edge is a link from Parent (the zero N: a root) down to Node.
type Edge[N comparable] struct {
	Name   string
	Role   Role
	Parent N
	Node   N
	Claim  Claim
}

// View is a graph to plan on. The answers must not change while a Draft is in use.
type View[N, E comparable] interface {
	Node(n N) Node
	Edge(e E) Edge[N]
	// Children and Parents of a node, newest first. The slice is not modified.
	Children(n N) []E
	Parents(n N) iter.Seq[E]
	Counts(n N) Counts
	// EdgeClaim is the claim of the node d.Parent on its child e when its own parents claim up.
	EdgeClaim(e E, d Edge[N], parent Node, up Claim) Claim
	// Describe names the parent of e for a conflict.
	Describe(e E, d Edge[N]) string
}

// Draft is a View with changes on top. It is itself a View.
type Draft[N, E comparable] struct {
	base  View[N, E]
	nodes map[N]*draftNode[E]
	edges map[E]*draftEdge[N]
	dirty []N // where the plan starts
	log   []E // edges in order of first change

	// Few: there are at most MaxDepth nodes, so that none can be too deep. Its user may know.
	Few bool
}

type draftEdge[N comparable] struct {
	Edge[N]
	gone, isNew bool
}

type draftNode[E comparable] struct {
	state       Node
	wasReadOnly bool
	dirty       bool // in Draft.dirty
	kids        []E
	added       []E // parents, newest last
	removed     map[E]bool
	counts      Counts
}

// NewDraft is a Draft without changes.
func NewDraft[N, E comparable](base View[N, E]) *Draft[N, E] {
	return &Draft[N, E]{base: base, nodes: map[N]*draftNode[E]{}, edges: map[E]*draftEdge[N]{}}
}

// CycleError: an edge would make the graph cyclic.
type CycleError struct{ Child, Role, Parent string }

func (e *CycleError) Error() string {
	return fmt.Sprintf("Making '%s' a %s child of '%s' would create a cycle", e.Child, e.Role, e.Parent)
}

func (d *Draft[N, E]) node(n N) *draftNode[E] {
	s := d.nodes[n]
	if s == nil {
		st := d.base.Node(n)
		s = &draftNode[E]{state: st, wasReadOnly: st.ReadOnly, kids: d.base.Children(n), counts: d.base.Counts(n)}
		d.nodes[n] = s
	}
	return s
}

func (d *Draft[N, E]) edge(e E) *draftEdge[N] {
	s := d.edges[e]
	if s == nil {
		s = &draftEdge[N]{Edge: d.base.Edge(e)}
		d.edges[e] = s
		d.log = append(d.log, e)
	}
	return s
}

// Touch makes the plan settle n again, as after a change of something that EdgeClaim looks at.
func (d *Draft[N, E]) Touch(n N) {
	if s := d.node(n); !s.dirty {
		s.dirty = true
		d.dirty = append(d.dirty, n)
	}
}

// Attach adds an edge. Errors: *CycleError, *DepthError. The claim of an edge below a node is
// settled by Plan.
func (d *Draft[N, E]) Attach(e E, v Edge[N]) error {
	var zero N
	if v.Parent != zero {
		if err := d.checkLink(v.Parent, v.Name, v.Node); err != nil {
			return err
		}
		p := d.node(v.Parent)
		p.kids = append([]E{e}, p.kids...)
		v.Claim = Unused
		d.Touch(v.Parent)
	}
	d.edges[e] = &draftEdge[N]{Edge: v, isNew: true}
	d.log = append(d.log, e)
	d.addParent(v.Node, e, v.Claim)
	return nil
}

func (d *Draft[N, E]) addParent(n N, e E, c Claim) {
	s := d.node(n)
	s.added = append(s.added, e)
	s.counts.Add(c, 1)
	d.Touch(n)
}

func (d *Draft[N, E]) removeParent(n N, e E, c Claim) {
	s := d.node(n)
	if i := slices.Index(s.added, e); i >= 0 {
		s.added = slices.Delete(slices.Clone(s.added), i, i+1)
	} else {
		if s.removed == nil {
			s.removed = map[E]bool{}
		}
		s.removed[e] = true
	}
	s.counts.Add(c, -1)
	d.Touch(n)
}

// Detach removes an edge.
func (d *Draft[N, E]) Detach(e E) {
	var zero N
	s := d.edge(e)
	if s.gone {
		panic("perm: edge detached twice")
	}
	s.gone = true
	if s.Parent != zero {
		p := d.node(s.Parent)
		p.kids = slices.DeleteFunc(slices.Clone(p.kids), func(x E) bool { return x == e })
		d.Touch(s.Parent)
	}
	d.removeParent(s.Node, e, s.Claim)
}

// Retarget makes e lead to n. Errors as those of Attach.
func (d *Draft[N, E]) Retarget(e E, n N) error {
	var zero N
	s := d.edge(e)
	if s.Node == n {
		return nil
	}
	if s.Parent != zero {
		if err := d.checkLink(s.Parent, s.Name, n); err != nil {
			return err
		}
	}
	d.removeParent(s.Node, e, s.Claim)
	s.Node = n
	d.addParent(n, e, s.Claim)
	if s.Parent != zero {
		d.Touch(s.Parent)
	}
	return nil
}

// SetClaim changes the claim of a root's edge.
func (d *Draft[N, E]) SetClaim(e E, c Claim) {
	s := d.edge(e)
	d.setClaim(e, s, c)
	d.Touch(s.Node)
}

func (d *Draft[N, E]) setClaim(e E, s *draftEdge[N], c Claim) {
	k := &d.node(s.Node).counts
	k.Add(s.Claim, -1)
	k.Add(c, 1)
	s.Claim = c
}

// SetNode changes the state of n.
func (d *Draft[N, E]) SetNode(n N, st Node) {
	d.node(n).state = st
	d.Touch(n)
}

// Reaches tells whether to is from or below it.
func (d *Draft[N, E]) Reaches(from, to N) bool {
	if from == to {
		return true
	}
	if d.Orphan(to) {
		return false // it is below nothing: the usual case costs nothing
	}
	seen := map[N]bool{from: true}
	stack := []N{from}
	for len(stack) > 0 {
		n := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, e := range d.Children(n) {
			c := d.Target(e)
			if c == to {
				return true
			}
			if !seen[c] {
				seen[c] = true
				stack = append(stack, c)
			}
		}
	}
	return false
}

// Orphan tells whether n has no parents.
func (d *Draft[N, E]) Orphan(n N) bool {
	for range d.Parents(n) {
		return false
	}
	return true
}

// Target is the node below e.
func (d *Draft[N, E]) Target(e E) N {
	if s := d.edges[e]; s != nil {
		return s.Node
	}
	return d.base.Edge(e).Node
}

// Gone tells whether the Draft detaches e.
func (d *Draft[N, E]) Gone(e E) bool { s := d.edges[e]; return s != nil && s.gone }

// Node implements View.
func (d *Draft[N, E]) Node(n N) Node {
	if s := d.nodes[n]; s != nil {
		return s.state
	}
	return d.base.Node(n)
}

// Edge implements View.
func (d *Draft[N, E]) Edge(e E) Edge[N] {
	if s := d.edges[e]; s != nil {
		return s.Edge
	}
	return d.base.Edge(e)
}

// Children implements View.
func (d *Draft[N, E]) Children(n N) []E {
	if s := d.nodes[n]; s != nil {
		return s.kids
	}
	return d.base.Children(n)
}

// Parents implements View.
func (d *Draft[N, E]) Parents(n N) iter.Seq[E] {
	s := d.nodes[n]
	if s == nil {
		return d.base.Parents(n)
	}
	return func(yield func(E) bool) {
		for _, e := range slices.Backward(s.added) {
			if !yield(e) {
				return
			}
		}
		for e := range d.base.Parents(n) {
			if !s.removed[e] && !yield(e) {
				return
			}
		}
	}
}

// Counts implements View.
func (d *Draft[N, E]) Counts(n N) Counts {
	if s := d.nodes[n]; s != nil {
		return s.counts
	}
	return d.base.Counts(n)
}

// EdgeClaim implements View.
func (d *Draft[N, E]) EdgeClaim(e E, v Edge[N], parent Node, up Claim) Claim {
	return d.base.EdgeClaim(e, v, parent, up)
}

// Describe implements View.
func (d *Draft[N, E]) Describe(e E, v Edge[N]) string { return d.base.Describe(e, v) }
