package copy

import (
	"context"
	"sync"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// BothGates are the gates of two roots, of a job whose context is ctx: each unit of work passes
// both, and its request is one of a. Nobody waits at one of them while inside the other.
func BothGates(ctx context.Context, a, b *graph.Root) Gate {
	return &bothGates{a: a, b: b, ctx: ctx, with: map[*blk.Req]*blk.Req{}}
}

type bothGates struct {
	a, b *graph.Root
	ctx  context.Context
	mu   sync.Mutex
	with map[*blk.Req]*blk.Req // of b for each unit; guarded by mu
}

// Begin implements Gate.
func (g *bothGates) Begin() (*blk.Req, error) {
	for {
		r, err := g.a.Begin(g.ctx)
		if err != nil {
			return nil, err
		}
		if t := g.b.TryBegin(); t != nil {
			g.mu.Lock()
			g.with[r] = t
			g.mu.Unlock()
			return r, nil
		}
		g.a.End(r)
		t, err := g.b.Begin(g.ctx)
		if err != nil {
			return nil, err
		}
		g.b.End(t)
	}
}

// End implements Gate.
func (g *bothGates) End(r *blk.Req) {
	g.mu.Lock()
	t := g.with[r]
	delete(g.with, r)
	g.mu.Unlock()
	g.b.End(t)
	g.a.End(r)
}
