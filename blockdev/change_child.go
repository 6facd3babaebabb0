package blockdev

import (
	"context"
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/schema/types"
)

// ChangeChild gives a node a child that has no parents, or takes one from it (x-blockdev-change),
// and returns the node. Requests on the node wait meanwhile; it blocks as long as those under way
// and the storage do.
func (m *Manager) ChangeChild(ctx context.Context, a *types.XBlockdevChangeArgs) (parent *graph.Node, err error) {
	var child *graph.Node // that is added
	hold, err := m.g.Hold(ctx, func() (_ []*graph.Node, err error) {
		if parent, child, err = m.findChange(a); err != nil {
			return nil, err
		}
		nodes := []*graph.Node{parent}
		if child != nil {
			return append(nodes, child), nil
		}
		return append(nodes, parent.Child(*a.Child).Node().Dependents()...), nil
	})
	if err != nil {
		return nil, err
	}
	defer hold.Release() // which closes what was taken out
	return parent, m.g.Do(ctx, func(tx *graph.Tx) error {
		d, can := parent.Driver().(graph.ChildChanger)
		switch {
		case child == nil && !can:
			return fmt.Errorf("The node %s does not support removing a child", parent.Name())
		case child == nil:
			e := tx.Child(parent, *a.Child)
			if e == nil {
				return noChild(a)
			}
			return d.RemoveChild(tx, e)
		case !can:
			return fmt.Errorf("The node %s does not support adding a child", parent.Name())
		case len(tx.Parents(child)) > 0:
			return fmt.Errorf("The node %s already has a parent", child.Name())
		}
		return d.AddChild(tx, child)
	})
}

// findChange finds the nodes: child is nil if one is taken out.
func (m *Manager) findChange(a *types.XBlockdevChangeArgs) (parent, child *graph.Node, err error) {
	if parent, err = m.Lookup(&a.Parent, &a.Parent); err != nil {
		return nil, nil, err
	}
	switch {
	case a.Child != nil && a.Node != nil:
		return nil, nil, errors.New("The parameters child and node are in conflict")
	case a.Child != nil:
		if parent.Child(*a.Child) == nil {
			return nil, nil, noChild(a)
		}
	case a.Node == nil:
		return nil, nil, errors.New("Either child or node must be specified")
	default:
		if child = m.g.Node(*a.Node); child == nil {
			return nil, nil, fmt.Errorf("Node '%s' not found", *a.Node)
		}
	}
	return parent, child, nil
}

func noChild(a *types.XBlockdevChangeArgs) error {
	return fmt.Errorf("Node '%s' does not have child '%s'", a.Parent, *a.Child)
}
