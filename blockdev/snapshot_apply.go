package blockdev

import (
	"context"
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// ApplyInternalSnapshot is the body of x-qblockd-snapshot-apply. Nobody else may use the node: its
// contents change as a whole, and its size may.
func (m *Manager) ApplyInternalSnapshot(
	ctx context.Context, a *types.XQblockdSnapshotApplyArgs,
) (_ *types.SnapshotInfo, err error) {
	var n *graph.Node
	hold, err := m.g.Hold(ctx, func() (_ []*graph.Node, err error) {
		n, err = m.LookupRoot(a.Device)
		switch {
		case err != nil:
			return nil, err
		case a.ID == nil && a.Name == nil:
			return nil, errors.New("Name or id must be provided")
		}
		return []*graph.Node{n}, n.Blocked(graph.OpInternalSnapshot)
	})
	if err != nil {
		return nil, err
	}
	defer hold.Release()
	store, ok := n.Driver().(graph.SnapshotApplier)
	switch {
	case !ok || listless(store):
		return nil, errNoList
	case n.ReadOnly():
		return nil, fmt.Errorf("Device '%s' is read only", a.Device)
	case len(n.Bitmaps().All()) > 0:
		return nil, errors.New("Device has active dirty bitmaps")
	}
	root, err := m.g.AddRoot(ctx, graph.RootSpec{
		EdgeName: "root", Claim: perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize},
		Kind: graph.KindBackend, Ctx: ctx,
	}, n)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.g.CloseRoot(context.WithoutCancel(ctx), root)) }()
	undrain, err := m.g.Drain(ctx, n)
	if err != nil {
		return nil, err
	}
	defer undrain()
	x := findSnapshot(store, a.ID, a.Name)
	if x == nil {
		return nil, fmt.Errorf("Snapshot with id '%s' and name '%s' does not exist on device '%s'",
			types.Or(a.ID, "null"), types.Or(a.Name, "null"), a.Device)
	}
	err = n.Guarded(func() error { return store.ApplySnapshot(&blk.Req{Ctx: ctx}, x.ID, x.Name) })
	if err != nil {
		return nil, fmt.Errorf("Could not apply snapshot '%s': %s", x.Name, blk.ErrnoText(err))
	}
	return x, nil
}
