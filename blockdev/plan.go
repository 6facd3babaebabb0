package blockdev

import (
	"fmt"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// plan is a node to be opened, or one to be used. It is made from options alone; nothing
// has happened yet.
type plan struct {
	ref *string // name of an existing node; all else is unset then

	opts *types.BlockdevOptions
	drv  *driver.Any // nil: to be found out from the header of the file, kids[0]
	// guessed, if set: that was done, and only that no other format fits speaks for drv
	guessed *driver.Guess
	gen     *graph.Options
	kids    []planChild

	backing     *plan // from the options
	noBacking   bool  // the options say that there is none
	warnBacking bool  // in a way that is going away

	node *graph.Node // once its name is reserved
	link *link       // how images led here; nil for what the user named
}

// planChild is a child of a plan but the backing file.
type planChild struct {
	name string
	role perm.Role
	plan *plan
}

// planner makes plans of options and of what images name, as far as the policy allows that.
type planner struct {
	*catalog
	policy Policy
}

// plan makes the plan of options o: of the parent with the generic options up, or alone if up is
// nil. Errors of a backing file say so.
func (pl *planner) plan(o *types.BlockdevOptions, up *graph.Options, role perm.Role, l *link) (*plan, error) {
	if file, ok := o.U.(*types.BlockdevRef); ok && o.Driver == "" {
		return pl.guessed(o, file, inherit(o, up, role), l)
	}
	d := pl.drivers[o.Driver]
	if d == nil {
		return nil, fmt.Errorf("Unknown driver '%s'", o.Driver)
	}
	p := &plan{opts: o, drv: d, gen: inherit(o, up, role), link: l}
	if d.LikeProtocol { // the node comes before what it defines
		p.gen.InactiveFile = p.gen.Inactive
	}
	p.gen.Kind, p.gen.Reopens = d.Kind, d.Reopen != nil
	if d.Children != nil {
		for _, c := range d.Children(o.U) {
			k, err := pl.planRef(c.Ref, p.gen, c.Role, l)
			if err != nil {
				return nil, err
			}
			p.kids = append(p.kids, planChild{c.Name, c.Role, k})
		}
	}
	if err := checkGeneric(d, p.gen); err != nil {
		return nil, err
	}
	if d.Backing == nil {
		return p, nil
	}
	switch b := d.Backing(o.U); {
	case b == nil:
	case b.Null:
		p.noBacking = true
	case b.Reference != nil && *b.Reference == "":
		p.noBacking, p.warnBacking = true, true
	default:
		var err error
		r := &types.BlockdevRef{Definition: b.Definition, Reference: b.Reference}
		p.backing, err = pl.planRef(r, p.gen, perm.COW, l)
		if err != nil {
			return nil, backingError(err)
		}
	}
	return p, nil
}

func (pl *planner) planRef(r *types.BlockdevRef, up *graph.Options, role perm.Role, l *link) (*plan, error) {
	if r.Reference != nil {
		return &plan{ref: r.Reference}, nil
	}
	return pl.plan(r.Definition, up, role, l)
}

// planGuessed makes the plan of a node with the generic options gen whose format is to be found out
// from its file.
func (pl *planner) planGuessed(file *types.BlockdevRef, gen *graph.Options, l *link) (*plan, error) {
	return pl.guessed(toBeGuessed(file), file, gen, l)
}

// toBeGuessed are the options of an image in file until its format is known.
func toBeGuessed(file *types.BlockdevRef) *types.BlockdevOptions {
	return &types.BlockdevOptions{U: file}
}

// guessed is planGuessed of the options o, which are to become those of the format.
func (pl *planner) guessed(
	o *types.BlockdevOptions, file *types.BlockdevRef, gen *graph.Options, l *link,
) (*plan, error) {
	k, err := pl.planRef(file, gen, perm.Image, l)
	if err != nil {
		return nil, err
	}
	return &plan{opts: o, gen: gen, kids: []planChild{{"file", perm.Image, k}}, link: l}, nil
}

// backingError says that err befell a backing file.
func backingError(err error) error { return fmt.Errorf("Could not open backing file: %w", err) }

// reserve takes the names that the options give, by making the hidden nodes that are to bear them.
// The others are made when they are opened.
func (p *plan) reserve(tx *graph.Tx, made func(*graph.Node)) error {
	if p.ref != nil {
		return nil
	}
	for _, k := range p.kids {
		if err := k.plan.reserve(tx, made); err != nil {
			return err
		}
	}
	if p.gen.Name != "" {
		if err := p.makeNode(tx, made); err != nil {
			return err
		}
	}
	if p.backing != nil {
		if err := p.backing.reserve(tx, made); err != nil {
			return backingError(err)
		}
	}
	return nil
}

func (p *plan) makeNode(tx *graph.Tx, made func(*graph.Node)) error {
	n, err := tx.NewNode(p.gen)
	if err != nil {
		return err
	}
	p.node = n
	made(n)
	return nil
}
