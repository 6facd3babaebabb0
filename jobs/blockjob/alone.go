package blockjob

import "qblockd/graph"

// StandsAlone tells whether what n, or a node below it, does not hold reads as zeroes for good: no
// image there has a backing file, or names one that could be opened some day. It takes the graph's
// lock.
func StandsAlone(n *graph.Node) bool {
	for _, b := range n.NodesBelow() {
		if !b.Caps().Backing {
			continue
		}
		if b.Backing() != nil {
			return false
		}
		if d, ok := b.Driver().(graph.Backed); ok {
			if name, _ := d.BackingFile(); name != "" {
				return false
			}
		}
	}
	return true
}
