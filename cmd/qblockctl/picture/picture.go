// Package picture draws a graph of block nodes: as a tree in text, in the language of Graphviz, and
// as SVG laid out here.
//
//	picture.go  the graph
//	text.go     tree for a terminal, and the language of Graphviz
//	layout.go   ranks, orders, places: where boxes and edges of a picture go
//	place.go    the horizontal places of one row
//	svg.go      the picture of a layout
//
// Everything is pure: the same graph gives the same bytes.
package picture

// Kind is what a box stands for; it gives the colour.
type Kind string

// The kinds of boxes.
const (
	Export   Kind = "export"
	Job      Kind = "job"
	Root     Kind = "root"     // any other user of a node
	Format   Kind = "format"   // a node with a format or filter driver
	Protocol Kind = "protocol" // a node without children
)

// Node is a box.
type Node struct {
	Kind   Kind
	Name   string   // what users call it
	Label  string   // in front of the name where it is no block node: "export", "job mirror"
	Traits []string // short words: driver, size, "read-only"
	File   string   // file name; "" if there is none to show
	Tip    string   // more, for those who point at the box
}

// Edge leads from a user to what it uses.
type Edge struct {
	From, To int    // indices of nodes
	Name     string // "file", "backing", "root", ...
	Tip      string
}

// Graph is what is drawn. It has no cycles; edges that would make one are not drawn.
type Graph struct {
	Nodes []Node
	Edges []Edge
}

// main tells whether an edge carries the line that the eye follows: the disk as its user sees it.
func (e *Edge) main() bool { return e.Name != "file" && e.Name != "data-file" }

// acyclic returns the edges without those that close a cycle or lead nowhere.
func (g *Graph) acyclic() []Edge {
	const open, done = 1, 2
	state := make([]int, len(g.Nodes))
	out := g.from()
	var good []Edge
	var visit func(n int)
	visit = func(n int) {
		state[n] = open
		for _, e := range out[n] {
			if state[e.To] == 0 {
				visit(e.To)
			}
			if state[e.To] != open {
				good = append(good, e)
			}
		}
		state[n] = done
	}
	for n := range g.Nodes {
		if state[n] == 0 {
			visit(n)
		}
	}
	return good
}

// from groups the sound edges by their user, files first.
func (g *Graph) from() [][]Edge {
	out := make([][]Edge, len(g.Nodes))
	for _, isMain := range []bool{false, true} {
		for _, e := range g.Edges {
			if e.main() == isMain && e.From >= 0 && e.From < len(g.Nodes) && e.To >= 0 && e.To < len(g.Nodes) {
				out[e.From] = append(out[e.From], e)
			}
		}
	}
	return out
}

// tops are the nodes nobody uses, in the order of the graph; those that look into the middle of
// what others use go last.
func tops(n int, edges []Edge) []int {
	users, inside := make([]int, n), make([]bool, n)
	for _, e := range edges {
		users[e.To]++
	}
	for _, e := range edges {
		inside[e.From] = inside[e.From] || users[e.From] == 0 && users[e.To] > 1 && e.Name == "root"
	}
	var l, last []int
	for i := range n {
		switch {
		case users[i] > 0:
		case inside[i]:
			last = append(last, i)
		default:
			l = append(l, i)
		}
	}
	return append(l, last...)
}

// shorten cuts the middle out of a text of more than n characters: the end of a file name says
// most.
func shorten(s string, n int) string {
	r := []rune(s)
	if len(r) <= n || n < 4 {
		return s
	}
	head := (n - 1) / 3
	return string(r[:head]) + "…" + string(r[len(r)-(n-1-head):])
}
