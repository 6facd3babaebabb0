package export

import (
	"errors"
	"fmt"
	"sync"

	"qblockd/graph"
	"qblockd/schema/types"
)

// iothreads says which group serves which nodes. Nodes that are connected belong together: they are
// assigned as one. All exports of connected nodes are served by one group, but for those whose
// iothread another export forbade.
type iothreads struct {
	// mu is held while nodes are assigned and while exports that care are attached. Graph.mu and
	// Table.mu are taken under it.
	mu    sync.Mutex
	group map[*graph.Node]Workers // +checklocks:mu
}

// errFixed: an export keeps its node where it is.
var errFixed = errors.New("Cannot change iothread of active block backend")

// lookup finds an iothread object; nil if there is none.
func (t *Table) lookup(id string) Workers {
	if t.opts.Iothread == nil {
		return nil
	}
	return t.opts.Iothread(id)
}

// asked is the group that block-export-add names, or nil.
func (t *Table) asked(o *types.BlockExportOptions) (w Workers, err error) {
	if o.Iothread == nil {
		return nil, nil
	}
	if w = t.lookup(*o.Iothread); w == nil {
		return nil, fmt.Errorf("iothread \"%s\" not found", *o.Iothread)
	}
	return w, nil
}

// SetIothread moves n and all nodes it is connected to into the iothread of that id, or out of all
// for nil. Their exports are served by its workers from their next request on. Exports with a fixed
// iothread forbid a change; any export of n itself forbids it without force. It does not block.
// Source: QAPI, x-blockdev-set-iothread.
func (t *Table) SetIothread(n *graph.Node, id *string, force bool) error {
	if !force && hasBackend(n) {
		return fmt.Errorf("Node %s is associated with a BlockBackend and could be in use (use force=true to override this check)", n.Name())
	}
	var w Workers
	if id != nil {
		if w = t.lookup(*id); w == nil {
			return fmt.Errorf("Cannot find iothread %s", *id)
		}
	}
	t.iothreads.mu.Lock()
	defer t.iothreads.mu.Unlock()
	return t.assign(n, w)
}

// hasBackend tells whether a backend uses n directly.
func hasBackend(n *graph.Node) bool {
	for _, e := range n.Parents() {
		if r := e.ParentRoot(); r != nil && r.Spec().Kind == graph.KindBackend {
			return true
		}
	}
	return false
}

// assign makes w the group of all nodes connected to n, and of their exports.
// +checklocks:t.iothreads.mu
func (t *Table) assign(n *graph.Node, w Workers) error {
	i := &t.iothreads
	for x := range i.group {
		if t.g.Node(x.Name()) != x {
			delete(i.group, x) // closed since
		}
	}
	if i.find(n) == w {
		return nil
	}
	all := connected(n, func(*graph.Node) bool { return true })
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range t.list {
		if types.Or(x.Options.FixedIothread, false) && !x.closing && all[x.Root.Node()] {
			return errFixed
		}
	}
	for x := range all {
		if w == nil {
			delete(i.group, x)
			continue
		}
		if i.group == nil {
			i.group = map[*graph.Node]Workers{}
		}
		i.group[x] = w
	}
	for _, x := range t.list {
		if all[x.Root.Node()] {
			x.setWorkers(w)
		}
	}
	return nil
}

// find is the group that serves n: its own, or that of the nearest node it has become connected to.
// +checklocks:i.mu
func (i *iothreads) find(n *graph.Node) (w Workers) {
	if len(i.group) == 0 {
		return nil
	}
	connected(n, func(x *graph.Node) bool {
		w = i.group[x] // +checklocksignore: called before find returns
		return w == nil
	})
	return w
}

// connected are n and all nodes that edges lead to from there, up or down; the search, nearest
// first, ends when more says so.
func connected(n *graph.Node, more func(*graph.Node) bool) map[*graph.Node]bool {
	seen := map[*graph.Node]bool{n: true}
	for next := []*graph.Node{n}; len(next) > 0; next = next[1:] {
		x := next[0]
		if !more(x) {
			break
		}
		add := func(y *graph.Node) {
			if y != nil && !seen[y] {
				seen[y] = true
				next = append(next, y)
			}
		}
		for _, e := range x.Children() {
			add(e.Node())
		}
		for _, e := range x.Parents() {
			add(e.ParentNode())
		}
	}
	return seen
}

// place moves the node of a new export into the group that was asked for, if any, and takes the
// export there. Unless fixed, the export goes where the node is if that cannot be changed. undo
// takes it back.
// +checklocks:t.iothreads.mu
func (t *Table) place(x *Export, w Workers) (undo func(), err error) {
	n := x.Root.Node()
	before := t.iothreads.find(n)
	if w != nil {
		if err := t.assign(n, w); err != nil && types.Or(x.Options.FixedIothread, false) {
			return nil, err
		}
	}
	x.setWorkers(t.iothreads.find(n))
	return func() { t.assign(n, before) }, nil // +checklocksignore: undo is called with the lock held, too
}
