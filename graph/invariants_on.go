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
		for e := range n.parents.all() {
			if e.Node() != n || !e.attached {
				panic(fmt.Sprintf("graph: parent edge '%s' of node %s leads elsewhere", e.name, n.name))
			}
			counts.Add(e.Claim(), 1)
		}
		if counts != n.counts {
			panic(fmt.Sprintf("graph: node %s: counts %v, edges make %v", n.name, n.counts, counts))
		}
		if counts.Conflict() {
			panic("graph: permission conflict installed on node " + n.name)
		}
		quiet := quiescence(0)
		for _, e := range n.kids.Load().all {
			if e.pnode != n || !e.attached {
				panic(fmt.Sprintf("graph: child edge '%s' of node %s is not its own", e.name, n.name))
			}
			if e.Node().quiesce.quiet() {
				quiet++
			}
		}
		if n.quiesce < quiet {
			panic(fmt.Sprintf("graph: node %s: quiesce %d with %d quiet children", n.name, n.quiesce, quiet))
		}
	}
}
