package graph

import "context"

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
	opCount
)

type opBlocker struct {
	ops    uint32
	reason error
}

// Block refuses op on n with that reason until unblock is called (once).
func (n *Node) Block(op Op, reason error) (unblock func()) { panic("graph: being written") }

// BlockAll refuses all operations but those given.
func (n *Node) BlockAll(reason error, but ...Op) (unblock func()) { panic("graph: being written") }

// Blocked is nil, or "Node 'N' is busy: REASON".
func (n *Node) Blocked(op Op) error { panic("graph: being written") }

// FreezeChain makes the filter and backing edges from top down to base (nil: to the end) unchangeable
// until unfreeze is called (once).
func (g *Graph) FreezeChain(top, base *Node) (unfreeze func(), err error) {
	panic("graph: being written")
}

// Drain closes the gates of all roots that reach the nodes and waits until their units of work are over.
// On error nothing is drained.
func (g *Graph) Drain(ctx context.Context, nodes ...*Node) (undrain func(), err error) {
	panic("graph: being written")
}
