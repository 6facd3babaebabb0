package graph

import (
	"context"
	"log/slog"
	"slices"

	"qblockd/events/panics"
	"qblockd/graph/perm"
)

// commit is one Tx on its way through the phases.
type commit struct {
	tx    *Tx
	g     *Graph
	draft *txDraft
	delta *perm.Delta[*Node, *Edge]
	// version of the graph that draft and delta were made on
	version uint64
	res     *reservation
	drain   *drain
	links   bool // it is in g.pending

	taken  []*Node       // nodes whose PermTaker is prepared
	joined []Participant // whose Prepare was called
	idlers []idler
	in     *installer
	dying  []*Node
}

// Commit makes all changes or none. Errors: those of the rules (package perm), of checks
// and participants, of the Recorder, and the context's; then the graph is as before. Nodes that
// nothing refers to any more are closed before it returns.
//
//	plan -> reserve -> (plan again) -> checks -> drain -> prepare -> record -> install -> undrain
//	     -> release -> close
func (tx *Tx) Commit() error {
	if err := tx.usable(); err != nil {
		tx.Abort()
		return err
	}
	tx.over = true
	c := &commit{tx: tx, g: tx.g}
	if err := c.run(); err != nil {
		c.undo()
		tx.forgetFresh()
		return err
	}
	c.install()
	c.finish()
	return nil
}

// run does all that may fail; a panic is a failure.
func (c *commit) run() (err error) {
	defer panics.Into("a transaction of the graph", &err)
	if err := c.reserve(); err != nil {
		return err
	}
	for _, f := range c.tx.checks {
		if err := f(); err != nil {
			return err
		}
	}
	c.drain = c.g.beginDrain(unique(c.draft.drains), unique(c.draft.roots))
	if err := c.drain.wait(c.tx.ctx); err != nil {
		return err
	}
	if err := c.prepare(c.tx.ctx); err != nil {
		return err
	}
	return c.record()
}

// reserve plans the changes and reserves all nodes they touch, until nothing that matters changed
// in between.
func (c *commit) reserve() error {
	tx, g := c.tx, c.g
	var want []*Node
	for {
		err := c.plan()
		if err != nil {
			return err
		}
		want = unique(want, c.delta.Order, c.draft.refd, c.draft.reserve)
		if c.res, err = g.resv.acquire(tx.ctx, want, nil); err != nil {
			return err
		}
		grown, wait, err := c.settle(want)
		if err != nil {
			return err
		}
		if len(grown) == len(want) && wait == nil {
			return nil
		}
		g.resv.release(c.res)
		c.res, want = nil, grown
		if wait != nil {
			if err := await(tx.ctx, wait); err != nil {
				return err
			}
		}
	}
}

// plan is planLocked of the graph as it is.
func (c *commit) plan() error {
	c.g.mu.RLock()
	defer c.g.mu.RUnlock()
	return c.planLocked()
}

// settle looks, with the nodes of want reserved, whether the plan still holds: it does if grown is
// no more than want and there is nothing to wait for. Its edges are known to others then.
func (c *commit) settle(want []*Node) (grown []*Node, wait <-chan struct{}, err error) {
	g := c.g
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, nil, errClosing
	}
	if c.version != g.version {
		if err := c.planLocked(); err != nil {
			return nil, nil, err
		}
	}
	if grown = unique(want, c.delta.Order, c.draft.refd, c.draft.reserve); len(grown) == len(want) {
		wait = g.addLinksLocked(c)
	}
	return grown, wait, nil
}

// planLocked makes the plan on the graph as it is now.
// +checklocksread:c.g.mu
func (c *commit) planLocked() (err error) {
	if c.draft, err = c.tx.draftLocked(); err != nil { // +checklocksignore: of the same graph
		return err
	}
	c.tx.draft = nil // Plan changes it
	c.version = c.g.version
	c.delta, err = c.draft.Plan()
	return err
}

