package graph

import (
	"log/slog"

	"qblockd/events/trace"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// SetDriver gives the hidden node what Open made. Call it once, before the Tx that publishes
// the node. The driver's Caps and Size are asked under the graph's lock: they never block.
func (n *Node) SetDriver(d Driver) {
	n.g.mu.Lock()
	n.drv = d
	n.io.opened(n)
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
	var l []*Edge
	for e := n.parents.head; e != nil; e = e.next {
		l = append(l, e)
	}
	return l
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

// Inactive tells whether n is inactive.
func (n *Node) Inactive() bool {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return n.inactive
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
	return r.quiesce > 0
}

// Bump notes that something changed that queries show of n: call it after the change.
// Takes no lock: may be called in requests.
func (n *Node) Bump() {
	for {
		gen, old := n.g.gen.Add(1), n.infoGen.Load()
		// A number taken earlier than one that is in place already might have been seen together
		// with the old state.
		if gen > old && n.infoGen.CompareAndSwap(old, gen) {
			break
		}
	}
	n.g.epoch.Add(1)
}

// InfoGeneration grows whenever something changes that queries show of n itself, its edges
// downwards included. Read it before what it stands for.
func (n *Node) InfoGeneration() uint64 { return n.infoGen.Load() }

// TreeGeneration grows whenever InfoGeneration of n or of a node below does. While nothing changes
// anywhere it costs a comparison; after a change, asking all nodes costs one walk of the graph.
func (n *Node) TreeGeneration() uint64 {
	epoch := n.g.epoch.Load() + 1 // 0 means never asked
	n.g.genMu.Lock()
	defer n.g.genMu.Unlock()
	return n.treeGenLocked(epoch)
}

// +checklocks:n.g.genMu
func (n *Node) treeGenLocked(epoch uint64) uint64 {
	if n.treeEpoch == epoch {
		return n.treeGen
	}
	gen := n.infoGen.Load()
	for _, e := range n.kids.Load().all {
		gen = max(gen, e.Node().treeGenLocked(epoch)) // +checklocksignore: of the same graph
	}
	n.treeGen, n.treeEpoch = gen, epoch
	return gen
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
// raw formats, are bumped and get bitmaps of that size. If n has such parents, or roots, it takes
// the graph's lock for reading, which nobody holds for long: allowed in requests, but not with node
// or driver locks held. The usual case, a file that grows below a format, takes no lock.
func (n *Node) Resized() {
	n.resizeBitmaps()
	if n.sizeSeen.Load() == 0 {
		n.Bump()
		return
	}
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	seen := map[*Node]bool{n: true}
	stack := []*Node{n}
	for len(stack) > 0 {
		x := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		x.Bump()
		x.resizeBitmaps()
		for e := x.parents.head; e != nil; e = e.next {
			if e.pnode != nil && e.showsSize() && !seen[e.pnode] {
				seen[e.pnode] = true
				stack = append(stack, e.pnode)
			}
		}
	}
}
