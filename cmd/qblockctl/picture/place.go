package picture

import (
	"cmp"
	"math"
	"slices"
)

// place finds the horizontal places: each cell as near as it can be to the weighted mean of its
// neighbours, without changing the order or coming too close. Rows are done from top to bottom and
// back, until they settle.
func (p *plan) place() {
	for _, row := range p.rows {
		x := 0.0
		for i, c := range row {
			if i > 0 {
				x += p.apart(row[i-1], c)
			}
			p.cells[c].x = x
		}
	}
	for pass := range 24 {
		for row := range p.inTurn(pass%2 == 0) {
			p.placeRow(row)
		}
	}
	left := math.Inf(1)
	for i := range p.cells {
		left = min(left, p.cells[i].x-p.cells[i].w/2)
	}
	for i := range p.cells {
		p.cells[i].x -= left
	}
}

// apart is how far the centres of neighbours have to be from each other.
func (p *plan) apart(a, b int) float64 { return p.cells[a].w/2 + p.cells[b].w/2 + gapX }

// placeRow puts the cells of a row where the sum of weighted squares of what they miss their wish
// by is least: the wishes, less the room that the cells before need, have to rise; those that do
// not are pooled at their mean.
func (p *plan) placeRow(row []int) {
	type pool struct {
		at, weight float64
		n          int
	}
	var pools []pool
	offset := make([]float64, len(row))
	for i, c := range row {
		if i > 0 {
			offset[i] = offset[i-1] + p.apart(row[i-1], c)
		}
		wish, weight := p.cells[c].x, 0.1
		sum, total := 0.0, 0.0
		for _, n := range slices.Concat(p.up[c], p.down[c]) {
			sum += n.weight * p.cells[n.cell].x
			total += n.weight
		}
		if total > 0 {
			wish, weight = sum/total, total
		}
		next := pool{wish - offset[i], weight, 1}
		for len(pools) > 0 && pools[len(pools)-1].at > next.at {
			last := pools[len(pools)-1]
			w := last.weight + next.weight
			next = pool{(last.at*last.weight + next.at*next.weight) / w, w, last.n + next.n}
			pools = pools[:len(pools)-1]
		}
		pools = append(pools, next)
	}
	i := 0
	for _, pl := range pools {
		for range pl.n {
			p.cells[row[i]].x = pl.at + offset[i]
			i++
		}
	}
}

// extent is the size of the part.
func (p *plan) extent() (w, h float64) {
	for i := range p.cells {
		w = max(w, p.cells[i].x+p.cells[i].w/2)
	}
	for i := range p.rows {
		h += p.rowHeight(i) + gapY
	}
	return w, h - gapY
}

func (p *plan) rowHeight(r int) (h float64) {
	for _, c := range p.rows[r] {
		h = max(h, p.cells[c].h)
	}
	return h
}

// emit adds the part to a layout, with its upper left corner at x, y.
func (p *plan) emit(l *Layout, x, y float64) {
	top := make([]float64, len(p.rows)+1)
	top[0] = y
	for r := range p.rows {
		top[r+1] = top[r] + p.rowHeight(r) + gapY
	}
	for i := range p.cells {
		if c := &p.cells[i]; c.node >= 0 {
			l.Boxes[c.node] = Box{round(x + c.x - c.w/2), round(top[c.rank]), c.w, c.h}
		}
	}
	for i, way := range p.chain {
		from, to := &p.cells[way[0]], &p.cells[way[len(way)-1]]
		box := l.Boxes[from.node]
		start := round(x + p.port(i, way[0], true))
		pts := []Point{{start, box.Y + box.H}, {start, round(top[from.rank] + p.rowHeight(from.rank))}}
		for _, c := range way[1 : len(way)-1] {
			lane := &p.cells[c]
			cx := round(x + lane.x)
			pts = append(pts, Point{cx, round(top[lane.rank])}, Point{cx, round(top[lane.rank] + p.rowHeight(lane.rank))})
		}
		end := Point{round(x + p.port(i, way[len(way)-1], false)), round(top[to.rank])}
		pts = append(pts, end)
		// Names of edges that end beside each other go to different heights.
		stagger := float64(slices.Index(p.ends(way[len(way)-1], false), i) % 3 * 11)
		l.Routes = append(l.Routes, Route{p.edges[i], pts, Point{end.X + 5, end.Y - 8 - stagger}})
	}
}

func round(f float64) float64 { return math.Round(f*10) / 10 }

// port is where edge i leaves or reaches a box: edges spread over its width in the order of where
// they go to.
func (p *plan) port(i, c int, leaving bool) float64 {
	ends := p.ends(c, leaving)
	k := slices.Index(ends, i)
	w := p.cells[c].w
	// The middle of the box for one; near the middle for few.
	step := min(w/float64(len(ends)+1), 44)
	return p.cells[c].x + (float64(k)-float64(len(ends)-1)/2)*step
}

// ends are the edges that leave or reach a box, by the place of their next cell.
func (p *plan) ends(c int, leaving bool) (l []int) {
	next := func(e int) float64 {
		way := p.chain[e]
		if leaving {
			return p.cells[way[1]].x
		}
		return p.cells[way[len(way)-2]].x
	}
	for e, way := range p.chain {
		if leaving && way[0] == c || !leaving && way[len(way)-1] == c {
			l = append(l, e)
		}
	}
	slices.SortStableFunc(l, func(a, b int) int { return cmp.Compare(next(a), next(b)) })
	return l
}
