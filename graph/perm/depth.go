package perm

import "fmt"

// MaxDepth is how many nodes may lie one below the other. A request goes through them by recursion,
// and each asks those below for their size: what it takes grows faster than the depth.
const MaxDepth = 2048

// DepthError: an edge would make a chain of more than MaxDepth nodes.
type DepthError struct{ Child, Role, Parent string }

func (e *DepthError) Error() string {
	return fmt.Sprintf("Making '%s' a %s child of '%s' would make a chain of more than %d nodes", e.Child, e.Role, e.Parent, MaxDepth)
}

// checkLink tells whether an edge from parent to n may be made: *CycleError, *DepthError. It costs
// as much as there are nodes above and below.
func (d *Draft[N, E]) checkLink(parent N, role string, n N) error {
	if d.Reaches(n, parent) {
		return &CycleError{d.Node(n).Name, role, d.Node(parent).Name}
	}
	if d.Few {
		return nil
	}
	below, above := d.walk(n, d.nodesBelow), d.walk(parent, d.nodesAbove)
	if len(below)+len(above) <= MaxDepth { // as deep as there are nodes, at most
		return nil
	}
	if longest(below, d.nodesBelow)+longest(above, d.nodesAbove) <= MaxDepth {
		return nil
	}
	return &DepthError{d.Node(n).Name, role, d.Node(parent).Name}
}

func (d *Draft[N, E]) nodesBelow(n N, visit func(N)) {
	for _, e := range d.Children(n) {
		visit(d.Target(e))
	}
}

func (d *Draft[N, E]) nodesAbove(n N, visit func(N)) {
	var zero N
	for e := range d.Parents(n) {
		if p := d.Edge(e).Parent; p != zero {
			visit(p)
		}
	}
}

// walk lists from and what next leads to from there, each once and behind all that it leads to.
func (d *Draft[N, E]) walk(from N, next func(N, func(N))) []N {
	seen := map[N]bool{from: true}
	type visit struct {
		n    N
		left []N // of what next gives for n: not visited yet
	}
	enter := func(n N) visit {
		v := visit{n: n}
		next(n, func(m N) { v.left = append(v.left, m) })
		return v
	}
	var list []N
	for stack := []visit{enter(from)}; len(stack) > 0; {
		top := &stack[len(stack)-1]
		if len(top.left) == 0 {
			list = append(list, top.n)
			stack = stack[:len(stack)-1]
			continue
		}
		m := top.left[len(top.left)-1]
		top.left = top.left[:len(top.left)-1]
		if !seen[m] {
			seen[m] = true
			stack = append(stack, enter(m))
		}
	}
	return list
}

// longest is the number of nodes on the longest path from the last of what walk has listed.
func longest[N comparable](list []N, next func(N, func(N))) int {
	depth := make(map[N]int, len(list))
	for _, n := range list {
		most := 0
		next(n, func(m N) { most = max(most, depth[m]) })
		depth[n] = most + 1
	}
	return depth[list[len(list)-1]]
}
