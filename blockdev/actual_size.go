package blockdev

import (
	"context"
	"time"

	"qblockd/events/panics"
	"qblockd/graph"
)

const (
	sizePatience = 20 * time.Millisecond // how long a query waits for allocated sizes
	sizeParallel = 4                     // workers of one query
	sizeStuck    = 64                    // workers of all queries; more would only get stuck on the same storage
)

// primeActual asks for the allocated size of a node that was just opened. It blocks as long as the
// storage does, but no longer than ctx.
func (q *queries) primeActual(ctx context.Context, n *graph.Node) error {
	s, ok := n.Driver().(graph.Sizer)
	if !ok {
		return nil
	}
	r := q.record(n)
	return panics.Await(ctx, "a look at a file", func() { r.ask(s) })
}

func (r *record) ask(s graph.Sizer) {
	size, err := s.ActualSize()
	if err != nil {
		size = unknownSize
	}
	r.actual.Store(size)
}

// refreshActual lets workers ask for the allocated sizes of the nodes and waits for them, but
// not for long: what has not answered by then keeps its last known size.
func (q *queries) refreshActual(vs []view) {
	type job struct {
		r *record
		s graph.Sizer
	}
	jobs := make(chan job, len(vs))
	for i := range vs {
		if s, ok := vs[i].node.Driver().(graph.Sizer); ok && !vs[i].rec.asking.Load() {
			jobs <- job{vs[i].rec, s}
		}
	}
	close(jobs)
	if len(jobs) == 0 {
		return
	}
	ctx, late := context.WithTimeout(context.Background(), sizePatience)
	defer late()
	var wg panics.Group
	for range min(sizeParallel, len(jobs)) {
		if q.asking.Add(1) > sizeStuck {
			q.asking.Add(-1)
			break
		}
		wg.Go("allocated sizes", func() {
			defer q.asking.Add(-1)
			for j := range jobs {
				if ctx.Err() == nil && j.r.asking.CompareAndSwap(false, true) {
					j.r.ask(j.s)
					j.r.asking.Store(false)
				}
			}
		})
	}
	_ = panics.Await(ctx, "a wait for allocated sizes", wg.Wait)
}

// actualSize is the allocated size of n, whose record is r, as last heard: its own, that of what it
// filters, or the sum of the children with its data; unknownSize if it is not known.
func (q *queries) actualSize(n *graph.Node, r *record) int64 {
	return graph.Allocated(n, q.isProtocol, func(x *graph.Node, _ graph.Sizer) int64 {
		if x != n {
			r = q.record(x)
		}
		return r.actual.Load()
	})
}
