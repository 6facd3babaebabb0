package graph

import (
	"fmt"

	"qblockd/graph/perm"
)

// freeze is the holder of a frozen chain.
type freeze struct{ _ byte }

// chainEdges are the filter and COW edges from top down to base (nil: to the end).
func (d *txDraft) chainEdges(top, base *Node) (l []*Edge) {
	v := View{d}
	for _, n := range v.Chain(top, base) {
		if e := v.FilterOrCOWChild(n); e != nil {
			l = append(l, e)
		}
	}
	return l
}

// FreezeChain makes the filter and COW edges from top down to base (nil: to the end) unchangeable
// from commit on, until Thaw or until unfreeze is called (any number of times). Error: one is
// frozen already, or leads to a node that says NeverFreeze.
func (tx *Tx) FreezeChain(top, base *Node) (unfreeze func(), err error) {
	return tx.freeze(func(d *txDraft) ([]*Edge, error) {
		edges := d.chainEdges(top, base)
		for _, e := range edges {
			if n := d.Target(e); d.isFrozen(e) && !n.opts.Load().NeverFreeze {
				return nil, fmt.Errorf("Cannot change '%s' link from '%s' to '%s'", e.name, e.parentName(), n.name)
			}
		}
		for _, e := range edges {
			if n := d.Target(e); n.opts.Load().NeverFreeze {
				return nil, fmt.Errorf("Cannot freeze '%s' link to '%s'", e.name, n.name)
			}
		}
		return edges, nil
	})
}

// FreezeOverlays makes the filter and COW edges that lead to n unchangeable from commit on, as
// FreezeChain does those below it; n may be a filter that must not be passed over while its job
// runs. Thawed by ThawOverlays.
func (tx *Tx) FreezeOverlays(n *Node) (unfreeze func(), err error) {
	return tx.freeze(func(d *txDraft) ([]*Edge, error) {
		edges := d.overlayEdges(n)
		for _, e := range edges {
			if d.isFrozen(e) {
				return nil, fmt.Errorf("Cannot change '%s' link from '%s' to '%s'", e.name, e.parentName(), n.name)
			}
		}
		return edges, nil
	})
}

// overlayEdges are the filter and COW edges that lead to n.
func (d *txDraft) overlayEdges(n *Node) []*Edge {
	var l []*Edge
	for e := range d.Parents(n) {
		if e.pnode != nil && e.role&(perm.COW|perm.Filtered) != 0 {
			l = append(l, e)
		}
	}
	return l
}

// freeze freezes the edges that find gives, for the time until unfreeze or a thawing action.
func (tx *Tx) freeze(find func(d *txDraft) ([]*Edge, error)) (unfreeze func(), err error) {
	token := &freeze{}
	var edges []*Edge // of the last replay
	err = tx.do(func(d *txDraft) error {
		l, err := find(d)
		if err != nil {
			return err
		}
		for _, e := range l {
			d.setFrozen(e, token)
		}
		edges = l
		return nil
	})
	if err != nil {
		return nil, err
	}
	return func() {
		tx.g.mu.Lock()
		defer tx.g.mu.Unlock()
		for _, e := range edges {
			if e.frozen == token {
				e.frozen = nil
				tx.g.version++
			}
		}
	}, nil
}

// Thaw ends the freezing of these edges within the Tx: the actions that follow may change
// them, and nobody else gets in between. On Abort they stay frozen.
func (tx *Tx) Thaw(top, base *Node) error {
	return tx.do(func(d *txDraft) error {
		for _, e := range d.chainEdges(top, base) {
			d.setFrozen(e, nil)
		}
		return nil
	})
}

// ThawOverlays is Thaw for what FreezeOverlays has frozen.
func (tx *Tx) ThawOverlays(n *Node) error {
	return tx.do(func(d *txDraft) error {
		for _, e := range d.overlayEdges(n) {
			d.setFrozen(e, nil)
		}
		return nil
	})
}

func (d *txDraft) setFrozen(e *Edge, token *freeze) {
	d.frozen[e] = token
	d.reserve = append(d.reserve, e.pnode)
	d.prims = append(d.prims, func(in *installer) { e.frozen = token })
}
