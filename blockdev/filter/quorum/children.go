package quorum

import (
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/perm"
)

// AddChild implements graph.ChildChanger. The new copy has the number after the last one that was
// given, which is given again only if it was taken from the copy that had it. What the copy has
// counts like any other's: it is for its user to let it have the same.
func (d *quorum) AddChild(tx *graph.Tx, child *graph.Node) error {
	if d.verify {
		return errors.New("Cannot add a child to a quorum in blkverify mode")
	}
	if _, err := tx.Attach(d.node, edgeName(d.next), perm.Data, child); err != nil {
		return err
	}
	if child.Size() != d.Size() {
		return fmt.Errorf("Node '%s' has %d bytes, and '%s' has %d", child.Name(), child.Size(), d.node.Name(), d.Size())
	}
	tx.Join(graph.OnCommit(func() { d.next++ }))
	return nil
}

// RemoveChild implements graph.ChildChanger.
func (d *quorum) RemoveChild(tx *graph.Tx, e *graph.Edge) error {
	if len(d.node.Children()) <= d.threshold {
		return fmt.Errorf("The number of children cannot be lower than the vote threshold %d", d.threshold)
	}
	tx.Join(graph.OnCommit(func() {
		if e.ChildName() == edgeName(d.next-1) {
			d.next--
		}
	}))
	return tx.Detach(e)
}

// CanReplace implements graph.ChildReplacer: a copy that nobody else uses. What it has need not be
// what the quorum shows, to mend which is why it is replaced.
func (d *quorum) CanReplace(below *graph.Node) bool {
	for _, e := range d.node.Children() {
		if e.Node() == below {
			return len(below.Parents()) == 1
		}
	}
	return false
}
