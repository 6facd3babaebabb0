package graph

import (
	"fmt"
	"slices"

	"qblockd/graph/perm"
)

// Op is an operation that a node can be blocked for; a set of them.
type Op uint32

// The operations, as blockers distinguish them.
const (
	OpBackupSource Op = 1 << iota
	OpBackupTarget
	OpChange
	OpCommitSource
	OpCommitTarget
	OpDataplane
	OpDriveDel
	OpEject
	OpExternalSnapshot
	OpInternalSnapshot
	OpInternalSnapshotDelete
	OpMirrorSource
	OpMirrorTarget
	OpResize
	OpStream
	OpReplace
	OpOverlay // become the overlay of an external snapshot

	// AllOps are all of them.
	AllOps = 1<<iota - 1

	// backingAllows are those that a node may take part in while it is somebody's backing file.
	backingAllows = OpCommitTarget | OpStream | OpBackupSource | OpBackupTarget | OpOverlay
)

// opBlocker is one reason against some operations.
type opBlocker struct {
	ops    Op
	reason error
}

// Busy is the error of an operation on a node that is blocked for that reason.
func Busy(node string, reason error) error { return fmt.Errorf("Node '%s' is busy: %w", node, reason) }

// Block refuses the ops on n with that reason until unblock is called.
func (n *Node) Block(ops Op, reason error) (unblock func()) {
	x := &opBlocker{ops, reason}
	n.g.mu.Lock()
	defer n.g.mu.Unlock()
	r := n.rareLocked()
	r.blockers = append(r.blockers, x)
	return func() {
		n.g.mu.Lock()
		defer n.g.mu.Unlock()
		r.blockers = slices.DeleteFunc(r.blockers, func(y *opBlocker) bool { return x == y })
	}
}

// Blocked is nil, or an error "Node 'N' is busy: REASON". The latest reason wins. A
// backing file is blocked for most operations by its overlay.
func (n *Node) Blocked(op Op) error {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return n.blockedLocked(op)
}

// Blocked is Node.Blocked once the Tx is committed.
func (tx *Tx) Blocked(n *Node, op Op) error {
	n.g.mu.RLock()
	err := n.rare.blocked(n, op)
	n.g.mu.RUnlock()
	if err != nil {
		return err
	}
	for _, e := range tx.Parents(n) {
		if err := e.blocks(n, op); err != nil {
			return err
		}
	}
	return nil
}

// +checklocksread:n.g.mu
func (n *Node) blockedLocked(op Op) error {
	if err := n.rare.blocked(n, op); err != nil {
		return err
	}
	for e := range n.parents.all() {
		if err := e.blocks(n, op); err != nil {
			return err
		}
	}
	return nil
}

// blocked is the error of the latest reason against op at n. Graph.mu is held.
func (r *nodeRare) blocked(n *Node, op Op) error {
	if r != nil {
		for _, b := range slices.Backward(r.blockers) {
			if b.ops&op != 0 {
				return Busy(n.name, b.reason)
			}
		}
	}
	return nil
}

// blocks is the error of op at n, to which e leads, if e makes that a backing file.
func (e *Edge) blocks(n *Node, op Op) error {
	if op&backingAllows != 0 || e.role&perm.COW == 0 || e.pnode == nil {
		return nil
	}
	return Busy(n.name, fmt.Errorf("node is used as backing hd of '%s'", e.pnode.name))
}

// rareLocked is n.rare, made if need be.
// +checklocks:n.g.mu
func (n *Node) rareLocked() *nodeRare {
	if n.rare == nil {
		n.rare = &nodeRare{}
	}
	return n.rare
}
