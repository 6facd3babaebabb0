package copybeforewrite

import (
	"slices"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// TrackReaders is called with what the filter's children are going to be, before it is in use;
// Close undoes it. A target above the source, such as an overlay of it, shows the point in time to
// its own readers: what was copied, and the source for the rest. What such a reader is about to get
// from the source must not change before it has it; so a copy waits for the reads of the target
// that it overlaps, and the guest's write for the copy.
func (s *State) TrackReaders(source, target *graph.Node) {
	if !slices.Contains(target.NodesBelow(), source.SkipFilters()) {
		return
	}
	s.readersOver = target.IO().TrackReads()
	s.flags |= blk.Serialising
}
