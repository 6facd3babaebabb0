package graph

import (
	"slices"

	"qblockd/graph/perm"
)

// planner is the part of a Tx that tries its actions out: they are kept as a list, and applied anew
// to a draft when the graph has changed meanwhile.
type planner struct {
	g       *Graph
	ops     []func(d *txDraft) error
	draft   *txDraft // of version; nil: to be made
	version uint64
	err     error // of the action that failed
	over    bool
}

// do applies an action to the draft and keeps it for replay.
func (p *planner) do(op func(d *txDraft) error) error {
	if err := p.usable(); err != nil {
		return err
	}
	p.g.mu.RLock()
	defer p.g.mu.RUnlock()
	if p.g.closed {
		p.err = errClosing
		return p.err
	}
	var d *txDraft
	if d, p.err = p.draftLocked(); p.err == nil {
		p.err = op(d)
	}
	if p.err == nil {
		p.ops = append(p.ops, op)
	}
	return p.err
}

// usable is why the Tx takes no more actions.
func (p *planner) usable() error {
	if p.over {
		return errTxOver
	}
	return p.err
}

// draftLocked is the draft of all actions so far on the graph as it is now.
// +checklocksread:p.g.mu
func (p *planner) draftLocked() (*txDraft, error) {
	few := len(p.g.names) <= perm.MaxDepth
	if p.draft != nil && p.version == p.g.version {
		p.draft.Few = few
		return p.draft, nil
	}
	d := newTxDraft()
	d.Few = few
	for _, op := range p.ops {
		if err := op(d); err != nil {
			return nil, err
		}
	}
	p.draft, p.version = d, p.g.version
	return d, nil
}

// read calls f with the draft. It does nothing when the actions do not apply any more.
func (p *planner) read(f func(d *txDraft)) {
	p.g.mu.RLock()
	defer p.g.mu.RUnlock()
	if d, err := p.draftLocked(); err == nil {
		f(d)
	}
}

// Try tells whether the rules of permissions allow what the Tx does so far, as Commit would: for
// callers that have to report that before what comes later. It reserves nothing.
func (p *planner) Try() error {
	_, err := p.plan()
	return err
}

// Need is what the parents of n need of it as the Tx would leave them; as they are, if they may not
// do what the Tx does.
func (p *planner) Need(n *Node) (need perm.Perm) {
	if delta, err := p.plan(); err == nil {
		if up, ok := delta.Up[n]; ok {
			return up.Need
		}
	}
	for _, e := range n.Parents() {
		need |= e.Claim().Need
	}
	return need
}

func (p *planner) plan() (*perm.Delta[*Node, *Edge], error) {
	if err := p.usable(); err != nil {
		return nil, err
	}
	p.g.mu.RLock()
	defer p.g.mu.RUnlock()
	d, err := p.draftLocked()
	if err != nil {
		return nil, err
	}
	p.draft = nil // Plan changes it
	return d.Plan()
}

// Parents are the edges above n as the Tx would leave them, newest first.
func (p *planner) Parents(n *Node) (l []*Edge) {
	p.read(func(d *txDraft) { l = slices.Collect(d.Parents(n)) })
	return l
}

// Node finds a node as Graph.Node does once the Tx is committed: also one that the Tx publishes.
func (p *planner) Node(name string) (n *Node) {
	p.read(func(d *txDraft) {
		switch h := p.g.names[name].node; {
		case h == nil:
		case h.state == nodePublished:
			n = h
		case h.state == nodeHidden:
			if r := d.refs[h]; r != nil && r.publish {
				n = h
			}
		}
	})
	return n
}
