// Package chain is how jobs and commands walk backing chains.
package chain

import "qblockd/graph"

// Contains tells whether n is top or below it, as far as filters and backing files go.
func Contains(top, n *graph.Node) bool {
	for top != nil && top != n {
		top = Below(top)
	}
	return top != nil
}

// Between are top and the nodes below it, as far as filters and backing files go, down to end, which is none of them; nil is the end of the chain.
func Between(top, end *graph.Node) (l []*graph.Node) {
	for ; top != nil && top != end; top = Below(top) {
		l = append(l, top)
	}
	return l
}

// Below is the node below n in its chain of filters and backing files, or nil; nil for nil.
func Below(n *graph.Node) *graph.Node {
	if n == nil {
		return nil
	}
	if e := n.FilterOrCOWChild(); e != nil {
		return e.Node()
	}
	return nil
}

// Overlay is the node above n in the chain from top downwards that is not a filter and has n, or a filter on n, as its backing file; nil if there is none.
// With n nil it is the last one of the chain.
func Overlay(top, n *graph.Node) *graph.Node {
	for top = top.SkipFilters(); ; {
		e := top.Backing()
		switch {
		case e == nil && n == nil:
			return top
		case e == nil:
			return nil
		case n != nil && e.Node().SkipFilters() == n.SkipFilters():
			return top
		}
		top = e.Node().SkipFilters()
	}
}
