package graph

import (
	"fmt"
	"sync"

	"qblockd/graph/perm"
)

// Op is an operation that a node can be blocked for.
type Op uint8

// The operations, as blockers distinguish them.
const (
	OpBackupSource Op = iota
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
	opCount
)

// backingAllows are the operations that a node may take part in while it is somebody's backing
// file.
const backingAllows = 1<<OpCommitTarget | 1<<OpStream | 1<<OpBackupSource | 1<<OpBackupTarget | 1<<OpOverlay

// opBlocker is one reason against some operations.
type opBlocker struct {
	ops    uint32
	reason error
}

// Busy is the error of an operation on a node that is blocked for that reason.
func Busy(node string, reason error) error { return fmt.Errorf("Node '%s' is busy: %w", node, reason) }

// Block refuses op on n with that reason until unblock is called.
func (n *Node) Block(op Op, reason error) (unblock func()) { return n.block(1<<op, reason) }

// BlockAll refuses all operations but those given.
func (n *Node) BlockAll(reason error, but ...Op) (unblock func()) {
	ops := uint32(1<<opCount - 1)
	for _, op := range but {
		ops &^= 1 << op
	}
	return n.block(ops, reason)
}

func (n *Node) block(ops uint32, reason error) func() {
	b := &opBlocker{ops, reason}
	n.g.mu.Lock()
	defer n.g.mu.Unlock()
	r := n.rareLocked()
	r.blockers = append(r.blockers, b)
	return sync.OnceFunc(func() {
		n.g.mu.Lock()
		defer n.g.mu.Unlock()
		for i := range r.blockers {
			if r.blockers[i] == b {
				r.blockers = append(r.blockers[:i:i], r.blockers[i+1:]...)
				return
			}
		}
	})
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
	err := n.blockerLocked(op)
	n.g.mu.RUnlock()
	if err != nil || backingAllows>>op&1 != 0 {
		return err
	}
	for _, e := range tx.Parents(n) {
		if err := n.backs(e); err != nil {
			return err
		}
	}
	return nil
}

// +checklocksread:n.g.mu
func (n *Node) blockedLocked(op Op) error {
	if err := n.blockerLocked(op); err != nil {
		return err
	}
	if n.cowParents > 0 && backingAllows>>op&1 == 0 {
		for e := n.parents.head; e != nil; e = e.next {
			if err := n.backs(e); err != nil {
				return err
			}
		}
	}
	return nil
}

// backs is the error of an operation that n is refused because e makes it a backing file; nil: e
// does not.
func (n *Node) backs(e *Edge) error {
	if e.role&perm.COW != 0 && e.pnode != nil {
		return Busy(n.name, fmt.Errorf("node is used as backing hd of '%s'", e.pnode.name))
	}
	return nil
}

// blockerLocked is the latest blocker of op as an error.
// +checklocksread:n.g.mu
func (n *Node) blockerLocked(op Op) error {
	if n.rare != nil {
		for i := len(n.rare.blockers) - 1; i >= 0; i-- {
			if b := n.rare.blockers[i]; b.ops>>op&1 != 0 {
				return Busy(n.name, b.reason)
			}
		}
	}
	return nil
}

// rareLocked is n.rare, made if need be.
// +checklocks:n.g.mu
func (n *Node) rareLocked() *nodeRare {
	if n.rare == nil {
		n.rare = &nodeRare{}
	}
	return n.rare
}
