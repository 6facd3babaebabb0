package graph

import (
	"slices"

	"qblockd/graph/perm"
)

// View is the graph below nodes, as it is (Now) or as a Tx would leave it (Tx.View). All chains are
// walked by its methods. What it shows of the graph as it is may change at any time, unless the
// caller holds it still.
type View struct{ shape }

// shape is what a View looks at.
type shape interface {
	kidsOf(n *Node) *kids
	// Target is the node below e.
	Target(e *Edge) *Node
}

// Now is the View of the graph as it is.
var Now = View{present{}}

type present struct{}

func (present) kidsOf(n *Node) *kids { return n.kids.Load() }

// Target implements shape.
func (present) Target(e *Edge) *Node { return e.Node() }

// kidsOf implements shape.
func (d *txDraft) kidsOf(n *Node) *kids { return makeKids(d.Children(n)) }

// planned is the shape that a Tx would leave.
type planned struct{ tx *Tx }

func (p planned) kidsOf(n *Node) (k *kids) {
	k = &noKids
	p.tx.read(func(d *txDraft) { k = d.kidsOf(n) })
	return k
}

// Target implements shape.
func (p planned) Target(e *Edge) (n *Node) {
	p.tx.read(func(d *txDraft) { n = d.Target(e) })
	return n
}

// kids are a node's edges downwards, immutable.
type kids struct {
	all                     []*Edge // newest first
	file, backing, filtered *Edge
}

var noKids kids

// makeKids finds the special ones among a node's children.
func makeKids(all []*Edge) *kids {
	k := &kids{all: all}
	for _, e := range all {
		// raw's file has the filtered role for its claims, but raw is no filter: it ends a chain.
		if e.role&perm.Filtered != 0 && e.pnode.Kind() == Filter {
			k.filtered = e
		}
		if e.role&perm.COW != 0 {
			k.backing = e
		} else if e.role&perm.Primary != 0 {
			k.file = e
		}
	}
	return k
}

// chain is the edge that a backing chain follows.
func (k *kids) chain() *Edge {
	if k.filtered != nil {
		return k.filtered
	}
	return k.backing
}

func (k *kids) named(name string) *Edge {
	for _, e := range k.all {
		if e.name == name {
			return e
		}
	}
	return nil
}

// Children are the edges below n, newest first; the slice is immutable.
func (v View) Children(n *Node) []*Edge { return v.kidsOf(n).all }

// Child is the edge of that name below n, or nil.
func (v View) Child(n *Node, name string) *Edge { return v.kidsOf(n).named(name) }

// File is the primary child of n, or nil.
func (v View) File(n *Node) *Edge { return v.kidsOf(n).file }

// Backing is the COW child of n, or nil.
func (v View) Backing(n *Node) *Edge { return v.kidsOf(n).backing }

// FilteredChild is the child whose data the filter n presents as its own, or nil.
func (v View) FilteredChild(n *Node) *Edge { return v.kidsOf(n).filtered }

// FilterOrCOWChild is FilteredChild or Backing: the edge that a backing chain follows. Nil at the
// end of the chain.
func (v View) FilterOrCOWChild(n *Node) *Edge { return v.kidsOf(n).chain() }

// below is the node at the other end of e, or nil.
func (v View) below(e *Edge) *Node {
	if e == nil {
		return nil
	}
	return v.Target(e)
}

// SkipFilters is the first node from n downwards that is no filter.
func (v View) SkipFilters(n *Node) *Node {
	for n.Kind() == Filter {
		below := v.below(v.FilteredChild(n))
		if below == nil {
			break
		}
		n = below
	}
	return n
}

// SkipImplicitFilters is the first node from n downwards that is no implicit filter.
func (v View) SkipImplicitFilters(n *Node) *Node {
	for n.Options().Implicit && v.FilteredChild(n) != nil {
		n = v.below(v.FilteredChild(n))
	}
	return n
}

// Below is the node below n in its chain of filters and backing files, or nil; nil for nil.
func (v View) Below(n *Node) *Node {
	if n == nil {
		return nil
	}
	return v.below(v.FilterOrCOWChild(n))
}

