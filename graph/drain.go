package graph

import (
	"context"
	"time"

	"qblockd/events/panics"
)

// quietPoll is how often a Drainer that nobody announced to be quiet is asked again.
const quietPoll = 2 * time.Millisecond

// drain is a set of nodes and roots held quiet.
type drain struct {
	g     *Graph
	nodes []*Node
	roots []*Root
	// What has to become quiet, found when the drain began.
	gates  []*Root
	held   []*Node // nodes with a Drainer that was told to let go
	hooked []*Root
}

// Drain closes the gates of all roots that reach the nodes and waits until their units of
// work are over and every Drainer is quiet. Nested drains count; each undrain must be called once. On error
// (the context's) nothing is drained. Not for use inside a unit of work.
func (g *Graph) Drain(ctx context.Context, nodes ...*Node) (undrain func(), err error) {
	d := g.beginDrain(nodes, nil)
	if err := d.wait(ctx, nil); err != nil {
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
	for _, r := range d.gates {
		if h := r.hooks.Load(); h != nil && (h.DrainBegin != nil || h.Quiet != nil || h.DrainEnd != nil) {
			d.hooked = append(d.hooked, r)
		}
	}
	if g.drainers.Load() > 0 {
		d.holdLocked(above) // +checklocksignore: of the same graph
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

// holdLocked tells every Drainer to let go that a unit of work to be waited for may be stuck in: those below the roots, and above
// and at the drained nodes.
// +checklocks:d.g.mu
func (d *drain) holdLocked(seen map[*Node]bool) {
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
			d.held = append(d.held, n)
			n.rareLocked().hold++ // +checklocksignore: of the same graph
		}
		for _, e := range n.kids.Load().all {
			stack = append(stack, e.Node())
		}
	}
}

// quiesceLocked adds by (1 or -1) reasons for n to be quiet and passes the change on to its parents.
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

// wait returns when everything is quiet. quiet: roots whose hooks count as quiet.
func (d *drain) wait(ctx context.Context, quiet map[*Root]bool) error {
	for _, r := range d.hooked {
		if !quiet[r] {
			r.syncHook()
		}
	}
	for _, n := range d.held {
		n.syncHook()
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
	return d.waitHooks(ctx, quiet)
}

func (d *drain) waitHooks(ctx context.Context, quiet map[*Root]bool) error {
	var tick *time.Ticker
	for {
		changed := d.g.quietChanged()
		if d.hooksQuiet(quiet) {
			return nil
		}
		if tick == nil {
			tick = time.NewTicker(quietPoll)
			defer tick.Stop()
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (d *drain) hooksQuiet(quiet map[*Root]bool) bool {
	for _, r := range d.hooked {
		if r.gate.Load()&gateClosed == 0 {
			continue // moved away from what is drained
		}
		if h := r.hooks.Load(); !quiet[r] && r.inTx.Load() == 0 && h.Quiet != nil && !h.Quiet() {
			return false
		}
	}
	for _, n := range d.held {
		if !n.drv.(Drainer).Quiet() {
			return false
		}
	}
	return true
}

// end lets everything go on.
func (d *drain) end() {
	d.release()
	for _, n := range d.held {
		n.syncHook()
	}
	for _, r := range d.hooked {
		r.syncHook()
	}
}

func (d *drain) release() {
	defer panics.Fatal("the drains of the graph")
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	d.quiesceLocked(-1)
	for _, n := range d.held {
		n.rare.hold--
	}
}

// syncHook brings the driver's Drainer to the state the graph is in. Calls alternate, whoever makes them.
func (n *Node) syncHook() {
	h := &n.rare.hook
	h.mu.Lock()
	defer h.mu.Unlock()
	n.g.mu.RLock()
	want := n.rare.hold > 0
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

// syncHook does the same for a root's hooks.
func (r *Root) syncHook() {
	r.hook.mu.Lock()
	defer r.hook.mu.Unlock()
	r.g.mu.RLock()
	want := r.quiesce > 0
	r.g.mu.RUnlock()
	if want == r.hook.called {
		return
	}
	r.hook.called = want
	h := r.hooks.Load()
	if want && h.DrainBegin != nil {
		h.DrainBegin()
	} else if !want && h.DrainEnd != nil {
		h.DrainEnd()
	}
}

// NotifyQuiet wakes drains that wait for a Drainer: call it when Quiet has become true.
func (g *Graph) NotifyQuiet() {
	g.quietMu.Lock()
	if g.quietCh != nil {
		close(g.quietCh)
		g.quietCh = nil
	}
	g.quietMu.Unlock()
}

// quietChanged is closed by the next NotifyQuiet.
func (g *Graph) quietChanged() <-chan struct{} {
	g.quietMu.Lock()
	defer g.quietMu.Unlock()
	if g.quietCh == nil {
		g.quietCh = make(chan struct{})
	}
	return g.quietCh
}
