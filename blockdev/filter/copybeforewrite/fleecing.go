package copybeforewrite

import (
	"qblockd/graph"
	"qblockd/graph/blk"
)

// TrackReaders is called with what the filter's children are going to be, before it is in use; Close undoes it. A target above the source, such as an overlay of it, shows the point in
// time to its own readers: what was copied, and the source for the rest. What such a reader is about to get from the source must not change
// before it has it; so a copy waits for the reads of the target that it overlaps, and the guest's write for the copy.
func (s *State) TrackReaders(source, target *graph.Node) {
	if !leadsTo(target, source.SkipFilters(), map[*graph.Node]bool{}) {
		return
	}
	s.readersOver = target.TrackReads()
	s.flags |= blk.Serialising
}

// leadsTo tells whether n is or lies above to. seen are the nodes from which it is known not to be reached.
func leadsTo(n, to *graph.Node, seen map[*graph.Node]bool) bool {
	if n == to {
		return true
	}
	if seen[n] {
		return false
	}
	seen[n] = true
	for _, e := range n.Children() {
		if leadsTo(e.Node(), to, seen) {
			return true
		}
	}
	return false
}
