package blockdev

import (
	"context"
	"errors"
	"fmt"
	"time"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/graph/transaction"
	"qblockd/schema/types"
)

// started is when the clock of internal snapshots began: there is no machine whose clock they could
// tell.
var started = time.Now()

// LookupRoot finds a node by the name of a device or its own that nothing but devices and exports
// uses.
func (f finder) LookupRoot(name string) (*graph.Node, error) {
	n, err := f.Lookup(&name, &name)
	if err != nil {
		return nil, err
	}
	return onlyRoots(n, n.Parents())
}

// onlyRoots tells why parents keep a node from being a root, or returns it.
func onlyRoots(n *graph.Node, parents []*graph.Edge) (*graph.Node, error) {
	for _, e := range parents {
		if r := e.ParentRoot(); r == nil || r.Spec().Kind == graph.KindJob {
			return nil, errors.New("Need a root block node")
		}
	}
	return n, nil
}

// snapshotter finds who keeps the internal snapshots of n: its driver or, where that keeps none and
// takes all its data from one child, the child. Nil: nobody, or with writable somebody that
// takes no writes.
func snapshotter(n *graph.Node, writable bool) (*graph.Node, graph.InternalSnapshotter) {
	const holds = perm.Data | perm.Metadata | perm.Filtered
	for !writable || !n.ReadOnly() && !n.Inactive() {
		if s, ok := n.Driver().(graph.InternalSnapshotter); ok {
			return n, s
		}
		below := n.File()
		if below == nil {
			break
		}
		for _, e := range n.Children() {
			if e != below && e.Role()&holds != 0 {
				return nil, nil
			}
		}
		n = below.Node()
	}
	return nil, nil
}

var errNoList = errors.New("Failed to get a snapshot list: Operation not supported")

// listless tells whether an image cannot have internal snapshots although others of its format can.
func listless(s graph.InternalSnapshotter) bool {
	x, ok := s.(interface{ Listless() bool })
	return ok && x.Listless()
}

// InternalSnapshot is the body of blockdev-snapshot-internal-sync, as a step of a transaction. The
// snapshot is made in Prepare and deleted again in Abort.
type InternalSnapshot struct {
	transaction.Noop
	m      *Manager
	args   *types.BlockdevSnapshotInternal
	keeper *graph.Node // that has the snapshot
	store  graph.InternalSnapshotter
	// Of the snapshot that was made; the name is as the image has it.
	id, name string
}

var _ interface {
	transaction.Action
	transaction.Holder
	transaction.Quiescer
} = (*InternalSnapshot)(nil)

// InternalSnapshot makes the step.
func (m *Manager) InternalSnapshot(a *types.BlockdevSnapshotInternal) *InternalSnapshot {
	return &InternalSnapshot{m: m, args: a}
}

// Nodes implements transaction.Action.
func (s *InternalSnapshot) Nodes() []*graph.Node {
	if n, err := s.m.LookupRoot(s.args.Device); err == nil {
		if keeper, _ := snapshotter(n, true); keeper != nil && keeper != n {
			return []*graph.Node{n, keeper} // who may have other users
		}
		return []*graph.Node{n}
	}
	return nil
}

// Holds implements transaction.Holder: the node also where it cannot be, for Prepare to say.
func (s *InternalSnapshot) Holds() []*graph.Node {
	if n := s.m.g.Node(s.args.Device); n != nil {
		return []*graph.Node{n}
	}
	return nil
}

// Quiesces implements transaction.Quiescer.
func (s *InternalSnapshot) Quiesces() []*graph.Node {
	if l := s.Nodes(); l != nil {
		return l[:1]
	}
	return nil
}

