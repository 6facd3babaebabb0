package blockdev

import (
	"slices"
	"strconv"
	"sync/atomic"

	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// queries answers what clients ask about nodes.
type queries struct {
	finder
	*names
	asking atomic.Int32 // goroutines that ask for allocated sizes
}

// view is a node within one query.
type view struct {
	node   *graph.Node
	rec    *record
	info   *nodeInfo
	actual int64
	below  *view // of its backing-image, nil if it has none
	depth  int   // number of images below
	size   int   // of the encoded image with those below, at most
}

// views prepares a query over the nodes: at the end each has its info, and its chain if deep.
func (q *queries) views(nodes []*graph.Node, deep bool) []view {
	vs := make([]view, len(nodes))
	var at map[*graph.Node]*view
	if deep {
		at = make(map[*graph.Node]*view, len(nodes))
	}
	for i, n := range nodes {
		vs[i] = q.view(n)
		if deep {
			at[n] = &vs[i]
		}
	}
	if deep {
		for i := range vs {
			q.linkBelow(&vs[i], at)
		}
	}
	return vs
}

func (q *queries) view(n *graph.Node) view {
	r := q.record(n)
	info := q.info(n, r)
	const extra = 64 // {, "backing-image": , and the allocated size
	return view{node: n, rec: r, info: info, size: len(info.image[0]) + len(info.image[1]) + extra}
}

// linkBelow fills in what v, and the chain under it, know of what is below them.
func (q *queries) linkBelow(v *view, at map[*graph.Node]*view) {
	var chain []*view
	for v.below == nil {
		e := graph.Now.FilterOrCOWChild(v.node)
		if e == nil {
			break
		}
		next := at[e.Node()]
		if next == nil { // published since the list was taken
			late := q.view(e.Node())
			late.actual = q.actualSize(late.node, late.rec)
			next, at[e.Node()] = &late, &late
		}
		v.below = next
		chain = append(chain, v)
		v = next
	}
	for _, x := range slices.Backward(chain) {
		x.depth = x.below.depth + 1
		x.size += x.below.size
	}
}

// appendImage appends the image of v with those below.
func (v *view) appendImage(b []byte) []byte {
	b = append(b, '{')
	if v.below != nil {
		b = append(b, `"backing-image": `...)
		b = v.below.appendImage(b)
		b = append(b, ", "...)
	}
	b = append(b, v.info.image[0]...)
	b = appendActual(b, v.actual)
	return append(b, v.info.image[1]...)
}

func (v *view) append(b []byte) []byte {
	b = append(b, v.info.dev[0]...)
	b = v.appendImage(b)
	b = append(b, v.info.dev[1]...)
	b = strconv.AppendInt(b, int64(v.depth), 10)
	return append(b, v.info.dev[2]...)
}

// NamedNodes is the answer to query-named-block-nodes: all nodes, newest first; unless flat with
// the images below each. room has to agree to about that many bytes first. It waits at most 20 ms
// for allocated sizes; otherwise its cost is the size of the answer.
func (q *queries) NamedNodes(flat bool, room func(n int64) error) ([]byte, error) {
	vs := q.views(q.g.Nodes(), !flat)
	q.refreshActual(vs)
	size := 2
	for i := range vs {
		vs[i].actual = q.actualSize(vs[i].node, vs[i].rec)
		size += vs[i].size + vs[i].info.devSize() + 32
	}
	if err := room(int64(size)); err != nil {
		return nil, err
	}
	b := append(make([]byte, 0, size), '[')
	for i := range vs {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = vs[i].append(b)
	}
	return append(b, ']'), nil
}

// AppendNodeStats appends the answer to query-blockstats with query-nodes: all nodes, oldest first.
func (q *queries) AppendNodeStats(b []byte) []byte {
	nodes := q.g.Nodes()
	b = append(b, '[')
	for i, n := range slices.Backward(nodes) {
		if i < len(nodes)-1 {
			b = append(b, ", "...)
		}
		b = nodeStats(n).AppendJSON(b)
	}
	return append(b, ']')
}

// nodeStats are the counters of n and, nested, of the child that holds its data.
func nodeStats(n *graph.Node) *types.BlockStats {
	name := n.Name()
	s := &types.BlockStats{NodeName: &name, Stats: *n.IO().Stats()}
	if d, ok := n.Driver().(graph.StatsReporter); ok {
		s.DriverSpecific = d.DriverStats()
	}
	if e := dataChild(n); e != nil {
		s.Parent = nodeStats(e.Node())
	}
	return s
}

// dataChild is the primary child if it has the node's data, else the only child that has any.
func dataChild(n *graph.Node) *graph.Edge {
	var found *graph.Edge
	for _, e := range n.Children() {
		switch {
		case e.Role()&perm.Primary != 0 && e.Role()&(perm.Data|perm.Filtered) != 0:
			return e
		case e.Role()&perm.Data == 0:
		case found != nil:
			return nil
		default:
			found = e
		}
	}
	return found
}
