package graph

import (
	"context"

	"qblockd/graph/perm"
)

// Tx collects changes to the graph and makes them all or none. It reads its own writes. It
// is used by one goroutine; after Commit or Abort it is over (Abort after Commit does nothing).
type Tx struct {
	g   *Graph
	ctx context.Context
}

// NewNode reserves the name (generating one if empty) and makes a hidden node, pinned by its opener
// until Publish or Discard. Its place in Graph.Nodes is that of this call. Errors: Invalid node-name,
// Node name too long, Duplicate nodes.
func (tx *Tx) NewNode(o *Options) (*Node, error) { panic("graph: being written") }

// Attach makes child a child of parent.
func (tx *Tx) Attach(parent *Node, name string, role perm.Role, child *Node) (*Edge, error) {
	panic("graph: being written")
}

// AttachRoot makes a root on n.
func (tx *Tx) AttachRoot(spec RootSpec, n *Node) (*Root, error) { panic("graph: being written") }

// Detach removes a child edge of a node.
func (tx *Tx) Detach(e *Edge) error { panic("graph: being written") }

// DetachRoot removes a root; its requests have to be over or will be waited for.
func (tx *Tx) DetachRoot(r *Root) error { panic("graph: being written") }

// Replace makes e lead to n.
func (tx *Tx) Replace(e *Edge, n *Node) error { panic("graph: being written") }

// ReplaceNode moves all parents of old to new, but those below which new itself hangs on old and roots that stay at their node.
func (tx *Tx) ReplaceNode(old, new *Node) error { panic("graph: being written") }

// InsertFilter attaches filter (new, childless) above n and moves n's parents to it.
func (tx *Tx) InsertFilter(filter *Node, edgeName string, n *Node) (*Edge, error) {
	panic("graph: being written")
}

// RemoveFilter moves the parents of filter to its filtered or COW child and detaches that child.
func (tx *Tx) RemoveFilter(filter *Node) error { panic("graph: being written") }

// SetClaim changes what a root takes.
func (tx *Tx) SetClaim(e *Edge, c perm.Claim) error { panic("graph: being written") }

// SetReadOnly changes whether n refuses writes.
func (tx *Tx) SetReadOnly(n *Node, ro bool) error { panic("graph: being written") }

// SetOptions replaces the options of n on commit (reopen).
func (tx *Tx) SetOptions(n *Node, o *Options) { panic("graph: being written") }

// Refresh recomputes the claims of n on its children and tells its driver again.
func (tx *Tx) Refresh(n *Node) { panic("graph: being written") }

// Own makes the monitor an owner of n.
func (tx *Tx) Own(n *Node) { panic("graph: being written") }

// Disown takes that back; the node is closed on commit if nothing else refers to it.
func (tx *Tx) Disown(n *Node) { panic("graph: being written") }

// Publish makes n and the hidden nodes below it visible and drops their opener's pins.
func (tx *Tx) Publish(n *Node) { panic("graph: being written") }

// Discard drops the opener's pins of n and of the hidden nodes below it: they are closed on commit.
func (tx *Tx) Discard(n *Node) { panic("graph: being written") }

// Drain quiesces n during the commit although no edge above it changes.
func (tx *Tx) Drain(n *Node) { panic("graph: being written") }

// Quiet counts the root's Drainer as quiet: the job that runs this Tx. It must hold no request.
func (tx *Tx) Quiet(r *Root) { panic("graph: being written") }

// Record sets what runs after prepare and before install and may fail the Tx.
func (tx *Tx) Record(f func() error) { panic("graph: being written") }

// Participant takes part in a commit: Prepare may block and fail; then exactly one of Commit (while everything is
// still drained, right after install) and Abort follows.
type Participant interface {
	Prepare(ctx context.Context) error
	Commit()
	Abort()
}

// Join adds a participant; they are prepared in order, after the permissions, and aborted in reverse.
func (tx *Tx) Join(p Participant) { panic("graph: being written") }

// Commit does it all or nothing. See the package comment for the phases.
func (tx *Tx) Commit() error { panic("graph: being written") }

// Abort forgets the Tx and releases names it reserved.
func (tx *Tx) Abort() {}
