package picture

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// sample is a chain of disks, each with its file, an export on top and one in the middle, and some
// that stand alone.
func sample(depth, alone int) *Graph {
	g := &Graph{}
	add := func(n Node) int { g.Nodes = append(g.Nodes, n); return len(g.Nodes) - 1 }
	top := add(Node{Kind: Export, Label: "export", Name: "e", Traits: []string{"nbd", "writable"}})
	mid := add(Node{Kind: Job, Label: "job stream", Name: "j", Traits: []string{"running", "40%"}})
	above, edge := top, "root"
	for i := range depth {
		n := add(Node{Kind: Format, Name: fmt.Sprintf("disk%d", i), Traits: []string{"qcow2", "1 GiB", "read-only", "bitmap b", "encrypted"}})
		f := add(Node{Kind: Protocol, Name: fmt.Sprintf("disk%d-f", i), Traits: []string{"file"}, File: strings.Repeat("/very/long", i) + "/disk.qcow2"})
		g.Edges = append(g.Edges, Edge{From: above, To: n, Name: edge}, Edge{From: n, To: f, Name: "file"})
		if i == depth/2 {
			g.Edges = append(g.Edges, Edge{From: mid, To: n, Name: "main node"})
		}
		above, edge = n, "backing"
	}
	for i := range alone {
		add(Node{Kind: Protocol, Name: fmt.Sprintf("alone%d <&>\"'", i), Tip: "a\x00b"})
	}
	return g
}

func random(r *rand.Rand) *Graph {
	g := &Graph{}
	n := 1 + r.IntN(40)
	for i := range n {
		g.Nodes = append(g.Nodes, Node{Kind: Format, Name: fmt.Sprintf("n%d", i), Traits: []string{strings.Repeat("x", r.IntN(40))}})
	}
	for range r.IntN(2 * n) {
		g.Edges = append(g.Edges, Edge{From: r.IntN(n), To: r.IntN(n), Name: []string{"file", "backing", "root"}[r.IntN(3)]})
	}
	return g
}

func graphs() []*Graph {
	r := rand.New(rand.NewPCG(1, 2))
	l := []*Graph{{}, sample(0, 1), sample(1, 0), sample(14, 4), sample(3, 30)}
	for range 150 {
		l = append(l, random(r))
	}
	return l
}

// TestLayout: no box covers another, all is within the picture, and each edge runs from the lower
// border of its user to the upper border of what it uses without crossing a box.
func TestLayout(t *testing.T) {
	for i, g := range graphs() {
		l := Lay(g)
		for a, p := range l.Boxes {
			if p.W <= 0 || p.H <= 0 || p.X < 0 || p.Y < 0 || p.X+p.W > l.Width || p.Y+p.H > l.Height {
				t.Errorf("graph %d: box %d %+v is not in the picture of %v x %v", i, a, p, l.Width, l.Height)
			}
			for b, q := range l.Boxes[:a] {
				if p.X < q.X+q.W && q.X < p.X+p.W && p.Y < q.Y+q.H && q.Y < p.Y+p.H {
					t.Errorf("graph %d: boxes %d and %d overlap: %+v %+v", i, b, a, q, p)
				}
			}
		}
		for _, r := range l.Routes {
			from, to := l.Boxes[r.Edge.From], l.Boxes[r.Edge.To]
			first, last := r.Points[0], r.Points[len(r.Points)-1]
			if first.Y != from.Y+from.H || first.X < from.X || first.X > from.X+from.W {
				t.Errorf("graph %d: edge %+v begins at %+v, not below %+v", i, r.Edge, first, from)
			}
			if last.Y != to.Y || last.X < to.X || last.X > to.X+to.W {
				t.Errorf("graph %d: edge %+v ends at %+v, not on %+v", i, r.Edge, last, to)
			}
			for _, p := range r.samples() {
				for b, box := range l.Boxes {
					if p.X > box.X && p.X < box.X+box.W && p.Y > box.Y && p.Y < box.Y+box.H {
						t.Errorf("graph %d: edge %+v crosses box %d at %+v", i, r.Edge, b, p)
					}
				}
			}
		}
	}
}

// samples are points along the route as svg.go draws it.
func (r *Route) samples() (l []Point) {
	for i := 1; i < len(r.Points); i++ {
		a, b := r.Points[i-1], r.Points[i]
		for k := range 21 {
			t := float64(k) / 20
			x, y := a.X+(b.X-a.X)*t, a.Y+(b.Y-a.Y)*t
			if i%2 == 0 {
				s := t * t * (3 - 2*t) // the curve's x: its control points have those of the ends
				mid := (a.Y + b.Y) / 2
				u := 1 - t
				x, y = a.X+(b.X-a.X)*s, u*u*u*a.Y+3*u*u*t*mid+3*u*t*t*mid+t*t*t*b.Y
			}
			l = append(l, Point{x, y})
		}
	}
	return l
}

