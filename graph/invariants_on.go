//go:build invariants

package graph

import (
	"fmt"

	"qblockd/graph/perm"
)

// invariantsOn switches costly checks on.
const invariantsOn = true

// checkNodes panics when the graph contradicts itself at one of the nodes.
// +checklocks:g.mu
func (g *Graph) checkNodesLocked(nodes []*Node) {
	for _, n := range nodes {
		if n.state == nodeClosed {
			continue
		}
		var counts perm.Counts
		cow := int32(0)
		for e := n.parents.head; e != nil; e = e.next {
			if e.Node() != n || !e.attached {
				panic(fmt.Sprintf("graph: parent edge '%s' of node %s leads elsewhere", e.name, n.name))
			}
			counts.Add(e.Claim(), 1)
			if e.role&perm.COW != 0 {
				cow++
			}
		}
		if counts != n.counts || cow != n.cowParents {
			panic(fmt.Sprintf("graph: node %s: counts %v, edges make %v", n.name, n.counts, counts))
		}
		if counts.Conflict() {
			panic("graph: permission conflict installed on node " + n.name)
		}
		quiet := int32(0)
		for _, e := range n.kids.Load().all {
			if e.pnode != n || !e.attached {
				panic(fmt.Sprintf("graph: child edge '%s' of node %s is not its own", e.name, n.name))
			}
			if e.Node().quiesce > 0 {
				quiet++
			}
		}
		if n.quiesce < quiet {
			panic(fmt.Sprintf("graph: node %s: quiesce %d with %d quiet children", n.name, n.quiesce, quiet))
		}
	}
}
