package blockdev

import (
	"context"
	"errors"

	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/graph/transaction"
	"qblockd/schema/types"
)

// Snapshot is the body of blockdev-snapshot and blockdev-snapshot-sync, as a step of a transaction:
// all parents of a node move to an overlay, which gets the node as its backing file. What was
// written to the node before is on stable storage then.
type Snapshot struct {
	transaction.Noop
	m            *Manager
	device, node *string
	overlay      string                      // of blockdev-snapshot, or
	sync         *types.BlockdevSnapshotSync // of blockdev-snapshot-sync

	old    *graph.Node
	opened *Opened // the overlay that was made or opened by this step
	below  bool    // old is below the overlay
	done   bool
}

var _ interface {
	transaction.Action
	transaction.Opener
	transaction.Holder
	transaction.Quiescer
} = (*Snapshot)(nil)

// Snapshot makes the step of blockdev-snapshot.
func (m *Manager) Snapshot(a *types.BlockdevSnapshot) *Snapshot {
	return &Snapshot{m: m, device: &a.Node, node: &a.Node, overlay: a.Overlay}
}

// SnapshotSync makes the step of blockdev-snapshot-sync.
func (m *Manager) SnapshotSync(a *types.BlockdevSnapshotSync) *Snapshot {
	return &Snapshot{m: m, device: a.Device, node: a.NodeName, sync: a}
}

// check finds the node, which an earlier step may have made, and tells whether a snapshot of it is
// possible.
func (s *Snapshot) check(tx *graph.Tx) (err error) {
	s.old, s.below = nil, false
	if s.node != nil {
		s.old = tx.Held(*s.node)
	}
	if s.old == nil {
		return notFound(types.Or(s.device, ""), types.Or(s.node, ""))
	}
	return tx.Blocked(s.old, graph.OpExternalSnapshot)
}

// Open implements transaction.Opener: it makes and opens the overlay of blockdev-snapshot-sync.
// What cannot be otherwise is told by Prepare.
func (s *Snapshot) Open(ctx context.Context, sketch *graph.Tx) error {
	err := s.check(sketch)
	if err == nil && s.sync != nil {
		err = s.makeOverlay(ctx, sketch)
	}
	if err == nil {
		_ = s.place(sketch)
	} else if s.sync != nil {
		return err
	}
	return nil
}

func (s *Snapshot) makeOverlay(ctx context.Context, sketch *graph.Tx) error {
	a := s.sync
	name, err := graph.GivenName(a.SnapshotNodeName)
	if err != nil {
		return err
	}
	if s.node != nil && a.SnapshotNodeName == nil {
		return errors.New("New overlay node-name missing")
	}
	if name != "" && sketch.Node(name) != nil {
		return errors.New("New overlay node-name already in use")
	}
	format := types.Or(a.Format, string(types.BlockdevDriverQcow2))
	s.opened, err = s.m.OpenImage(ctx, OpenImage{
		Filename: a.SnapshotFile, Mode: a.Mode, Format: &format, Name: name,
		ReadOnly: s.old.ReadOnly(), For: s.old, Below: s.old, View: sketch.View,
	})
	return err
}

// Nodes implements transaction.Action.
func (s *Snapshot) Nodes() []*graph.Node {
	old, err := s.m.Lookup(s.device, s.node)
	if err != nil {
		return nil
	}
	nodes := []*graph.Node{old}
	if n := s.m.g.Node(s.overlay); n != nil && s.sync == nil {
		nodes = append(nodes, n)
	}
	return nodes
}

// Holds implements transaction.Holder: the overlay also of a node that an earlier step makes.
func (s *Snapshot) Holds() []*graph.Node {
	if n := s.m.g.Node(s.overlay); n != nil && s.sync == nil {
		return []*graph.Node{n}
	}
	return nil
}

// Quiesces implements transaction.Quiescer: QEMU quiesces the overlay when nothing speaks
// against it any more.
func (s *Snapshot) Quiesces() []*graph.Node {
	switch {
	case s.below:
		return s.Nodes()
	case s.old != nil:
		return []*graph.Node{s.old}
	}
	return nil
}

// Prepare implements transaction.Action.
func (s *Snapshot) Prepare(ctx context.Context, tx *graph.Tx) error {
	if err := s.check(tx); err != nil {
		return err
	}
	if err := s.old.IO().Flush(ctx); err != nil {
		return errors.New("An IO error has occurred")
	}
	return s.place(tx)
}

// place puts the overlay above the node.
func (s *Snapshot) place(tx *graph.Tx) (err error) {
	var overlay *graph.Node
	if s.opened != nil {
		overlay = s.opened.Node()
	} else if overlay, err = s.m.LookupIn(tx, s.overlay); err != nil {
		return err
	}
	if err := s.fits(tx, overlay); err != nil {
		return err
	}
	s.below = true
	if _, err := tx.InsertFilter(overlay, "backing", s.old); err != nil {
		return err
	}
	if s.opened != nil {
		return s.opened.Publish(tx)
	}
	return nil
}

// fits tells why a node cannot become an overlay.
func (s *Snapshot) fits(tx *graph.Tx, overlay *graph.Node) error {
	if tx.Need(overlay)&perm.ConsistentRead != 0 {
		return errors.New("The overlay is already in use")
	}
	if overlay.Kind() == graph.Filter {
		return errors.New("Filters cannot be used as overlays")
	}
	if tx.Child(overlay, "backing") != nil {
		return errors.New("The overlay already has a backing image")
	}
	if !overlay.Caps().Backing {
		return errors.New("The overlay does not support backing images")
	}
	return overlay.Blocked(graph.OpOverlay)
}

// Commit implements transaction.Action.
func (s *Snapshot) Commit() {
	s.done = true
	if s.opened != nil {
		s.opened.Done()
	}
	if s.old.ReadOnly() {
		return
	}
	// Nobody writes to it from now on. That it cannot be told so is no reason to undo anything.
	graph.EndWriting("below its overlay", graph.Now.WithFiles(s.old)...)
}

// Clean implements transaction.Action.
func (s *Snapshot) Clean() {
	if s.opened != nil && !s.done {
		s.opened.Discard()
	}
	s.opened = nil
}
