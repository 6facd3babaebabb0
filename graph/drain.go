package graph

import (
	"context"
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
		n.quiesceLocked(by) // +checklocksignore: of the same graph
	}
	for _, r := range d.roots {
		r.quiesceLocked(by) // +checklocksignore: of the same graph
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
		for e := n.parents.head; e != nil; e = e.next {
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
			n.rareLocked().drains++ // +checklocksignore: of the same graph
		}
		for _, e := range n.kids.Load().all {
			stack = append(stack, e.Node())
		}
	}
}

// quiesceLocked adds by (1 or -1) reasons for n to be quiet and passes the change on to its
// parents.
// +checklocks:n.g.mu
func (n *Node) quiesceLocked(by int32) {
	was := n.quiesce > 0
	n.quiesce += by
	if n.quiesce < 0 {
		panic("graph: node " + n.name + " undrained too often")
	}
	if was == (n.quiesce > 0) {
		return
	}
	for e := n.parents.head; e != nil; e = e.next {
		e.quiesceParentLocked(by)
	}
}

// quiesceParentLocked passes a change of the node below on to the edge's parent. Graph.mu is held.
func (e *Edge) quiesceParentLocked(by int32) {
	if e.root != nil {
		e.root.quiesceLocked(by) // +checklocksignore: of the same graph
	} else {
		e.pnode.quiesceLocked(by) // +checklocksignore: of the same graph
	}
}

// quiesceLocked is the same for a root: its gate is closed while there is a reason.
// +checklocks:r.g.mu
func (r *Root) quiesceLocked(by int32) {
	was := r.quiesce > 0
	r.quiesce += by
	if r.quiesce < 0 {
		panic("graph: root undrained too often")
	}
	if is := r.quiesce > 0; is && !was {
		r.closeGate()
	} else if was && !is {
		r.openGate()
	}
}

// wait returns when everything is quiet.
func (d *drain) wait(ctx context.Context) error {
	for _, n := range d.drainers {
		n.syncDrainer()
	}
	for _, r := range d.gates {
		for {
			idle := r.waitIdle()
			if idle == nil {
				break
			}
			select {
			case <-idle:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	return d.waitDrainers(ctx)
}

func (d *drain) waitDrainers(ctx context.Context) error {
	if d.drainersQuiet() {
		return nil
	}
	tick := time.NewTicker(quietPoll)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if d.drainersQuiet() {
			return nil
		}
	}
}

func (d *drain) drainersQuiet() bool {
	for _, n := range d.drainers {
		if !n.drv.(Drainer).Quiet() {
			return false
		}
	}
	return true
}

// end lets everything go on.
func (d *drain) end() {
	d.release()
	for _, n := range d.drainers {
		n.syncDrainer()
	}
}

func (d *drain) release() {
	defer panics.Fatal("the drains of the graph")
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	d.quiesceLocked(-1)
	for _, n := range d.drainers {
		n.rare.drains--
	}
}

// drainerState serialises the calls of a node's Drainer: they alternate and end in the state that
// the graph is in.
type drainerState struct {
	mu     sync.Mutex
	called bool // DrainBegin was the last call
}

// syncDrainer brings the driver's Drainer to the state that the graph is in. Calls alternate,
// whoever makes them.
func (n *Node) syncDrainer() {
	h := &n.rare.drainer
	h.mu.Lock()
	defer h.mu.Unlock()
	n.g.mu.RLock()
	want := n.rare.drains > 0
	n.g.mu.RUnlock()
	if want == h.called {
		return
	}
	h.called = want
	if want {
		n.drv.(Drainer).DrainBegin()
	} else {
		n.drv.(Drainer).DrainEnd()
	}
}
