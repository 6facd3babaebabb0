package graph

import "qblockd/graph/perm"

// Allocated is how many bytes of the host n takes: what own tells of it; else that of what it
// filters, or the sum of the children with its data. Negative: it is not known, as own says, or as
// nothing is known of the children of a node that is a leaf.
func Allocated(n *Node, leaf func(*Node) bool, own func(*Node, Sizer) int64) (sum int64) {
	if s, ok := n.Driver().(Sizer); ok {
		if size := own(n, s); size >= 0 {
			return size
		}
	}
	if leaf(n) {
		return -1
	}
	for _, e := range n.Children() {
		if e.Role()&(perm.Data|perm.Metadata|perm.Filtered) == 0 {
			continue
		}
		size := Allocated(e.Node(), leaf, own)
		if size < 0 {
			return -1
		}
		sum += size
	}
	return sum
}