// TestEdgesAreDrawn: all edges but those that close a cycle are there, once.
func TestEdgesAreDrawn(t *testing.T) {
	g := sample(10, 3)
	if l := Lay(g); len(l.Routes) != len(g.Edges) {
		t.Errorf("%d of %d edges", len(l.Routes), len(g.Edges))
	}
	cycle := &Graph{Nodes: make([]Node, 3), Edges: []Edge{
		{From: 0, To: 1}, {From: 1, To: 2}, {From: 2, To: 0}, {From: 1, To: 1}, {From: 0, To: 9},
	}}
	if l := Lay(cycle); len(l.Routes) != 2 {
		t.Errorf("%d edges of a cycle", len(l.Routes))
	}
}

// TestChainIsStraight: the disk as its user sees it goes down in one line.
func TestChainIsStraight(t *testing.T) {
	l := Lay(sample(14, 0))
	first, last := l.Boxes[2], l.Boxes[2+13*2]
	if d := first.X + first.W/2 - last.X - last.W/2; d > 120 || d < -120 {
		t.Errorf("the chain drifts by %v", d)
	}
	if l.Width > 900 {
		t.Errorf("a single chain takes a width of %v", l.Width)
	}
}

// TestBig: a daemon with thousands of nodes can be looked at.
func TestBig(t *testing.T) {
	g := sample(200, 5000)
	for range 20 {
		part, at := sample(3, 0), len(g.Nodes)
		g.Nodes = append(g.Nodes, part.Nodes...)
		for _, e := range part.Edges {
			e.From, e.To = e.From+at, e.To+at
			g.Edges = append(g.Edges, e)
		}
	}
	begin := time.Now()
	if err := SVG(io.Discard, g); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("it took %v", d)
	} else {
		t.Log(d)
	}
}

func TestSVG(t *testing.T) {
	for i, g := range graphs() {
		var b, again bytes.Buffer
		if err := SVG(&b, g); err != nil {
			t.Fatal(err)
		}
		_ = SVG(&again, g)
		if !bytes.Equal(b.Bytes(), again.Bytes()) {
			t.Errorf("graph %d: two pictures of one graph", i)
		}
		rects := 0
		for d := xml.NewDecoder(&b); ; {
			tok, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("graph %d: %v\n%s", i, err, again.String())
			}
			if e, ok := tok.(xml.StartElement); ok && e.Name.Local == "rect" {
				rects++
			}
		}
		if rects != len(g.Nodes)+1 {
			t.Errorf("graph %d: %d rectangles for %d nodes", i, rects, len(g.Nodes))
		}
	}
}

// TestText: each node has one line of its own, none is wider than a terminal, and a long chain goes
// down, not in.
func TestText(t *testing.T) {
	var b bytes.Buffer
	g := sample(14, 2)
	if err := Text(&b, g); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(b.String()) {
		if n := len([]rune(line)); n > 120 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	for _, n := range g.Nodes {
		if c := strings.Count(b.String(), " "+n.Name+" ("); c != 1 && !strings.HasPrefix(n.Name, "alone") {
			t.Errorf("%s has %d lines:\n%s", n.Name, c, b.String())
		}
	}
	small := &Graph{
		Nodes: []Node{
			{Label: "export", Name: "e", Traits: []string{"nbd"}}, {Name: "top", Traits: []string{"qcow2"}},
			{Name: "f", File: "a.img"}, {Name: "base"}, {Label: "job stream", Name: "j"},
		},
		Edges: []Edge{{From: 0, To: 1, Name: "root"}, {From: 1, To: 3, Name: "backing"}, {From: 1, To: 2, Name: "file"}, {From: 4, To: 3, Name: "main node"}},
	}
	want := `export e (nbd)
└─ root: top (qcow2)
   ├─ file: f a.img
   ▼ backing: base
job stream j
└─ main node: base  (see above)
`
	b.Reset()
	if err := Text(&b, small); err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
	b.Reset()
	if err := Dot(&b, small); err != nil || !strings.Contains(b.String(), `n1 -> n3 [label="backing"`) || !strings.Contains(b.String(), `label="f\na.img"`) {
		t.Errorf("%v\n%s", err, b.String())
	}
	for i, g := range graphs() {
		b.Reset()
		if err := Text(&b, g); err != nil {
			t.Fatal(err)
		}
		for _, n := range g.Nodes {
			if !strings.Contains(b.String(), n.Name) {
				t.Errorf("graph %d: no line for %s", i, n.Name)
			}
		}
	}
}
