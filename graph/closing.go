package graph

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/graph/blk"
)

// closeNode ends a node in state closing, to which nothing leads any more: it stores and
// flushes, closes the driver, lets go of the children (and closes those that nothing refers to
// then), and gives the name free. It blocks as long as the storage does.
func (g *Graph) closeNode(n *Node) {
	if err := g.shutdown(context.Background(), n); err != nil {
		slog.Warn("closing a node", "node", n.name, "error", err)
	}
	tx := g.Begin(context.Background())
	tx.Ending()
	ignoreClosing(tx.do(func(d *txDraft) error {
		for _, e := range d.Children(n) {
			d.detach(e)
		}
		return nil
	}))
	ignoreClosing(tx.Commit())
	g.mu.Lock()
	n.state = nodeClosed
	delete(g.names, n.name)
	g.mu.Unlock()
}

// shutdown stores what must be stored and closes the driver, once: whoever comes second
// waits for the first. The node must be quiet.
func (g *Graph) shutdown(ctx context.Context, n *Node) error {
	g.mu.Lock()
	drv := n.drv
	if drv == nil {
		g.mu.Unlock()
		return nil
	}
	if r := n.rareLocked(); r.shut != nil { // +checklocksignore: of the same graph
		g.mu.Unlock()
		return await(ctx, r.shut)
	}
	shut := make(chan struct{})
	n.rare.shut = shut
	g.mu.Unlock()
	defer close(shut)
	r := &blk.Req{Ctx: ctx}
	var errs []error
	if i, ok := drv.(Inactivator); ok && !n.ReadOnly() && !n.Failed() {
		errs = append(errs, n.guard.careful(func() error { return i.Inactivate(r) }))
	}
	errs = append(errs, n.io.flushNode(r))
	errs = append(errs, n.guard.careful(drv.Close))
	g.shutdowns.Add(1)
	if p := &trace.NodeClose; p.On() {
		p.Log(slog.String("node", n.name))
	}
	if _, ok := drv.(Drainer); ok {
		g.drainers.Add(-1)
	}
	return errors.Join(errs...)
}

// CloseError tells what went wrong while a graph was closed; everything else was flushed and
// closed.
type CloseError struct {
	// Stuck are the nodes that could not be closed in time.
	Stuck []string
	// Errs are the errors of the others.
	Errs []error
}

func (e *CloseError) Error() string {
	var s []string
	if len(e.Stuck) > 0 {
		s = append(s, "nodes with requests that do not end: "+strings.Join(e.Stuck, ", "))
	}
	for _, err := range e.Errs {
		s = append(s, err.Error())
	}
	return strings.Join(s, "; ")
}

// Unwrap gives the errors.
func (e *CloseError) Unwrap() []error { return e.Errs }

// Close ends the graph for good: it closes all gates, waits for the units of work, and flushes and
// closes all nodes, parents before children, in parallel. A deadline of ctx, or its patience
// (Patient), is kept: nodes in which requests are stuck by three fifths of the time are only
// flushed, and what does not come back from its storage in time is left behind; all this is
// reported as a *CloseError. No Tx may be begun any more.
func (g *Graph) Close(ctx context.Context) error {
	c := &closer{g: g, ctx: ctx, state: map[*Node]*closing{}}
	g.mu.Lock()
	if !g.closed {
		close(g.stop)
	}
	g.closed = true
	for _, h := range g.names {
		if h.node != nil {
			c.nodes = append(c.nodes, h.node)
		}
	}
	d := g.beginDrainLocked(c.nodes, nil)
	g.mu.Unlock()

	drainCtx, cancel := Share(ctx, 3, 5)
	_ = d.wait(drainCtx) // what is not quiet now is found below
	if res, err := g.holds.acquire(drainCtx, c.nodes, nil); err == nil {
		defer g.holds.release(res)
	}
	cancel()
	c.findStuck(d)

	ordered, cancel := Share(ctx, 3, 4)
	defer cancel()
	c.start(ordered)
	return c.result()
}

