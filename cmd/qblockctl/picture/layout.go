package picture

import (
	"cmp"
	"iter"
	"math"
	"slices"
	"unicode/utf8"
)

// The measures of a picture in pixels. Text is monospaced: a character is as wide as charWidth
// says, so that boxes fit without a font at hand.
const (
	charWidth  = 7.3
	lineHeight = 16.0
	padding    = 10.0
	gapX       = 26.0 // between boxes of a row
	gapY       = 52.0 // between rows: room for the curves and the names of edges
	margin     = 20.0
	laneWidth  = 14.0 // what an edge takes that passes a row
	maxWidth   = 1500.0
	maxChars   = 34 // of a line in a box
)

// Box is where a node is: X, Y is its upper left corner.
type Box struct{ X, Y, W, H float64 }

// Point is a place.
type Point struct{ X, Y float64 }

// Route is the way of an edge: from the lower border of its user, through lanes between other
// boxes, to the upper border of what it leads to. Segments at odd indices (Points[1] to Points[2],
// ...) lie between two rows, the others are vertical and pass a row.
type Route struct {
	Edge   Edge
	Points []Point
	Label  Point
}

// Layout is a picture: boxes in the order of the graph's nodes.
type Layout struct {
	Width, Height float64
	Boxes         []Box
	Routes        []Route
}

// cell is what takes room in a row: a box or a lane.
type cell struct {
	node  int // -1: a lane
	rank  int
	w, h  float64
	x     float64 // of the centre
	order int     // in its row
}

// link joins cells of neighbouring rows.
type link struct {
	from, to int // cells
	weight   float64
}

// neighbour is what a link leads to.
type neighbour struct {
	cell   int
	weight float64
}

// plan is one connected part on its way to being laid out.
type plan struct {
	g     *Graph
	cells []cell
	links []link
	rows  [][]int       // cells by rank and order
	up    [][]neighbour // of each cell, in the row above
	down  [][]neighbour // in the row below
	chain [][]int       // cells of each edge of edges, from user to child
	edges []Edge
}

// Lay finds the places of everything. Parts that nothing connects are laid out one by one, and
// packed: below one another while the line is high enough, then beside, then in a new line.
func Lay(g *Graph) *Layout {
	l := &Layout{Boxes: make([]Box, len(g.Nodes))}
	edges := g.acyclic()
	x, y, columnW, lineH := margin, margin, 0.0, 0.0
	below := y // where the next part of this column would begin
	out := (&Graph{Nodes: g.Nodes, Edges: edges}).from()
	for _, part := range parts(len(g.Nodes), edges) {
		p := newPlan(g, part, out)
		p.arrange()
		w, h := p.extent()
		if below > y && below+h > y+lineH {
			x, columnW, below = x+columnW+2*gapX, 0, y
			if x+w > maxWidth {
				x, y = margin, y+lineH+gapY
				below, lineH = y, 0
			}
		}
		p.emit(l, x, below)
		l.Width, l.Height = max(l.Width, x+w+margin), max(l.Height, below+h+margin)
		columnW, lineH = max(columnW, w), max(lineH, below+h-y)
		below += h + gapY
	}
	return l
}

// parts are the connected components, each sorted.
func parts(n int, edges []Edge) (out [][]int) {
	near := make([][]int, n)
	for _, e := range edges {
		near[e.From] = append(near[e.From], e.To)
		near[e.To] = append(near[e.To], e.From)
	}
	seen := make([]bool, n)
	for i := range n {
		if seen[i] {
			continue
		}
		part := []int{i}
		seen[i] = true
		for k := 0; k < len(part); k++ {
			for _, m := range near[part[k]] {
				if !seen[m] {
					seen[m] = true
					part = append(part, m)
				}
			}
		}
		slices.Sort(part)
		out = append(out, part)
	}
	return out
}

// newPlan makes the cells of one part: a box for each node, a lane for each row that an edge
// passes.
func newPlan(g *Graph, part []int, out [][]Edge) *plan {
	p := &plan{g: g}
	for _, n := range part {
		p.edges = append(p.edges, out[n]...)
	}
	rank := p.ranks(part)
	at := map[int]int{}
	for _, n := range part {
		at[n] = len(p.cells)
		w, h := g.Nodes[n].size()
		p.cells = append(p.cells, cell{node: n, rank: rank[n], w: w, h: h})
	}
	for _, e := range p.edges {
		way := []int{at[e.From]}
		weight := 1.0
		if e.main() {
			weight = 30
		}
		for r := rank[e.From] + 1; r < rank[e.To]; r++ {
			p.cells = append(p.cells, cell{node: -1, rank: r, w: laneWidth})
			way = append(way, len(p.cells)-1)
		}
		way = append(way, at[e.To])
		for i := range len(way) - 1 {
			w := weight
			if i > 0 && i < len(way)-2 {
				w = 60 // between lanes: long edges are straight
			}
			p.links = append(p.links, link{way[i], way[i+1], w})
		}
		p.chain = append(p.chain, way)
	}
	p.up, p.down = make([][]neighbour, len(p.cells)), make([][]neighbour, len(p.cells))
	for _, k := range p.links {
		p.down[k.from] = append(p.down[k.from], neighbour{k.to, k.weight})
		p.up[k.to] = append(p.up[k.to], neighbour{k.from, k.weight})
	}
	return p
}

