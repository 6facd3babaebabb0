package blockdev

import (
	"context"
	"errors"
	"log/slog"
	"weak"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// opener opens one tree of nodes, all of them hidden until publish.
type opener struct {
	m     *Manager
	ctx   context.Context
	tops  map[*graph.Node]struct{} // hidden nodes that no other hidden node is above
	roots []*graph.Root            // for reading headers
}

func (m *Manager) newOpener(ctx context.Context) *opener {
	return &opener{m: m, ctx: ctx, tops: map[*graph.Node]struct{}{}}
}

func (o *opener) warn(msg string) { o.m.log.Log(o.ctx, slog.LevelWarn, msg) }

// do makes changes to the graph, and takes over the nodes that are made and the children that are
// attached.
func (o *opener) do(
	change func(tx *graph.Tx, made func(*graph.Node)) error, attached ...*graph.Node,
) error {
	var fresh []*graph.Node
	err := o.m.g.Do(o.ctx, func(tx *graph.Tx) error {
		return change(tx, func(n *graph.Node) { fresh = append(fresh, n) })
	})
	if err != nil {
		return err
	}
	for _, n := range fresh {
		o.tops[n] = struct{}{}
	}
	for _, n := range attached {
		delete(o.tops, n)
	}
	return nil
}

// openTop opens a plan of the user and publishes it. finish adds to the Tx that publishes it.
func (o *opener) openTop(p *plan, finish func(tx *graph.Tx, n *graph.Node) error) error {
	x, err := o.openHidden(p)
	if err != nil {
		return err
	}
	err = o.m.g.Do(o.ctx, func(tx *graph.Tx) error {
		if p.ref == nil {
			if err := x.Publish(tx); err != nil {
				return err
			}
		}
		return finish(tx, x.node)
	})
	x.Finish(err)
	return err
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
		err := o.do(func(tx *graph.Tx, made func(*graph.Node)) error {
			err := p.reserve(tx, made)
			if err != nil && p.fileFirst() && p.kids[0].plan.ref != nil {
				if n, err := o.open(p.kids[0].plan); err == nil {
					o.m.tellProbed(n) // by QEMU, before it sees that a name is taken
				}
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return o.open(p)
}

// discard undoes everything. It waits for nothing but the drivers' Close.
func (o *opener) discard() {
	err := o.m.g.Do(context.WithoutCancel(o.ctx), func(tx *graph.Tx) (err error) {
		for _, r := range o.roots {
			err = errors.Join(err, tx.DetachRoot(r))
		}
		for n := range o.tops {
			err = errors.Join(err, tx.Discard(n))
		}
		return err
	})
	if err != nil {
		o.m.log.Error("cannot undo the opening of nodes", "error", err)
	}
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
			if err := o.show(p, at); err != nil {
				return nil, err
			}
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
	err = o.openDriver(p, root)
	var needs *driver.ChildNeeded
	if errors.As(err, &needs) && p.node.Child(needs.Name) == nil {
		if err = o.openNeeded(p, needs); err == nil {
			err = o.openDriver(p, root)
		}
	}
	if err != nil {
		return nil, err
	}
	return p.node, o.openBacking(p)
}

// fileFirst: the node shows up as newer than its file, as in QEMU; drivers open other
// children when they are there already.
func (p *plan) fileFirst() bool { return len(p.kids) > 0 && p.kids[0].name == "file" }

// isNamed tells whether ref is the name of the node that is being opened itself.
func (p *plan) isNamed(ref *string) bool { return ref != nil && *ref != "" && *ref == p.gen.Name }

// circle is the error of a node that names itself as its child.
func (p *plan) circle(child string) error {
	return &perm.CycleError{Child: p.gen.Name, Role: child, Parent: p.gen.Name}
}

// show makes the node show up as the newest. One without a name is made here, if its children are
// to show up as newer.
func (o *opener) show(p *plan, at int) error {
	if p.node == nil && at == 0 {
		return o.do(func(tx *graph.Tx, made func(*graph.Node)) error { return p.makeNode(tx, made) })
	}
	p.moveUp()
	return nil
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
	var root *graph.Root
	err := o.do(func(tx *graph.Tx, made func(*graph.Node)) (err error) {
		if p.node == nil {
			err = p.makeNode(tx, made)
		}
		for i, n := range kids {
			if err == nil {
				_, err = tx.Attach(p.node, p.kids[i].name, p.kids[i].role, n)
			}
		}
		if err == nil && len(kids) > 0 {
			root, err = tx.AttachRoot(reading(o.ctx), p.node)
		}
		return err
	}, kids...)
	if err != nil {
		return nil, err
	}
	for i, n := range kids {
		if p.kids[i].plan.ref == nil {
			o.m.record(n).definer.Store(weak.Make(p.node))
		}
	}
	if root != nil {
		o.roots = append(o.roots, root)
	}
	return root, nil
}

// reading is a root that claims nothing: a header tells the format even while others write.
func reading(ctx context.Context) graph.RootSpec {
	return graph.RootSpec{EdgeName: "root", Claim: perm.Claim{Share: perm.All}, Ctx: ctx}
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
		x.Admit = func(f *driver.FoundFile) error { return o.m.admitFile(f, p.link) }
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

// openNeeded opens a child that the image of p's node names, and attaches it.
func (o *opener) openNeeded(p *plan, c *driver.ChildNeeded) error {
	k, err := o.m.planData(o.ctx, p.node, c, p.link)
	if err != nil {
		return err
	}
	n, err := o.open(k)
	if err != nil {
		return err
	}
	o.m.record(n).definer.Store(weak.Make(p.node))
	return o.do(func(tx *graph.Tx, _ func(*graph.Node)) error {
		_, err := tx.Attach(p.node, c.Name, c.Role, n)
		return err
	}, n)
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
		name, format := backingFile(p.node)
		if name == "" || p.drv.Backing == nil {
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
	if b.ref == nil {
		o.m.record(n).definer.Store(weak.Make(p.node))
	}
	return o.do(func(tx *graph.Tx, _ func(*graph.Node)) error {
		_, err := tx.Attach(p.node, "backing", perm.COW, n)
		return err
	}, n)
}
