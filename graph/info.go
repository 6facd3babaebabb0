package graph

import (
	"log/slog"
	"slices"

	"qblockd/events/trace"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// SetDriver gives the hidden node what Open made. Call it once, before the Tx that publishes
// the node. The driver's Caps and Size are asked under the graph's lock: they never block.
func (n *Node) SetDriver(d Driver) {
	n.g.mu.Lock()
	n.drv = d
	n.io.opened()
	n.g.version++ // drafts have asked the node without driver
	n.g.mu.Unlock()
	if _, ok := d.(Drainer); ok {
		n.g.drainers.Add(1)
	}
	n.Bump()
	if p := &trace.NodeOpen; p.On() {
		p.Log(slog.String("node", n.name), slog.String("driver", n.DriverName()), slog.Int64("size", d.Size()))
	}
}

// Parents is a snapshot of the edges that lead to n, newest first.
func (n *Node) Parents() []*Edge {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return slices.Collect(n.parents.all())
}

// Claim is the cumulative claim of the parents.
func (n *Node) Claim() perm.Claim {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return n.counts.Claim()
}

// MonitorOwned tells whether blockdev-add made n and blockdev-del may remove it.
func (n *Node) MonitorOwned() bool {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return n.owned
}

// MoveUp gives the hidden node n the place in Nodes of a node that is made now. For openers that
// take names early: a node is listed after the children that were opened before it.
func (n *Node) MoveUp() {
	n.g.mu.Lock()
	defer n.g.mu.Unlock()
	if n.state != nodeHidden {
		panic("graph: MoveUp of node " + n.name + ", which is not hidden")
	}
	n.g.nodeSeq++
	n.seq = n.g.nodeSeq
}

// SetFormat tells the hidden node n what its driver is, where that was not known when it took its
// name. Call it before SetDriver.
func (n *Node) SetFormat(o *Options) {
	n.g.mu.Lock()
	defer n.g.mu.Unlock()
	if n.state != nodeHidden || n.drv != nil {
		panic("graph: SetFormat of node " + n.name + ", which has a driver")
	}
	own := *n.opts.Load()
	own.DriverName, own.Kind, own.Reopens, own.Canonical = o.DriverName, o.Kind, o.Reopens, o.Canonical
	n.opts.Store(&own)
	n.g.version++ // drafts may have asked for the kind
}

// Frozen tells whether e may not be changed now.
func (e *Edge) Frozen() bool {
	g := e.graph()
	g.mu.RLock()
	defer g.mu.RUnlock()
	return e.frozen != nil
}

func (e *Edge) graph() *Graph {
	if e.root != nil {
		return e.root.g
	}
	return e.pnode.g
}

// Drained tells whether r's gate is closed by a drain now.
func (r *Root) Drained() bool {
	r.g.mu.RLock()
	defer r.g.mu.RUnlock()
	return r.quiesce.quiet()
}

// ShowImage fills in what the node below shows of clusters and of being dirty: for filters, which
// show it as their own. A nil edge shows nothing.
func (e *Edge) ShowImage(info *types.ImageInfo) {
	if e == nil {
		return
	}
	if i, ok := e.Node().drv.(Informer); ok {
		var below types.ImageInfo
		i.ImageInfo(&below)
		info.ClusterSize, info.DirtyFlag = below.ClusterSize, below.DirtyFlag
	}
}

// Resized notes that n's size may have changed: n and the nodes that show it as theirs, filters and
// raw formats, are bumped and get bitmaps of that size; roots are told. If n has such parents, or
// roots, it takes the graph's lock for reading, which nobody holds for long: allowed in requests,
// but not with node or driver locks held. The usual case, a file that grows below a format, takes
// no lock.
func (n *Node) Resized() {
	n.bitmaps.resize()
	if n.sizeSeen.Load() == 0 {
		n.Bump()
		return
	}
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	showSizeLocked(n, func(x *Node) {
		x.Bump()
		x.bitmaps.resize()
	})
}

// showSizeLocked calls f for n and the nodes that show its size as theirs, and tells the roots that
// do.
// +checklocksread:n.g.mu
func showSizeLocked(n *Node, f func(*Node)) {
	seen := map[*Node]bool{n: true}
	stack := []*Node{n}
	for len(stack) > 0 {
		x := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		f(x)
		for e := range x.parents.all() { // +checklocksignore: the same graph
			if e.root != nil && e.root.spec.Resized != nil {
				e.root.spec.Resized()
			}
			if e.pnode != nil && e.showsSize() && !seen[e.pnode] {
				seen[e.pnode] = true
				stack = append(stack, e.pnode)
			}
		}
	}
}
