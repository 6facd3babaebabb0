package graph

import (
	"context"
	"sync/atomic"
	"time"

	"qblockd/events/panics"
)

const (
	// patienceTick is how often a patient context looks whether anything has moved.
	patienceTick = 25 * time.Millisecond
	// boundPatience is how many times longer a patient context lasts while a driver is bound to its
	// storage.
	boundPatience = 20
)

type patienceKey struct{}

// patience is how much longer its context lasts while nothing moves, in ns.
type patience struct {
	g    *Graph
	left atomic.Int64
}

// Patient makes a context that ends when nothing in the graph has moved for d in all: slow storage
// gets the time that it needs, storage that does not answer does not. What moves are units of work
// that end, nodes that are closed, and bytes that drivers bring to their medium (Lagging). Where
// nothing shows, storage that the end of the process would have to wait for gets boundPatience
// times as long.
func (g *Graph) Patient(parent context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	p := &patience{g: g}
	p.left.Store(int64(d))
	ctx, cancel := context.WithCancelCause(context.WithValue(parent, patienceKey{}, p))
	panics.Go("the watch over the end", func() { p.watch(ctx, cancel) }, nil)
	return ctx, func() { cancel(nil) }
}

func (p *patience) watch(ctx context.Context, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(patienceTick)
	defer tick.Stop()
	was, _ := p.g.movement()
	at := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		is, bound := p.g.movement()
		now := time.Now()
		if is == was {
			spent := now.Sub(at)
			if bound {
				spent /= boundPatience
			}
			if p.left.Add(-int64(spent)) <= 0 {
				cancel(context.DeadlineExceeded)
				return
			}
		}
		was, at = is, now
	}
}

// Share makes a context for a part of the time that ctx has left: of its patience, or else until
// its deadline.
func Share(ctx context.Context, num, den time.Duration) (context.Context, context.CancelFunc) {
	if p, ok := ctx.Value(patienceKey{}).(*patience); ok {
		return p.g.Patient(ctx, time.Duration(p.left.Load())*num/den)
	}
	if t, ok := ctx.Deadline(); ok {
		return context.WithTimeout(ctx, time.Until(t)*num/den)
	}
	return context.WithCancel(ctx)
}

// movement changes when something moves. Two moments at which it is the same are almost certainly
// ones between which nothing has.
type movement struct{ lag, inFlight, closed int64 }

func (g *Graph) movement() (m movement, bound bool) {
	var lagging []Lagging
	g.mu.RLock()
	for _, h := range g.names {
		if n := h.node; n != nil {
			if l, ok := n.drv.(Lagging); ok {
				lagging = append(lagging, l)
			}
		}
	}
	for r := range g.roots.all() {
		m.inFlight += r.InFlight()
	}
	g.mu.RUnlock()
	for _, l := range lagging {
		lag, b := l.Lag()
		m.lag += lag
		bound = bound || b
	}
	m.closed = g.shutdowns.Load()
	return m, bound
}
