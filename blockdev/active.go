package blockdev

import (
	"context"

	"qblockd/graph"
	"qblockd/schema/types"
)

// SetActive makes a node active or inactive, or all nodes (blockdev-set-active). Requests wait
// meanwhile; it blocks as long as those under way and the storage do. On error all nodes are as
// they were.
func (m *Manager) SetActive(ctx context.Context, a *types.BlockdevSetActiveArgs) error {
	var nodes []*graph.Node
	hold, err := m.g.Hold(ctx, func() ([]*graph.Node, error) {
		if a.NodeName == nil {
			nodes = m.tops()
		} else {
			n, err := m.Find(*a.NodeName)
			if err != nil {
				return nil, err
			}
			nodes = []*graph.Node{n}
		}
		var all []*graph.Node
		for _, n := range nodes {
			all = append(all, n.NodesBelow()...)
		}
		return all, nil
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	if a.Active {
		return graph.Activate(ctx, nodes...)
	}
	return graph.Deactivate(ctx, nodes...)
}

// tops are the nodes that no other node is above.
func (m *Manager) tops() (l []*graph.Node) {
	below := map[*graph.Node]bool{}
	all := m.g.Nodes()
	for _, n := range all {
		for _, e := range n.Children() {
			below[e.Node()] = true
		}
	}
	for _, n := range all {
		if !below[n] {
			l = append(l, n)
		}
	}
	return l
}
