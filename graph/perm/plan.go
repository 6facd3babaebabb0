package perm

import (
	"errors"
	"fmt"
	"slices"
)

// Conflict: one user of a node needs what another does not share.
type Conflict struct {
	Node string
	// Perms are those needed by By, under the edge name ByRole, and not shared by Against.
	Perms                Perm
	By, ByRole           string
	Against, AgainstRole string
}

func (c *Conflict) Error() string {
	return fmt.Sprintf("Permission conflict on node '%s': permissions '%s' are both required by %s (uses node '%s' as '%s' child) and unshared by %s (uses node '%s' as '%s' child).",
		c.Node, c.Perms, c.By, c.Node, c.ByRole, c.Against, c.Node, c.AgainstRole)
}

// ReadOnlyError: somebody needs to write to a read-only node.
type ReadOnlyError struct {
	Node string
	// Becoming: the node is being made read-only under writers.
	Becoming bool
}

func (e *ReadOnlyError) Error() string {
	if e.Becoming {
		return fmt.Sprintf("Read-only block node '%s' cannot support read-write users", e.Node)
	}
	return "Block node is read-only"
}

// InactiveError: somebody needs to change a node whose image is left to others.
type InactiveError struct{ Perms Perm }

func (e *InactiveError) Error() string {
	return fmt.Sprintf("Permission '%s' unavailable on inactive node", e.Perms)
}

// errUnaligned: somebody needs to write but not to resize, and the size does not allow that.
var errUnaligned = errors.New("Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment")

// Delta is what a plan changes.
type Delta[N, E comparable] struct {
	// Order holds all nodes whose parents, state or cumulative claim were looked at, parents before
	// children.
	Order []N
	// Up is the cumulative claim of each of them.
	Up map[N]Claim
	// Claims are the new claims of edges, for those that change and those that are new.
	Claims map[E]Claim
}

// Plan settles the claims of all edges that the changes reach and checks every node touched,
// parents first; the first fault is returned (*Conflict, *InactiveError, *ReadOnlyError,
// Node.NoWriters, or that of an unaligned size). It costs what it touches. The Draft then shows the
// settled claims.
func (d *Draft[N, E]) Plan() (*Delta[N, E], error) {
	d.settle()
	order := d.order()
	out := &Delta[N, E]{Order: order, Up: make(map[N]Claim, len(order)), Claims: make(map[E]Claim, len(d.log))}
	for _, n := range order {
		if err := d.check(n); err != nil {
			return nil, err
		}
		out.Up[n] = d.nodes[n].counts.Claim()
	}
	for _, e := range d.log {
		s := d.edges[e]
		if !s.gone && (s.isNew || s.Claim != d.base.Edge(e).Claim) {
			out.Claims[e] = s.Claim
		}
	}
	return out, nil
}

// settle runs the claims down from the dirty nodes. The graph has no cycles, so the
// result does not depend on the order and the queue runs empty.
func (d *Draft[N, E]) settle() {
	queue := slices.Clone(d.dirty)
	queued := make(map[N]bool, len(queue))
	for _, n := range queue {
		queued[n] = true
	}
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		queued[n] = false
		s := d.node(n)
		up, state := s.counts.Claim(), s.state
		state.Idle = d.Orphan(n)
		for _, e := range s.kids {
			v := d.Edge(e)
			c := d.base.EdgeClaim(e, v, state, up)
			if d.Node(v.Node).ForceShare {
				c.Share = All
			}
			if c == v.Claim {
				continue
			}
			before := d.node(v.Node).counts.Claim()
			d.setClaim(e, d.edge(e), c)
			if d.nodes[v.Node].counts.Claim() != before && !queued[v.Node] {
				queued[v.Node] = true
				queue = append(queue, v.Node)
			}
		}
	}
}

// order sorts the touched nodes topologically: a parent before its children, and children
// in the order they were attached.
func (d *Draft[N, E]) order() []N {
	seen := make(map[N]bool, len(d.nodes))
	var rev []N
	var visit func(n N)
	visit = func(n N) {
		seen[n] = true
		for _, e := range d.nodes[n].kids {
			if c := d.Target(e); d.nodes[c] != nil && !seen[c] {
				visit(c)
			}
		}
		rev = append(rev, n)
	}
	for _, n := range d.dirty {
		if !seen[n] {
			visit(n)
		}
	}
	slices.Reverse(rev)
	return rev
}

// check applies the rules to n.
func (d *Draft[N, E]) check(n N) error {
	s := d.nodes[n]
	if s.counts.Conflict() {
		return d.conflict(n)
	}
	c := s.counts.Claim()
	if p := c.Need & Changes; p != 0 && s.state.Inactive {
		return &InactiveError{p}
	}
	if c.Need&(Write|WriteUnchanged) == 0 {
		return nil
	}
	if s.state.ReadOnly {
		return &ReadOnlyError{s.state.Name, !s.wasReadOnly}
	}
	if s.state.NoWriters != nil {
		return s.state.NoWriters
	}
	if s.state.Unaligned && c.Need&Resize == 0 {
		return errUnaligned
	}
	return nil
}

// conflict finds the first pair of parents that do not get along.
func (d *Draft[N, E]) conflict(n N) error {
	name := d.nodes[n].state.Name
	for a := range d.Parents(n) {
		va := d.Edge(a)
		if va.Claim.Share == All {
			continue
		}
		for b := range d.Parents(n) {
			vb := d.Edge(b)
			if p := vb.Claim.Need &^ va.Claim.Share; p != 0 && a != b {
				return &Conflict{name, p, d.base.Describe(b, vb), vb.Name, d.base.Describe(a, va), va.Name}
			}
		}
	}
	panic("perm: counts tell of a conflict that is not there")
}
