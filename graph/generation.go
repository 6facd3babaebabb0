package graph

import "sync/atomic"

// generation tells those who keep what queries show of a node when that has changed.
type generation struct {
	own atomic.Uint64 // of the node itself
	// Memo of TreeGeneration, guarded by Graph.genMu.
	tree, epoch uint64
}

// Bump notes that something changed that queries show of n: call it after the change.
// Takes no lock: may be called in requests.
func (n *Node) Bump() {
	for {
		gen, old := n.g.gen.Add(1), n.info.own.Load()
		// A number taken earlier than one that is in place already might have been seen together
		// with the old state.
		if gen > old && n.info.own.CompareAndSwap(old, gen) {
			break
		}
	}
	n.g.epoch.Add(1)
}

// InfoGeneration grows whenever something changes that queries show of n itself, its edges
// downwards included. Read it before what it stands for.
func (n *Node) InfoGeneration() uint64 { return n.info.own.Load() }

// TreeGeneration grows whenever InfoGeneration of n or of a node below does. While nothing changes
// anywhere it costs a comparison; after a change, asking all nodes costs one walk of the graph.
func (n *Node) TreeGeneration() uint64 {
	epoch := n.g.epoch.Load() + 1 // 0 means never asked
	n.g.genMu.Lock()
	defer n.g.genMu.Unlock()
	return n.info.treeLocked(n, epoch) // +checklocksignore: of the same graph
}

// treeLocked is TreeGeneration of n, whose generation x is.
// +checklocks:n.g.genMu
func (x *generation) treeLocked(n *Node, epoch uint64) uint64 {
	if x.epoch == epoch {
		return x.tree
	}
	gen := x.own.Load()
	for _, e := range n.Children() {
		k := e.Node()
		gen = max(gen, k.info.treeLocked(k, epoch)) // +checklocksignore: of the same graph
	}
	x.tree, x.epoch = gen, epoch
	return gen
}