// addLinksLocked makes the edges to come known, so that two transactions on disjoint nodes cannot
// close a cycle together. It returns a channel to wait on if another one's are in the way.
// +checklocks:g.mu
func (g *Graph) addLinksLocked(c *commit) <-chan struct{} {
	var links []link
	for _, l := range c.draft.links {
		// What has no parents is below nothing.
		if !l.parent.parents.empty() || l.parent.state == nodePublished {
			links = append(links, l)
		}
	}
	if len(links) == 0 {
		return nil
	}
	if len(g.pending) > 0 {
		for _, l := range links {
			if c.draft.reachesPending(g.pending, l.child, l.parent) {
				return g.pendingLess.wait()
			}
		}
	}
	g.pending[c] = links
	c.links = true
	return nil
}

// reachesPending is Reaches with the edges that other commits are about to make.
func (d *txDraft) reachesPending(pending map[*commit][]link, from, to *Node) bool {
	others := map[*Node][]*Node{}
	for _, links := range pending {
		for _, l := range links {
			others[l.parent] = append(others[l.parent], l.child)
		}
	}
	seen := map[*Node]bool{from: true}
	stack := []*Node{from}
	for len(stack) > 0 {
		n := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if n == to {
			return true
		}
		visit := func(c *Node) {
			if !seen[c] {
				seen[c] = true
				stack = append(stack, c)
			}
		}
		for _, e := range d.Children(n) {
			visit(d.Target(e))
		}
		for _, l := range others[n] {
			visit(l)
		}
	}
	return false
}

// +checklocks:c.g.mu
func (c *commit) dropLinksLocked() {
	if !c.links {
		return
	}
	c.links = false
	delete(c.g.pending, c)
	c.g.pendingLess.send()
}

// prepare does all that may fail or block.
func (c *commit) prepare(ctx context.Context) error {
	if err := c.join(ctx, c.tx.first); err != nil {
		return err
	}
	// A hidden node on top of what changes may get its driver this very moment; its opener settles
	// its claims.
	drivers := make([]Driver, len(c.delta.Order))
	c.g.mu.RLock()
	for i, n := range c.delta.Order {
		drivers[i] = n.drv
	}
	c.g.mu.RUnlock()
	for i, n := range c.delta.Order {
		t, ok := drivers[i].(PermTaker)
		up := c.delta.Up[n]
		if c.draft.Node(n).Inactive {
			up = perm.Unused
		}
		if !ok || n.state >= nodeClosing || up == n.applied && !c.draft.again[n] {
			continue
		}
		if err := n.guard.careful(func() error { return t.PermPrepare(ctx, up) }); err != nil {
			if ctx.Err() == nil && up.Loosens(n.applied) {
				// Giving up rights cannot be refused; the old ones stay taken. (Who has gone gets
				// nothing: all is undone.)
				slog.Warn("permissions could not be lowered", "node", n.name, "error", err)
				continue
			}
			return err
		}
		c.taken = append(c.taken, n)
	}
	return c.join(ctx, c.tx.last)
}

func (c *commit) join(ctx context.Context, l []Participant) error {
	for _, p := range l {
		c.joined = append(c.joined, p)
		if err := c.careful(func() error { return p.Prepare(ctx) }); err != nil {
			return err
		}
	}
	return nil
}

// undo takes back what run did before it failed.
func (c *commit) undo() {
	nFirst := min(len(c.joined), len(c.tx.first))
	for _, p := range slices.Backward(c.joined[nFirst:]) {
		c.certain(p.Abort)
	}
	for _, n := range slices.Backward(c.taken) {
		n.guard.careful(func() error { n.drv.(PermTaker).PermAbort(); return nil })
	}
	for _, p := range slices.Backward(c.joined[:nFirst]) {
		c.certain(p.Abort)
	}
	if c.drain != nil {
		c.drain.end()
	}
	if c.links {
		c.g.mu.Lock()
		c.dropLinksLocked()
		c.g.mu.Unlock()
	}
	if c.res != nil {
		c.g.resv.release(c.res)
	}
}