// closer closes all nodes of a graph.
type closer struct {
	g     *Graph
	ctx   context.Context
	nodes []*Node

	mu    sync.Mutex
	state map[*Node]*closing
	left  int
	done  chan struct{} // closed when left is 0
	errs  []error
}

// closing is how far a node is.
type closing struct {
	parents        int  // that are not closed yet
	open           bool // it had a driver when Close began
	flushOnly      bool
	started, ended bool
}

// findStuck marks the nodes that a request still under way may be in.
func (c *closer) findStuck(d *drain) {
	c.g.mu.RLock()
	defer c.g.mu.RUnlock()
	for _, n := range c.nodes {
		c.state[n] = &closing{open: n.drv != nil}
	}
	var below func(n *Node)
	below = func(n *Node) {
		s := c.state[n]
		if s == nil || s.flushOnly {
			return
		}
		s.flushOnly = true
		for _, e := range n.kids.Load().all {
			below(e.Node())
		}
	}
	for _, n := range c.nodes {
		if n.rare != nil && n.rare.held {
			below(n) // a command on it does not end
		}
	}
	for _, r := range d.gates {
		if r.InFlight() > 0 {
			below(r.edge.Node())
		}
	}
	for _, n := range c.nodes {
		if c.state[n].flushOnly {
			continue
		}
		for _, e := range n.kids.Load().all {
			if s := c.state[e.Node()]; s != nil {
				s.parents++
			}
		}
	}
	c.left = len(c.nodes)
	c.done = make(chan struct{})
}

// start runs the closing until all is done or the time is up; what still waits for a parent
// when ordered ends is flushed without waiting on.
func (c *closer) start(ordered context.Context) {
	c.mu.Lock()
	if c.left == 0 {
		c.mu.Unlock()
		return
	}
	for _, n := range c.nodes {
		if s := c.state[n]; s.flushOnly || s.parents == 0 {
			c.runLocked(n)
		}
	}
	c.mu.Unlock()
	select {
	case <-c.done:
		return
	case <-ordered.Done():
	}
	c.mu.Lock()
	for _, n := range c.nodes {
		if s := c.state[n]; !s.started {
			s.flushOnly = true
			c.runLocked(n)
		}
	}
	c.mu.Unlock()
	select {
	case <-c.done:
	case <-c.ctx.Done():
	}
}

// +checklocks:c.mu
func (c *closer) runLocked(n *Node) {
	s := c.state[n]
	if s.started {
		return
	}
	s.started = true
	flushOnly := s.flushOnly
	panics.Go("the end of node '"+n.name+"'", func() {
		var err error
		switch {
		case !s.open: // its opener is still at it
		case flushOnly:
			err = n.io.flushNode(&blk.Req{Ctx: c.ctx})
		default:
			err = c.g.shutdown(c.ctx, n)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		s.ended = true
		if err != nil {
			c.errs = append(c.errs, fmt.Errorf("node '%s': %w", n.name, err))
		}
		if !flushOnly {
			for _, e := range n.kids.Load().all {
				if k := c.state[e.Node()]; k != nil {
					if k.parents--; k.parents == 0 {
						c.runLocked(e.Node())
					}
				}
			}
		}
		if c.left--; c.left == 0 {
			close(c.done)
		}
	}, nil)
}

// result clears the graph away and reports.
func (c *closer) result() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	res := &CloseError{Errs: c.errs}
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	for r := range c.g.roots.all() {
		r.shut()
	}
	for _, n := range c.nodes {
		s := c.state[n]
		if !s.ended || s.flushOnly && s.open {
			res.Stuck = append(res.Stuck, n.name)
			continue
		}
		n.state = nodeClosed
		delete(c.g.names, n.name)
	}
	c.g.published, c.g.owned = list[Node]{}, list[Node]{}
	c.g.version++
	if len(res.Stuck) == 0 && len(res.Errs) == 0 {
		return nil
	}
	return res
}
