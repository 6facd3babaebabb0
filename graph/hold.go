package graph

import (
	"context"
	"slices"
	"sync"
)

// Hold is the right of one command, or of the end of one job, to look at and to change the metadata
// of nodes: their snapshots, bitmaps, sizes, headers and options. There is one at most at a node at
// a time. It is taken for all nodes at once, before the first look and before any transaction and
// drain, by somebody who has none, and released after the last write; so nobody waits for one while
// others wait for him. It keeps its nodes open: one that loses its last reference meanwhile is out
// of sight at once, but closed only when the Hold ends.
//
// Requests, queries and what only shows or steers a job need none.
type Hold struct {
	g       *Graph
	nodes   map[*Node]bool
	res     *reservation
	release sync.Once
}

// Hold reserves the nodes that look finds, with what their data lie in. look is asked before the
// wait and again after it, as nodes may have come and gone in between, until what it finds is held;
// then what it found the last time holds until Release. It takes no lock that is held elsewhere.
// Errors: those of look; the context's.
func (g *Graph) Hold(ctx context.Context, look func() ([]*Node, error)) (*Hold, error) {
	nodes, err := look()
	for err == nil {
		var h *Hold
		if h, err = g.hold(ctx, nodes); err != nil {
			break
		}
		if nodes, err = look(); err == nil && h.covers(nodes) {
			return h, nil
		}
		h.Release()
	}
	return nil, err
}

// HoldNodes is Hold of nodes that something keeps in the graph: those of a job.
func (g *Graph) HoldNodes(ctx context.Context, nodes ...*Node) (*Hold, error) {
	return g.Hold(ctx, func() ([]*Node, error) { return nodes, nil })
}

func (g *Graph) hold(ctx context.Context, nodes []*Node) (*Hold, error) {
	h := &Hold{g: g, nodes: map[*Node]bool{}}
	all := withStorage(nodes)
	for _, n := range all {
		h.nodes[n] = true
	}
	var err error
	if h.res, err = g.holds.acquire(ctx, all, g.stop); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		g.holds.release(h.res)
		return nil, errClosing
	}
	for _, n := range all {
		n.rareLocked().held = true // +checklocksignore: of the same graph
	}
	return h, nil
}

func (h *Hold) covers(nodes []*Node) bool {
	return !slices.ContainsFunc(withStorage(nodes), func(n *Node) bool { return !h.Has(n) })
}

// withStorage are the nodes and those that their data lie in, each once.
func withStorage(nodes []*Node) (l []*Node) {
	for _, n := range nodes {
		l = append(l, Now.storage(n, func(*Node) bool { return true })...)
	}
	return unique(l)
}

// Has tells whether n is one of the nodes.
func (h *Hold) Has(n *Node) bool { return h.nodes[n] }

// adopt adds a node that a transaction of the holder is about to publish. Nobody has looked for it
// yet, but for Graph.Close.
// +checklocks:h.g.mu
func (h *Hold) adopt(n *Node) {
	if h.g.holds.add(h.res, n) {
		h.nodes[n] = true
		n.rareLocked().held = true // +checklocksignore: of the same graph
	}
}

// Release ends the Hold and closes the nodes that were only kept by it, which blocks as long as
// their storage does. Only the first call does anything; a nil Hold has nothing to release.
func (h *Hold) Release() {
	if h == nil {
		return
	}
	h.release.Do(func() {
		var dying []*Node
		h.g.mu.Lock()
		for _, n := range h.res.nodes {
			n.rare.held = false
			if n.rare.closes {
				n.rare.closes = false
				dying = append(dying, n)
			}
		}
		h.g.mu.Unlock()
		for _, n := range dying {
			h.g.closeNode(n)
		}
		h.g.holds.release(h.res)
	})
}

// closeUnlessHeld closes a node in state closing, or leaves that to the end of the Hold that
// somebody has of it.
func (c *commit) closeUnlessHeld(n *Node) {
	c.g.mu.Lock()
	held := n.rare != nil && n.rare.held
	if held {
		n.rare.closes = true
	}
	c.g.mu.Unlock()
	if !held {
		c.g.closeNode(n)
	}
}

// MustHold is called where metadata are changed. Built with -tags invariants it panics if nobody
// holds n, though others could find it.
func (n *Node) MustHold() {
	if !invariantsOn {
		return
	}
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	if n.state != nodeHidden && (n.rare == nil || !n.rare.held) {
		panic("graph: metadata of node " + n.name + " are changed by somebody who does not hold it")
	}
}

// Under says which nodes whoever makes the Tx holds: Held finds no others. Those that the Tx
// publishes are held as well from then on.
func (tx *Tx) Under(h *Hold) { tx.hold = h }

// Held is Node of a node that is held, or that the Tx itself makes. One that came after the Hold
// was taken is passed over; then the Tx has Missed it.
func (tx *Tx) Held(name string) *Node {
	n := tx.Node(name)
	if n == nil || tx.hold == nil || tx.hold.Has(n) {
		return n
	}
	tx.g.mu.RLock()
	defer tx.g.mu.RUnlock()
	if n.state == nodeHidden {
		return n
	}
	tx.missed = true
	return nil
}

// Missed tells whether Held passed over a node: a new Hold would include it.
func (tx *Tx) Missed() bool { return tx.missed }