// careful calls a participant. After a panic the nodes that the transaction holds quiet are in
// doubt, as its participants are about those.
func (c *commit) careful(f func() error) (err error) {
	defer panics.Catch("a transaction of the graph", func(bug error) {
		err = bug
		for _, n := range c.draft.drains {
			n.Fail(bug)
		}
	})
	return f()
}

// certain is careful for what cannot fail.
func (c *commit) certain(f func()) { _ = c.careful(func() error { f(); return nil }) }

// idler is a node whose driver wants to know whether it has parents: whether that was so before.
type idler struct {
	n   *Node
	was bool
}

// findIdlers looks for those whose parents the commit may change.
// +checklocks:c.g.mu
func (c *commit) findIdlers() {
	for _, n := range c.delta.Order {
		if _, ok := n.drv.(Idler); ok {
			c.idlers = append(c.idlers, idler{n, n.parents.empty()})
		}
	}
}

// tellIdlers tells those for whom it has changed; it is done before requests go on.
func (c *commit) tellIdlers() {
	for _, i := range c.idlers {
		c.g.mu.RLock()
		idle := i.n.parents.empty()
		c.g.mu.RUnlock()
		if idle != i.was {
			i.n.guard.careful(func() error { i.n.drv.(Idler).Idle(idle); return nil })
		}
	}
}

// install changes the graph. It cannot fail and does not wait.
func (c *commit) install() {
	defer panics.Fatal("the installation of a transaction of the graph")
	g := c.g
	g.mu.Lock()
	defer g.mu.Unlock()
	g.version++
	c.findIdlers()
	c.in = &installer{g: g}
	for _, f := range c.draft.prims {
		f(c.in)
	}
	for e, claim := range c.delta.Claims {
		c.in.setClaim(e, claim)
	}
	for _, n := range c.taken {
		n.applied = c.delta.Up[n]
		if n.inactive.Load() {
			n.applied = perm.Unused
		}
	}
	for _, n := range c.draft.refd {
		r := c.draft.refs[n]
		n.pins += r.pins
		if r.publish && n.state == nodeHidden {
			n.state = nodePublished
			g.insertPublishedLocked(n)
			if h := c.tx.hold; h != nil {
				h.adopt(n) // +checklocksignore: of the same graph
			}
		}
		g.setOwnedLocked(n, r.owned)
	}
	c.retire(c.delta.Order)
	c.retire(c.draft.refd)
	c.dropLinksLocked()
	if invariantsOn {
		g.checkNodesLocked(c.delta.Order)
	}
}

// retire takes out of sight those of the nodes that nothing refers to any more; finish closes them.
// +checklocks:c.g.mu
func (c *commit) retire(nodes []*Node) {
	for _, n := range nodes {
		if n.owned || n.pins > 0 || !n.parents.empty() || n.state >= nodeClosing {
			continue
		}
		if n.state == nodePublished {
			c.g.published.remove(&n.listed)
		}
		n.state = nodeClosing
		c.dying = append(c.dying, n)
	}
}

// finish ends what run began and closes nodes, all outside g.mu.
func (c *commit) finish() {
	c.tellIdlers()
	nFirst := min(len(c.joined), len(c.tx.first))
	for _, p := range c.joined[:nFirst] {
		c.certain(p.Commit)
	}
	for _, n := range c.taken {
		n.guard.careful(func() error { n.drv.(PermTaker).PermCommit(); return nil })
	}
	for _, p := range c.joined[nFirst:] {
		c.certain(p.Commit)
	}
	if len(c.in.reopened) > 0 {
		c.g.mu.Lock()
		for _, n := range c.in.reopened {
			n.io.refreshed()
		}
		c.g.mu.Unlock()
	}
	c.drain.end()
	c.g.resv.release(c.res)
	for _, n := range c.dying {
		c.closeUnlessHeld(n)
	}
}
