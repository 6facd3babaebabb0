package picture

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
)

// Text draws the graph as a tree: users on top, what they use below. A node that several use is
// drawn once and pointed to afterwards. What backs a node goes straight below it, not further in,
// so that long chains stay readable.
func Text(w io.Writer, g *Graph) error {
	t := &tree{g: g, shown: make([]bool, len(g.Nodes))}
	if len(g.Nodes) == 0 {
		t.line("", "no block nodes")
	}
	edges := g.acyclic()
	t.out = (&Graph{Nodes: g.Nodes, Edges: edges}).from()
	for _, n := range tops(len(g.Nodes), edges) {
		t.line("", t.name(n))
		t.below("", n)
	}
	_, err := io.WriteString(w, t.b.String())
	return err
}

type tree struct {
	g     *Graph
	out   [][]Edge
	shown []bool
	b     strings.Builder
}

func (t *tree) line(prefix, text string) { t.b.WriteString(prefix + text + "\n") }

// below draws what n uses, each line behind prefix.
func (t *tree) below(prefix string, n int) {
	t.shown[n] = true
	for {
		next := -1
		for i, e := range t.out[n] {
			last := i == len(t.out[n])-1
			if last && e.Name == "backing" {
				next = e.To
				break
			}
			branch, inside := "├─ ", "│  "
			if last {
				branch, inside = "└─ ", "   "
			}
			again := t.shown[e.To]
			t.line(prefix+branch+e.Name+": ", t.ref(e.To))
			if !again {
				t.below(prefix+inside, e.To)
			}
		}
		if next < 0 {
			return
		}
		again := t.shown[next]
		t.line(prefix+"▼ backing: ", t.ref(next))
		if again {
			return
		}
		t.shown[next] = true
		n = next
	}
}

// ref is the line of a node, or what points to the line that is there already.
func (t *tree) ref(n int) string {
	if t.shown[n] {
		return t.g.Nodes[n].Name + "  (see above)"
	}
	return t.name(n)
}

func (t *tree) name(n int) string {
	nd := &t.g.Nodes[n]
	traits := ""
	if len(nd.Traits) > 0 {
		traits = "(" + strings.Join(nd.Traits, ", ") + ")"
	}
	l := []string{nd.Label, nd.Name, traits, shorten(nd.File, 60)}
	return printable(strings.Join(slices.DeleteFunc(l, func(s string) bool { return s == "" }), " "))
}

// printable replaces what a terminal would take for more than text.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, s)
}

// Dot writes the graph for Graphviz.
func Dot(w io.Writer, g *Graph) error {
	var b strings.Builder
	b.WriteString("digraph block {\n  node [shape=box, style=\"rounded,filled\", fontname=\"monospace\", fontsize=10];\n" +
		"  edge [fontname=\"monospace\", fontsize=9];\n")
	for i := range g.Nodes {
		n := &g.Nodes[i]
		fmt.Fprintf(&b, "  n%d [label=%s, tooltip=%s, fillcolor=\"%s\"];\n",
			i, quoteDot(strings.Join(n.lines(), "\n")), quoteDot(n.Tip), colours[n.Kind].fill)
	}
	for _, e := range g.Edges {
		fmt.Fprintf(&b, "  n%d -> n%d [label=%s, tooltip=%s];\n", e.From, e.To, quoteDot(e.Name), quoteDot(e.Tip))
	}
	b.WriteString("}\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func quoteDot(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`).Replace(s) + `"`
}