// ranks gives each node its row: below all its users, and users of nobody's right above what they
// use.
func (p *plan) ranks(part []int) map[int]int {
	rank, in := map[int]int{}, map[int]int{}
	out := map[int][]int{}
	for _, e := range p.edges {
		in[e.To]++
		out[e.From] = append(out[e.From], e.To)
	}
	var ready []int
	for _, n := range part {
		if in[n] == 0 {
			ready = append(ready, n)
		}
	}
	sources := slices.Clone(ready)
	for len(ready) > 0 {
		n := ready[0]
		ready = ready[1:]
		for _, m := range out[n] {
			rank[m] = max(rank[m], rank[n]+1)
			if in[m]--; in[m] == 0 {
				ready = append(ready, m)
			}
		}
	}
	for _, n := range sources {
		low := math.MaxInt
		for _, m := range out[n] {
			low = min(low, rank[m])
		}
		if low != math.MaxInt {
			rank[n] = low - 1
		}
	}
	return rank
}

// arrange orders the rows so that few edges cross, then places their cells.
func (p *plan) arrange() {
	p.firstOrder()
	best, bestRows := p.crossings(), p.copyRows()
	for sweep := range 12 {
		p.sweep(sweep%2 == 0)
		if c := p.crossings(); c < best {
			best, bestRows = c, p.copyRows()
		}
	}
	p.rows = bestRows
	p.number(p.rows...)
	p.place()
}

// firstOrder fills the rows depth first, so that what belongs together stands together.
func (p *plan) firstOrder() {
	rows := 0
	for i := range p.cells {
		rows = max(rows, p.cells[i].rank+1)
	}
	p.rows = make([][]int, rows)
	seen := make([]bool, len(p.cells))
	var visit func(c int)
	visit = func(c int) {
		if seen[c] {
			return
		}
		seen[c] = true
		p.rows[p.cells[c].rank] = append(p.rows[p.cells[c].rank], c)
		// What carries the line of the chain goes left, files right.
		for _, heavy := range []bool{true, false} {
			for _, k := range p.down[c] {
				if (k.weight > 1) == heavy {
					visit(k.cell)
				}
			}
		}
	}
	for c := range p.cells {
		if len(p.up[c]) == 0 {
			visit(c)
		}
	}
	p.number(p.rows...)
}

func (p *plan) number(rows ...[]int) {
	for _, row := range rows {
		for i, c := range row {
			p.cells[c].order = i
		}
	}
}

func (p *plan) copyRows() [][]int {
	rows := make([][]int, len(p.rows))
	for i, r := range p.rows {
		rows[i] = slices.Clone(r)
	}
	return rows
}

// sweep sorts each row by where its neighbours above (or below) are on average.
func (p *plan) sweep(down bool) {
	near := p.down
	if down {
		near = p.up
	}
	for row := range p.inTurn(down) {
		mean := map[int]float64{}
		for _, c := range row {
			sum := 0.0
			for _, o := range near[c] {
				sum += float64(p.cells[o.cell].order)
			}
			mean[c] = float64(p.cells[c].order)
			if len(near[c]) > 0 {
				mean[c] = sum / float64(len(near[c]))
			}
		}
		slices.SortStableFunc(row, func(a, b int) int { return cmp.Compare(mean[a], mean[b]) })
		p.number(row)
	}
}

// inTurn are the rows from top to bottom, or from the bottom up.
func (p *plan) inTurn(down bool) iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		for i := range p.rows {
			if !down {
				i = len(p.rows) - 1 - i
			}
			if !yield(p.rows[i]) {
				return
			}
		}
	}
}

// crossings counts the pairs of links that cross.
func (p *plan) crossings() int {
	byRow := make([][]link, len(p.rows))
	for _, k := range p.links {
		byRow[p.cells[k.from].rank] = append(byRow[p.cells[k.from].rank], k)
	}
	n := 0
	for _, links := range byRow {
		for i, a := range links {
			for _, b := range links[:i] {
				if (p.cells[a.from].order-p.cells[b.from].order)*(p.cells[a.to].order-p.cells[b.to].order) < 0 {
					n++
				}
			}
		}
	}
	return n
}

// size is the room that a node's text needs.
func (n *Node) size() (w, h float64) {
	lines := n.lines()
	chars := 8
	for _, s := range lines {
		chars = max(chars, utf8.RuneCountInString(s))
	}
	return math.Ceil(float64(chars)*charWidth + 2*padding), float64(len(lines))*lineHeight + 2*padding - 4
}
