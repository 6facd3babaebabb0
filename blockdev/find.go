package blockdev

import (
	"fmt"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// finder finds the nodes that clients name.
type finder struct{ g *graph.Graph }

// LookupIn is Lookup of a node by a device or node name as it is once tx is committed; of one that
// is held (graph.Tx.Held).
func (f finder) LookupIn(tx *graph.Tx, name string) (*graph.Node, error) {
	if n := tx.Held(name); n != nil {
		return n, nil
	}
	return nil, notFound(name, name)
}

func notFound(device, node string) error {
	return fmt.Errorf("Cannot find device='%s' nor node-name='%s'", device, node)
}

// Lookup finds a node by the halves of a generic reference; nil stands for one that was not given.
func (f finder) Lookup(device, node *string) (*graph.Node, error) {
	if node != nil {
		if n := f.g.Node(*node); n != nil {
			return n, nil
		}
	}
	return nil, notFound(types.Or(device, ""), types.Or(node, ""))
}

// Find finds a node for commands on nodes that were added (blockdev-del, blockdev-reopen).
func (f finder) Find(name string) (*graph.Node, error) {
	if n := f.g.Node(name); n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("Failed to find node with node-name='%s'", name)
}

// FindDevice finds a node for the block job commands, whose error has the class DeviceNotFound.
func (f finder) FindDevice(name string) (*graph.Node, error) {
	if n := f.g.Node(name); n != nil {
		return n, nil
	}
	return nil, blk.WithClass(fmt.Errorf("Device '%s' not found", name), "DeviceNotFound")
}