// Chain are top and the nodes below it, as far as filters and backing files go, down to end, which
// is none of them; nil is the end of the chain.
func (v View) Chain(top, end *Node) (l []*Node) {
	for n := top; n != nil && n != end; n = v.Below(n) {
		l = append(l, n)
	}
	return l
}

// InChain tells whether n is top or below it, as far as filters and backing files go.
func (v View) InChain(top, n *Node) bool { return slices.Contains(v.Chain(top, nil), n) }

// BackingChainNext is the next image of the chain below n, filters left out: what lies below the
// backing link of the first node that is no filter; nil at its end.
func (v View) BackingChainNext(n *Node) *Node {
	if n = v.below(v.Backing(v.SkipFilters(n))); n == nil {
		return nil
	}
	return v.SkipFilters(n)
}

// Overlay is the image in the chain from top downwards that has n, or a filter on n, as its backing
// file; nil if there is none. With n nil it is the last image of the chain.
func (v View) Overlay(top, n *Node) *Node {
	if n != nil {
		n = v.SkipFilters(n)
	}
	for top = v.SkipFilters(top); top != nil; {
		below := v.BackingChainNext(top)
		if below == n {
			return top
		}
		top = below
	}
	return nil
}

// WithFiles are n and the files below it that have their read-only-ness from it: those that nobody
// named for themselves.
func (v View) WithFiles(n *Node) []*Node {
	return v.storage(n, func(f *Node) bool { return f.ReadOnly() == n.ReadOnly() && !f.MonitorOwned() })
}

// storage are n and the nodes that its own data and metadata lie in, down to those that count.
func (v View) storage(n *Node, counts func(*Node) bool) []*Node {
	const stored = perm.Data | perm.Metadata
	l := []*Node{n}
	for i := 0; i < len(l); i++ {
		k := v.kidsOf(l[i])
		for _, e := range k.all {
			// What else a filter has is not its own.
			if e != k.file && (l[i].Kind() != Format || e.role&stored == 0) {
				continue
			}
			if f := v.Target(e); counts(f) {
				l = append(l, f)
			}
		}
	}
	return l
}

// Instant tells whether n only leads to nodes whose requests never wait for anything.
func (v View) Instant(n *Node) bool {
	return !slices.ContainsFunc(v.nodesBelow(n), func(k *Node) bool {
		return len(v.Children(k)) == 0 && !k.Caps().Instant
	})
}

// Remote tells whether requests of n can lead over a network.
func (v View) Remote(n *Node) bool {
	return slices.ContainsFunc(v.nodesBelow(n), func(k *Node) bool { return k.Caps().Remote })
}

// nodesBelow are n and all nodes below it, each once.
func (v View) nodesBelow(n *Node) []*Node {
	l, seen := []*Node{n}, map[*Node]bool{n: true}
	for i := 0; i < len(l); i++ {
		for _, e := range v.Children(l[i]) {
			if k := v.Target(e); !seen[k] {
				seen[k] = true
				l = append(l, k)
			}
		}
	}
	return l
}

// NodesBelow are n and all nodes below it.
func (n *Node) NodesBelow() []*Node {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return Now.nodesBelow(n)
}

// Children are the edges downwards, newest first; the slice is immutable.
func (n *Node) Children() []*Edge { return n.kids.Load().all }

// Child is the edge downwards with that name, or nil.
func (n *Node) Child(name string) *Edge { return n.kids.Load().named(name) }

// File is the primary child, or nil.
func (n *Node) File() *Edge { return n.kids.Load().file }

// Backing is the COW child, or nil.
func (n *Node) Backing() *Edge { return n.kids.Load().backing }

// FilteredChild is the child whose data a filter presents as its own, or nil.
func (n *Node) FilteredChild() *Edge { return n.kids.Load().filtered }

// SkipFilters is the first node from n downwards that is no filter.
func (n *Node) SkipFilters() *Node { return Now.SkipFilters(n) }