// Prepare implements transaction.Action.
func (s *InternalSnapshot) Prepare(ctx context.Context, tx *graph.Tx) error {
	s.store = nil
	device, name := s.args.Device, s.args.Name
	n, err := s.m.LookupIn(tx, device)
	if err == nil {
		n, err = onlyRoots(n, tx.Parents(n)) // also those that earlier steps have made
	}
	if err != nil {
		return err
	}
	if err := n.Blocked(graph.OpInternalSnapshot); err != nil {
		return err
	}
	keeper, store := snapshotter(n, true)
	switch {
	case n.ReadOnly():
		return fmt.Errorf("Device '%s' is read only", device)
	case store == nil:
		return fmt.Errorf("Block format '%s' used by device '%s' does not support internal snapshots", n.DriverName(), device)
	case name == "":
		return errors.New("Name is empty")
	case listless(store):
		return errNoList
	case findSnapshot(store, nil, &name) != nil:
		return fmt.Errorf("Snapshot with name '%s' already exists on device '%s'", name, device)
	}
	const most = 255 // bytes of a name
	name = name[:min(len(name), most)]
	now := time.Now()
	keeper.MustHold()
	var id string
	err = keeper.Guarded(func() (err error) {
		id, err = store.CreateSnapshot(&blk.Req{Ctx: ctx}, name, now, now.Sub(started))
		return err
	})
	if err != nil {
		return fmt.Errorf("Failed to create snapshot '%s' on device '%s': %s", name, device, blk.ErrnoText(err))
	}
	s.keeper, s.store, s.id, s.name = keeper, store, id, name
	return nil
}

// Abort implements transaction.Action.
func (s *InternalSnapshot) Abort() {
	if s.store == nil {
		return
	}
	if err := deleteSnapshot(context.Background(), s.keeper, s.store, s.id, s.name); err != nil {
		s.m.log.Error("an internal snapshot of a transaction that failed stays",
			"node", s.args.Device, "snapshot", s.args.Name, "error", err)
	}
}

func deleteSnapshot(ctx context.Context, keeper *graph.Node, store graph.InternalSnapshotter, id, name string) error {
	keeper.MustHold()
	return keeper.Guarded(func() error { return store.DeleteSnapshot(&blk.Req{Ctx: ctx}, id, name) })
}

// findSnapshot is the first snapshot with that ID and that name, as far as they are given. It is
// also the first that has both its ID and its name.
func findSnapshot(s graph.InternalSnapshotter, id, name *string) *types.SnapshotInfo {
	for _, x := range s.Snapshots() {
		if (id == nil || x.ID == *id) && (name == nil || x.Name == *name) {
			return x
		}
	}
	return nil
}

// DeleteInternalSnapshot is the body of blockdev-snapshot-delete-internal-sync. Requests on the
// node wait meanwhile.
func (m *Manager) DeleteInternalSnapshot(
	ctx context.Context, a *types.BlockdevSnapshotDeleteInternalSyncArgs,
) (*types.SnapshotInfo, error) {
	var n, keeper *graph.Node
	var store graph.InternalSnapshotter
	hold, err := m.g.Hold(ctx, func() (_ []*graph.Node, err error) {
		n, err = m.LookupRoot(a.Device)
		switch {
		case err != nil:
			return nil, err
		case a.ID == nil && a.Name == nil:
			return nil, errors.New("Name or id must be provided")
		}
		if err := n.Blocked(graph.OpInternalSnapshotDelete); err != nil {
			return nil, err
		}
		if keeper, store = snapshotter(n, false); store == nil || listless(store) {
			return nil, errNoList
		}
		return []*graph.Node{n, keeper}, nil
	})
	if err != nil {
		return nil, err
	}
	defer hold.Release()
	undrain, err := m.g.Drain(ctx, n, keeper)
	if err != nil {
		return nil, err
	}
	defer undrain()
	x := findSnapshot(store, a.ID, a.Name)
	if x == nil {
		return nil, fmt.Errorf("Snapshot with id '%s' and name '%s' does not exist on device '%s'",
			types.Or(a.ID, "null"), types.Or(a.Name, "null"), a.Device)
	}
	if n.ReadOnly() || keeper.ReadOnly() {
		return nil, fmt.Errorf("Device '%s' is read only", a.Device)
	}
	if err := deleteSnapshot(ctx, keeper, store, x.ID, x.Name); err != nil {
		return nil, fmt.Errorf("Failed to remove snapshot: %s", blk.ErrnoText(err))
	}
	return x, nil
}
