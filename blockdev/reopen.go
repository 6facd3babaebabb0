package blockdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"weak"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Reopen is the body of blockdev-reopen: nodes get the options that they are given, and defaults
// for those they are not; the nodes that they define follow where options are handed down. All
// change or none.
type Reopen struct {
	m     *Manager
	given []*types.BlockdevOptions
}

// Reopen makes it.
func (m *Manager) Reopen(given []*types.BlockdevOptions) *Reopen { return &Reopen{m, given} }

// Nodes are those that it will hold quiet. That one is not found is for Run to say.
func (r *Reopen) Nodes() []*graph.Node {
	q, _ := r.queue()
	return q.nodes()
}

// errOutdated: somebody else changed what was looked at; look again.
var errOutdated = errors.New("the nodes have changed meanwhile")

// Run does it. It blocks as long as requests under way and the storage do; on error, the nodes are
// as they were.
func (r *Reopen) Run(ctx context.Context) error {
	for {
		err := r.try(ctx)
		if err != errOutdated {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

func (r *Reopen) try(ctx context.Context) error {
	var q *reopenQueue
	hold, err := r.m.g.Hold(ctx, func() (_ []*graph.Node, err error) {
		q, err = r.queue()
		return q.nodes(), err
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	if len(q.list) == 0 {
		return nil
	}
	undrain, err := r.m.g.Drain(ctx, q.nodes()...)
	if err != nil {
		return err
	}
	defer undrain()
	for _, e := range q.list {
		if err := e.node.IO().Flush(ctx); err != nil {
			return fmt.Errorf("Error flushing drive: %s", blk.ErrnoText(err))
		}
	}
	tx := r.m.g.Begin(ctx)
	defer tx.Abort()
	for _, e := range q.list {
		if err := e.prepare(r.m, tx); err != nil {
			return err
		}
	}
	tx.Check(q.current)
	release, err := q.keepChildren(tx)
	if err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	defer release()
	for _, e := range q.list {
		if err := e.outcome(); err != nil {
			q.undo()
			return err
		}
	}
	for _, e := range q.list {
		for _, c := range e.changes {
			if c.was != nil {
				r.m.record(c.was).definer.CompareAndSwap(weak.Make(e.node), weak.Pointer[graph.Node]{})
			}
		}
	}
	return nil
}

// queue finds the nodes and what is to become of each. With an error it has those before it.
func (r *Reopen) queue() (*reopenQueue, error) {
	q := &reopenQueue{m: r.m}
	for _, o := range r.given {
		if o.NodeName == nil {
			return q, errors.New("node-name not specified")
		}
		n, err := r.m.Find(*o.NodeName)
		if err != nil {
			return q, err
		}
		q.add(n, o, nil, 0, false)
	}
	return q, nil
}

// reopenQueue are the nodes of one reopen, parents before the children that they define.
type reopenQueue struct {
	m    *Manager
	list []*reopening
}

func (q *reopenQueue) nodes() (l []*graph.Node) {
	for _, e := range q.list {
		l = append(l, e.node)
	}
	return l
}

// reopening is what is to become of a node.
type reopening struct {
	node  *graph.Node
	was   *graph.Options
	below []*graph.Node // its children, as its edges are listed

	opts *types.BlockdevOptions // what is said for the node itself, now or, where that goes on to hold, earlier
	gen  *graph.Options         // what it is to have
	refs []driver.Child         // what is said now of children and not for the nodes that they are
	// kept: nothing is said now, the node follows its parent.
	kept bool
	// noBacking: something is said now, but nothing of a backing file.
	noBacking bool

	readOnly bool // as it was
	changes  []childChange
	outcome  func() error
}

// childChange is a child that is replaced; nil is none.
type childChange struct {
	name    string
	was, is *graph.Node
}

// add queues a node: with options given for it, or none if a parent with the options up.gen was
// given some, which hands its own down. keep means that what is not given stays as it is. Others of
// a node that is queued twice add to each other, the later ones win.
func (q *reopenQueue) add(n *graph.Node, given *types.BlockdevOptions, up *reopening, role perm.Role, keep bool) {
	i := slices.IndexFunc(q.list, func(e *reopening) bool { return e.node == n })
	e := &reopening{node: n, was: n.Options(), readOnly: n.ReadOnly(), kept: given == nil && keep, opts: given}
	d := q.m.driverOf(n)
	if given != nil {
		e.refs = q.m.childOptions(given)
	}
	if i >= 0 {
		old := q.list[i]
		e.kept, e.noBacking = e.kept && old.kept, old.noBacking
		e.opts = mergeOptions(given, old.opts)
		for _, c := range old.refs {
			if e.ref(c.Name) == nil {
				e.refs = append(e.refs, c)
			}
		}
		q.list[i] = e
	} else {
		q.list = append(q.list, e)
	}
	if !keep {
		e.noBacking = e.ref("backing") == nil
	}
	if e.opts == nil && keep {
		e.opts = e.was.Canonical
	}
	if e.opts == nil {
		e.opts = &types.BlockdevOptions{Driver: types.BlockdevDriver(n.DriverName())}
	}
	var from *graph.Options
	if up != nil {
		from = up.gen
	}
	e.gen = inherit(e.opts, from, role)
	if up == nil && e.opts.Discard == nil {
		e.gen.Discard = e.was.Discard
	}
	if keep {
		fill(&e.gen.Inherited, e.was.Inherited)
		settle(e.gen)
	}
	e.gen.Implicit = e.was.Implicit
	if d == nil {
		return // a filter of a job
	}
	for _, edge := range n.Children() {
		c := edge.Node()
		e.below = append(e.below, c)
		if q.m.record(c).definer.Load() != weak.Make(n) {
			continue
		}
		ref := e.ref(edge.ChildName())
		switch {
		case ref == nil && !keep && edge.Role()&perm.COW != 0:
			// A backing file that is not mentioned: an error of n, unless n is named again and
			// something is said of it then.
		case ref == nil:
			q.add(c, nil, e, edge.Role(), true)
		case ref.Definition != nil:
			o := ref.Definition
			e.refs = slices.DeleteFunc(e.refs, func(x driver.Child) bool { return x.Name == edge.ChildName() })
			q.add(c, o, e, edge.Role(), keep)
		case ref.Reference != nil && *ref.Reference == c.Name():
			q.add(c, nil, e, edge.Role(), true)
		}
	}
}

// ref is what is said of a child, or nil.
func (e *reopening) ref(name string) *types.BlockdevRef {
	for _, c := range e.refs {
		if c.Name == name {
			return c.Ref
		}
	}
	return nil
}

// childOptions are the children that options name. A backing file that is to be none is neither a
// reference nor a definition.
func (c *catalog) childOptions(o *types.BlockdevOptions) []driver.Child {
	d := c.drivers[o.Driver]
	if d == nil {
		return nil
	}
	var l []driver.Child
	if d.Children != nil {
		l = append(l, d.Children(o.U)...)
	}
	if d.Backing != nil {
		if b := d.Backing(o.U); b != nil {
			l = append(l, driver.Child{
				Name: "backing", Role: perm.COW, Ref: &types.BlockdevRef{Definition: b.Definition, Reference: b.Reference},
			})
		}
	}
	return l
}

// current tells whether everything is as it was when the queue was made.
func (q *reopenQueue) current() error {
	for _, e := range q.list {
		kids := e.node.Children()
		if q.m.g.Node(e.node.Name()) != e.node || e.node.Options() != e.was || e.node.ReadOnly() != e.readOnly ||
			!slices.EqualFunc(kids, e.below, func(k *graph.Edge, n *graph.Node) bool { return k.Node() == n }) {
			return errOutdated
		}
	}
	return nil
}

// prepare checks what becomes of a node, in QEMU's order, and adds it to tx.
func (e *reopening) prepare(m *Manager, tx *graph.Tx) error {
	n := e.node
	if e.gen.DetectZeroes == types.BlockdevDetectZeroesOptionsUnmap && !e.gen.Discard {
		return errUnmap
	}
	if err := n.Options().CanReopen(); err != nil {
		return err
	}
	d := m.driverOf(n)
	if err := e.resettable(m.catalog, d); err != nil {
		return err
	}
	if string(e.opts.Driver) == n.DriverName() {
		if err := e.setDriver(tx, d, e.opts.U, e.gen); err != nil {
			return err
		}
	}
	if e.noBacking && d.Backing != nil {
		if name, _ := backingFile(n); n.Backing() != nil || name != "" {
			return fmt.Errorf("backing is missing for '%s'", n.Name())
		}
	}
	for _, child := range []string{"backing", "file"} {
		if err := e.replaceChild(m, tx, child); err != nil {
			return err
		}
	}
	if err := e.unchanged(m.catalog, d); err != nil {
		return err
	}
	if e.gen.ForceShare && !e.gen.ReadOnly {
		return errForceShare
	}
	return e.apply(tx, e.gen, e.gen.ReadOnly)
}

// setDriver changes the driver of the node in tx.
func (e *reopening) setDriver(tx *graph.Tx, d *driver.Any, u any, gen *graph.Options) error {
	p, err := d.Reopen(e.node.Driver(), u, gen)
	if err == nil && p != nil {
		tx.JoinFirst(p)
	}
	return err
}

// apply gives a node its options in tx.
func (e *reopening) apply(tx *graph.Tx, gen *graph.Options, readOnly bool) (err error) {
	if err := tx.SetOptions(e.node, gen); err != nil {
		return err
	}
	e.outcome = func() error { return nil }
	switch {
	case readOnly != e.node.ReadOnly():
		e.outcome, err = tx.SwitchReadOnly(e.node, readOnly)
	case graph.WritersBarred(e.node): // by a job; its user wants it writable
		err = tx.BarWriters(e.node, nil)
	}
	if err != nil {
		return err
	}
	return tx.Refresh(e.node)
}

// replaceChild replaces a child by the node that a reference names, or by nothing.
func (e *reopening) replaceChild(m *Manager, tx *graph.Tx, name string) error {
	ref := e.ref(name)
	if ref == nil || ref.Definition != nil {
		return nil
	}
	n := e.node
	var to, was *graph.Node
	if ref.Reference != nil {
		var err error
		if to, err = m.Lookup(nil, ref.Reference); err != nil {
			return err
		}
	}
	edge := tx.Child(n, name)
	if edge != nil {
		was = tx.Target(edge)
	}
	if was == to {
		return nil
	}
	if was != nil {
		if graph.Now.SkipImplicitFilters(was) == to {
			return nil
		}
		if was.Options().Implicit {
			return fmt.Errorf("Cannot replace implicit %s child of %s", name, n.Name())
		}
	}
	if n.Kind() == graph.Filter && was == nil {
		return fmt.Errorf("'%s' is a %s filter node that does not support a %s child", n.Name(), n.DriverName(), name)
	}
	e.changes = append(e.changes, childChange{name, was, to})
	return e.setChild(tx, name, to)
}

// setChild makes a child of the node another one, or none, in tx.
func (e *reopening) setChild(tx *graph.Tx, name string, to *graph.Node) error {
	n := e.node
	edge := tx.Child(n, name)
	switch {
	case edge == nil && name != "backing":
		return errors.New("Cannot set file child to format node without file child")
	case edge == nil:
		if !n.Caps().Backing {
			return fmt.Errorf("Driver '%s' of node '%s' does not support backing files", n.DriverName(), n.Name())
		}
		_, err := tx.Attach(n, name, perm.COW, to)
		return err
	case to == nil:
		return tx.Detach(edge)
	}
	return tx.Replace(edge, to)
}

// keepChildren keeps alive, in tx, the nodes that are replaced, until release is called: they may
// have to come back.
func (q *reopenQueue) keepChildren(tx *graph.Tx) (release func(), err error) {
	var kept []func()
	release = func() {
		for _, f := range kept {
			f()
		}
	}
	for _, e := range q.list {
		for _, c := range e.changes {
			if c.was == nil || e.gen.ReadOnly {
				continue
			}
			f, err := graph.Keep(tx, c.was)
			if err != nil {
				return nil, err
			}
			kept = append(kept, f)
		}
	}
	return release, nil
}

// undo takes a committed reopen back, because a driver could not follow.
func (q *reopenQueue) undo() {
	err := q.m.g.Do(context.Background(), func(tx *graph.Tx) error {
		for _, e := range slices.Backward(q.list) {
			for _, c := range slices.Backward(e.changes) {
				if err := e.setChild(tx, c.name, c.was); err != nil {
					return err
				}
			}
			if e.was.Canonical != nil {
				if err := e.setDriver(tx, q.m.driverOf(e.node), e.was.Canonical.U, e.was); err != nil {
					return err
				}
			}
			if err := e.apply(tx, e.was, e.readOnly); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		q.m.log.Error("a reopen that failed cannot be undone", "node", q.list[0].node.Name(), "error", err)
	}
}
