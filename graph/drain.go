package graph

import (
	"context"
	"slices"
	"sync"
	"time"

	"qblockd/events/panics"
)

// quietPoll is how often a Drainer is asked whether it is quiet.
const quietPoll = 2 * time.Millisecond

// drain is a set of nodes and roots held quiet.
type drain struct {
	g     *Graph
	nodes []*Node
	roots []*Root
	// What has to become quiet, found when the drain began.
	gates    []*Root
	drainers []*Node // nodes whose Drainer was told to let go
}

// Drain closes the gates of all roots that reach the nodes and waits until their units of work are
// over and every Drainer is quiet. Nested drains count; each undrain must be called once. On error
// (the context's) nothing is drained. Not for use inside a unit of work.
func (g *Graph) Drain(ctx context.Context, nodes ...*Node) (undrain func(), err error) {
	d := g.beginDrain(nodes, nil)
	if err := d.wait(ctx); err != nil {
		d.end()
		return nil, err
	}
	return d.end, nil
}

// beginDrain is beginDrainLocked for those who do not hold g.mu.
func (g *Graph) beginDrain(nodes []*Node, roots []*Root) *drain {
	defer panics.Fatal("the drains of the graph")
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.beginDrainLocked(nodes, roots)
}

// beginDrainLocked closes the gates; wait must follow without g.mu, end in any case.
// +checklocks:g.mu
func (g *Graph) beginDrainLocked(nodes []*Node, roots []*Root) *drain {
	d := &drain{g: g, nodes: nodes, roots: roots}
	d.quiesceLocked(1)         // +checklocksignore: of the same graph
	above := d.collectLocked() // +checklocksignore: of the same graph
	if g.drainers.Load() > 0 {
		d.addDrainersLocked(above) // +checklocksignore: of the same graph
	}
	return d
}

// quiesceLocked adds by (1 or -1) reasons for the nodes and roots to be quiet.
// +checklocks:d.g.mu
func (d *drain) quiesceLocked(by int32) {
	for _, n := range d.nodes {
		d.g.quiesceLocked(n, by)
	}
	for _, r := range d.roots {
		r.quiesceLocked(by)
	}
}

// collectLocked finds the roots that reach the drained nodes and returns all nodes on the way.
// +checklocksread:d.g.mu
func (d *drain) collectLocked() map[*Node]bool {
	seen := make(map[*Node]bool, len(d.nodes))
	seenRoot := make(map[*Root]bool, len(d.roots))
	root := func(r *Root) {
		if !seenRoot[r] {
			seenRoot[r] = true
			d.gates = append(d.gates, r)
		}
	}
	for _, r := range d.roots {
		root(r)
	}
	stack := append([]*Node(nil), d.nodes...)
	for len(stack) > 0 {
		n := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if seen[n] {
			continue
		}
		seen[n] = true
		for e := range n.parents.all() {
			if e.root != nil {
				root(e.root)
			} else {
				stack = append(stack, e.pnode)
			}
		}
	}
	return seen
}

// addDrainersLocked finds every Drainer that a unit of work to be waited for may be stuck in: those
// below the roots, and above and at the drained nodes.
// +checklocks:d.g.mu
func (d *drain) addDrainersLocked(seen map[*Node]bool) {
	var stack []*Node
	for n := range seen {
		stack = append(stack, n)
		seen[n] = false // not yet gone down from
	}
	for _, r := range d.gates {
		stack = append(stack, r.edge.Node())
	}
	for len(stack) > 0 {
		n := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if seen[n] {
			continue
		}
		seen[n] = true
		if _, ok := n.drv.(Drainer); ok {
			d.drainers = append(d.drainers, n)
			n.rareLocked().drainer.drains++ // +checklocksignore: of the same graph
		}
		for _, e := range n.kids.Load().all {
			stack = append(stack, e.Node())
		}
	}
}

// quiescence counts the reasons for a node or root to be quiet. Guarded by Graph.mu.
type quiescence int32

func (q quiescence) quiet() bool { return q > 0 }

// add adds by (1 or -1) reasons for p to be quiet, and tells whether there are some now and were
// none before, or the other way round.
func (q *quiescence) add(p Parent, by int32) (changed bool) {
	was := q.quiet()
	if *q += quiescence(by); *q < 0 {
		panic("graph: " + p.Describe() + " undrained too often")
	}
	return was != q.quiet()
}

// quiesceLocked adds by reasons for n to be quiet and passes a change on to its parents.
// +checklocks:g.mu
func (g *Graph) quiesceLocked(n *Node, by int32) {
	if n.quiesce.add(n, by) {
		for e := range n.parents.all() {
			e.quiesceParentLocked(by)
		}
	}
}

// quiesceParentLocked passes a change of the node below on to the edge's parent: a root's gate is
// closed while there is a reason. Graph.mu is held.
func (e *Edge) quiesceParentLocked(by int32) {
	if e.root != nil {
		e.root.quiesceLocked(by)
	} else {
		e.pnode.g.quiesceLocked(e.pnode, by) // +checklocksignore: of the same graph
	}
}

// quiesceLocked is that of a root. Graph.mu is held.
func (r *Root) quiesceLocked(by int32) {
	switch {
	case !r.quiesce.add(r, by):
	case r.quiesce.quiet():
		r.closeGate()
	default:
		r.openGate()
	}
}

// wait returns when everything is quiet.
func (d *drain) wait(ctx context.Context) error {
	for _, n := range d.drainers {
		n.rare.drainer.sync(n)
	}
	for _, r := range d.gates {
		for idle := r.waitIdle(); idle != nil; idle = r.waitIdle() {
			if err := await(ctx, idle); err != nil {
				return err
			}
		}
	}
	if d.drainersQuiet() {
		return nil
	}
	tick := time.NewTicker(quietPoll)
	defer tick.Stop()
	for !d.drainersQuiet() {
		if err := await(ctx, tick.C); err != nil {
			return err
		}
	}
	return nil
}

// await waits for c to be closed, or to give something. Error: the cause of the end of ctx.
func await[T any](ctx context.Context, c <-chan T) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *drain) drainersQuiet() bool {
	return !slices.ContainsFunc(d.drainers, func(n *Node) bool { return !n.drv.(Drainer).Quiet() })
}

// end lets everything go on.
func (d *drain) end() {
	d.release()
	for _, n := range d.drainers {
		n.rare.drainer.sync(n)
	}
}

func (d *drain) release() {
	defer panics.Fatal("the drains of the graph")
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	d.quiesceLocked(-1)
	for _, n := range d.drainers {
		n.rare.drainer.drains--
	}
}

// drainerState serialises the calls of a node's Drainer: they alternate and end in the state that
// the graph is in.
type drainerState struct {
	drains int32 // that told the Drainer to let go; guarded by Graph.mu

	mu     sync.Mutex
	called bool // DrainBegin was the last call
}

// sync brings the Drainer of n to the state that the graph is in, whoever calls it.
func (s *drainerState) sync(n *Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n.g.mu.RLock()
	want := s.drains > 0
	n.g.mu.RUnlock()
	if want == s.called {
		return
	}
	s.called = want
	if want {
		n.drv.(Drainer).DrainBegin()
	} else {
		n.drv.(Drainer).DrainEnd()
	}
}
