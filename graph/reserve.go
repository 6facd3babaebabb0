package graph

import (
	"context"
	"slices"
	"sync"
)

// reservations keep transactions off each other's nodes. One asks for all its nodes at
// once and gets all or waits for all: requests queue at each node in one global order, and
// one is granted when it heads all its queues. So nobody waits while holding, there is no
// deadlock, first come is first served, and disjoint requests do not meet.
type reservations struct {
	mu     sync.Mutex
	queues map[*Node][]*reservation // first: the holder
}

// reservation is a request for nodes, granted when ready is closed.
type reservation struct {
	nodes []*Node
	ahead int // queues in which somebody is before this one
	ready chan struct{}
}

// acquire reserves the nodes (no duplicates). It waits as long as others hold some of them or ctx
// lasts, and not once stop is closed.
func (r *reservations) acquire(ctx context.Context, nodes []*Node, stop <-chan struct{}) (*reservation, error) {
	q := &reservation{nodes: nodes}
	r.mu.Lock()
	if r.queues == nil {
		r.queues = map[*Node][]*reservation{}
	}
	for _, n := range nodes {
		l := r.queues[n]
		if len(l) > 0 {
			q.ahead++
		}
		r.queues[n] = append(l, q)
	}
	if q.ahead == 0 {
		r.mu.Unlock()
		return q, nil
	}
	q.ready = make(chan struct{})
	r.mu.Unlock()
	select {
	case <-q.ready:
		return q, nil
	case <-ctx.Done():
		r.release(q)
		return nil, context.Cause(ctx)
	case <-stop:
		r.release(q)
		return nil, errClosing
	}
}

// add adds a node that nobody has asked for to what q holds; it tells whether that is so.
func (r *reservations) add(q *reservation, n *Node) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.queues[n] != nil {
		return false
	}
	if r.queues == nil {
		r.queues = map[*Node][]*reservation{}
	}
	r.queues[n] = []*reservation{q}
	q.nodes = append(q.nodes, n)
	return true
}

// release gives the nodes to the next in their queues; it also withdraws a request that still
// waits.
func (r *reservations) release(q *reservation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range q.nodes {
		l := r.queues[n]
		if l[0] != q {
			i := slices.Index(l, q)
			r.queues[n] = slices.Concat(l[:i], l[i+1:])
			continue
		}
		if len(l) == 1 {
			delete(r.queues, n)
			continue
		}
		r.queues[n] = l[1:]
		next := l[1]
		if next.ahead--; next.ahead == 0 {
			close(next.ready)
		}
	}
}
