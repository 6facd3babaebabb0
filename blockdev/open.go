package blockdev

import (
	"context"
	"errors"
	"log/slog"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// opener opens one tree of nodes, all of them hidden until publish.
type opener struct {
	m     *Manager
	ctx   context.Context
	nodes []*graph.Node            // all hidden nodes
	tops  map[*graph.Node]struct{} // those that no other hidden node is above
	roots []*graph.Root            // for reading headers
}

func (m *Manager) newOpener(ctx context.Context) *opener {
	return &opener{m: m, ctx: ctx, tops: map[*graph.Node]struct{}{}}
}

func (o *opener) warn(msg string) { o.m.log.Log(o.ctx, slog.LevelWarn, msg) }

// commit commits tx and takes over the nodes that it made and the children that it attached.
func (o *opener) commit(tx *graph.Tx, made []*graph.Node, attached ...*graph.Node) error {
	if err := tx.Commit(); err != nil {
		return err
	}
	for _, n := range made {
		o.nodes = append(o.nodes, n)
		o.tops[n] = struct{}{}
		o.m.recs.add(n, &record{})
	}
	for _, n := range attached {
		delete(o.tops, n)
	}
	return nil
}

// openTop opens a plan of the user and publishes it. finish adds to the Tx that publishes it.
func (o *opener) openTop(p *plan, finish func(tx *graph.Tx, n *graph.Node) error) error {
	err := o.tryOpen(p, finish)
	if err != nil {
		o.discard()
	}
	return err
}

func (o *opener) tryOpen(p *plan, finish func(tx *graph.Tx, n *graph.Node) error) error {
	n, err := o.openAll(p)
	if err != nil {
		return err
	}
	tx := o.m.g.Begin(o.ctx)
	defer tx.Abort()
	x := &Opened{o: o, node: n}
	if p.ref == nil {
		if err := x.Publish(tx); err != nil {
			return err
		}
	}
	if err := finish(tx, n); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	x.Done()
	return nil
}

// openHidden opens a plan and leaves it to the caller to publish it.
func (o *opener) openHidden(p *plan) (*Opened, error) {
	n, err := o.openAll(p)
	if err != nil {
		o.discard()
		return nil, err
	}
	return &Opened{o: o, node: n}, nil
}

// openAll reserves the names in the plan and opens it.
func (o *opener) openAll(p *plan) (*graph.Node, error) {
	if p.ref == nil {
		var made []*graph.Node
		tx := o.m.g.Begin(o.ctx)
		defer tx.Abort()
		if err := p.reserve(tx, func(n *graph.Node) { made = append(made, n) }); err != nil {
			if p.fileFirst() && p.kids[0].plan.ref != nil {
				if n, err := o.open(p.kids[0].plan); err == nil {
					o.m.tellProbed(n) // by QEMU, before it sees that a name is taken
				}
			}
			return nil, err
		}
		if err := o.commit(tx, made); err != nil {
			return nil, err
		}
	}
	return o.open(p)
}

// discard undoes everything. It waits for nothing but the drivers' Close.
func (o *opener) discard() {
	ctx := context.WithoutCancel(o.ctx)
	tx := o.m.g.Begin(ctx)
	defer tx.Abort()
	var errs []error
	for _, r := range o.roots {
		errs = append(errs, tx.DetachRoot(r))
	}
	for n := range o.tops {
		errs = append(errs, tx.Discard(n))
	}
	errs = append(errs, tx.Commit())
	if err := errors.Join(errs...); err != nil {
		o.m.log.Error("cannot undo the opening of nodes", "error", err)
	}
	o.m.recs.remove(o.nodes...)
}

// open opens a plan bottom up and returns its node.
func (o *opener) open(p *plan) (*graph.Node, error) {
	if p.ref != nil {
		return o.m.Lookup(p.ref, p.ref)
	}
	if err := o.ctx.Err(); err != nil {
		return nil, err
	}
	kids := make([]*graph.Node, len(p.kids))
	at := 0 // the node's place among its children
	if p.fileFirst() {
		at = 1
	}
	for i := range p.kids {
		if i == at {
			p.moveUp()
		}
		if i >= at && p.isNamed(p.kids[i].plan.ref) {
			return nil, p.circle(p.kids[i].name)
		}
		n, err := o.open(p.kids[i].plan)
		if err != nil {
			return nil, err
		}
		kids[i] = n
		if k := p.kids[i]; k.name == "file" && k.plan.ref != nil {
			defer o.m.tellProbed(n)
		}
	}
	if at >= len(kids) {
		p.moveUp()
	}
	if p.drv == nil {
		if err := o.probe(p, kids[0]); err != nil {
			return nil, err
		}
	}
	if p.drv.Backing != nil && p.link != nil {
		if err := p.link.endless(kids[0]); err != nil {
			return nil, err
		}
	}
	root, err := o.attach(p, kids)
	if err != nil {
		return nil, err
	}
	if err := o.openDriver(p, root); err != nil {
		return nil, err
	}
	return p.node, o.openBacking(p)
}

// fileFirst: the node shows up as newer than its file, as in QEMU; drivers open other
// children when they are there already.
func (p *plan) fileFirst() bool { return len(p.kids) > 0 && p.kids[0].name == "file" }

// isNamed tells whether ref is the name of the node that is being opened itself.
func (p *plan) isNamed(ref *string) bool { return ref != nil && p.node != nil && *ref == p.gen.Name }

// circle is the error of a node that names itself as its child.
func (p *plan) circle(child string) error {
	return &perm.CycleError{Child: p.gen.Name, Role: child, Parent: p.gen.Name}
}

// moveUp makes the node show up as the newest, if it has its name already.
func (p *plan) moveUp() {
	if p.node != nil {
		p.node.MoveUp()
	}
}

// attach makes the node, if it has no name yet, and attaches its children and the root that reads
// its header.
func (o *opener) attach(p *plan, kids []*graph.Node) (*graph.Root, error) {
	if p.node != nil && len(kids) == 0 {
		return nil, nil
	}
	var made []*graph.Node
	tx := o.m.g.Begin(o.ctx)
	defer tx.Abort()
	if p.node == nil {
		if err := p.makeNode(tx, func(n *graph.Node) { made = append(made, n) }); err != nil {
			return nil, err
		}
	}
	for i, n := range kids {
		if _, err := tx.Attach(p.node, p.kids[i].name, p.kids[i].role, n); err != nil {
			return nil, err
		}
	}
	var root *graph.Root
	if len(kids) > 0 {
		r, err := tx.AttachRoot(graph.RootSpec{
			EdgeName: "root", Claim: perm.Claim{Share: perm.All}, Ctx: o.ctx,
		}, p.node)
		if err != nil {
			return nil, err
		}
		root = r
	}
	if err := o.commit(tx, made, kids...); err != nil {
		return nil, err
	}
	for i, n := range kids {
		if p.kids[i].plan.ref == nil {
			o.m.record(n).definer.set(p.node)
		}
	}
	if root != nil {
		o.roots = append(o.roots, root)
	}
	return root, nil
}

// openDriver opens the driver on its node. Nothing is locked meanwhile.
func (o *opener) openDriver(p *plan, root *graph.Root) error {
	req := &blk.Req{Ctx: o.ctx}
	if root != nil {
		r, err := root.Begin(o.ctx)
		if err != nil {
			return err
		}
		defer root.End(r)
		req = r
	}
	x := &driver.Opening{Ctx: o.ctx, Node: p.node, Req: req, Warn: o.warn, Objects: o.m.objects, Guessed: p.guessed}
	if p.link != nil {
		x.Admit = o.m.admitFile
	}
	d, err := p.drv.Open(x, p.opts.U)
	if err != nil {
		return err
	}
	p.node.SetDriver(d)
	if o.ctx.Err() != nil {
		return context.Cause(o.ctx) // whether what follows has to wait is a matter of luck
	}
	return o.m.primeActual(o.ctx, p.node)
}

// openBacking opens the backing file that the options or else the image's header name, and attaches
// it.
func (o *opener) openBacking(p *plan) error {
	if p.warnBacking {
		o.warn(`Use of "backing": "" is deprecated; use "backing": null instead`)
	}
	if p.noBacking {
		return nil
	}
	b := p.backing
	header := ""
	if b == nil {
		image, ok := p.node.Driver().(graph.Backed)
		if !ok || p.drv.Backing == nil {
			return nil
		}
		name, format := image.BackingFile()
		if name == "" {
			return nil
		}
		full, err := o.m.absolute(p.node, name)
		if err != nil {
			return err
		}
		if b, err = o.m.planNamed(o.ctx, full, format, p.node, p.link); err != nil {
			return backingError(err)
		}
		header = name
	}
	if p.isNamed(b.ref) {
		return p.circle("backing")
	}
	n, err := o.open(b)
	if err != nil {
		return backingError(err)
	}
	if header != "" {
		r := o.m.record(p.node)
		r.auto.Store(&autoBacking{header: header, opened: o.m.name(n).filename})
	}
	tx := o.m.g.Begin(o.ctx)
	defer tx.Abort()
	if _, err := tx.Attach(p.node, "backing", perm.COW, n); err != nil {
		return err
	}
	if b.ref == nil {
		o.m.record(n).definer.set(p.node)
	}
	return o.commit(tx, nil, n)
}
