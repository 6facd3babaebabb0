package blockdev

import (
	"cmp"
	"errors"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// inherit computes the generic options of a node. up are those of the parent that defines the node
// in its options or image, nil for a node that stands alone: a child takes over how its parent
// caches, shares and writes unless it says otherwise, backing files are read-only, and discards
// that a parent lets through are passed on.
func inherit(o *types.BlockdevOptions, up *graph.Options, role perm.Role) *graph.Options {
	g := &graph.Options{
		Name:         types.Or(o.NodeName, ""),
		DriverName:   string(o.Driver),
		DetectZeroes: types.Or(o.DetectZeroes, types.BlockdevDetectZeroesOptionsOff),
		Canonical:    o,
	}
	if o.Discard != nil {
		g.Discard = *o.Discard == types.BlockdevDiscardOptionsUnmap
	} else {
		g.Discard = up != nil
	}
	g.Inherited = graph.Inheritable{ReadOnly: o.ReadOnly, AutoReadOnly: o.AutoReadOnly, ForceShare: o.ForceShare}
	if o.Cache != nil {
		g.Inherited.Direct, g.Inherited.NoFlush = o.Cache.Direct, o.Cache.NoFlush
	}
	// As in QEMU, what an inactive node defines is inactive, but for its file if only its own options
	// say so.
	g.InactiveFile = up != nil && up.Inactive && (up.InactiveFile || role&perm.Primary == 0)
	g.Inactive = g.InactiveFile || !types.Or(o.Active, true)
	if up != nil {
		from := up.Inherited
		if role&perm.COW != 0 {
			from.ReadOnly, from.AutoReadOnly = &yes, &no
		}
		fill(&g.Inherited, from)
	}
	settle(g)
	return g
}

var yes, no = true, false

// fill takes over what i does not say.
func fill(i *graph.Inheritable, from graph.Inheritable) {
	i.Direct, i.NoFlush = cmp.Or(i.Direct, from.Direct), cmp.Or(i.NoFlush, from.NoFlush)
	i.ReadOnly, i.AutoReadOnly = cmp.Or(i.ReadOnly, from.ReadOnly), cmp.Or(i.AutoReadOnly, from.AutoReadOnly)
	i.ForceShare = cmp.Or(i.ForceShare, from.ForceShare)
}

// settle makes what is effective from what was said; the default of each is off.
func settle(g *graph.Options) {
	on := func(p *bool) bool { return types.Or(p, false) }
	i := &g.Inherited
	g.Direct, g.NoFlush, g.ForceShare = on(i.Direct), on(i.NoFlush), on(i.ForceShare)
	g.ReadOnly, g.AutoReadOnly = on(i.ReadOnly), on(i.AutoReadOnly)
}

var (
	errForceShare = errors.New("force-share=on can only be used with read-only images")
	errUnmap      = errors.New("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
)

// checkGeneric refuses options that contradict each other, in QEMU's order.
func checkGeneric(d *driver.Any, g *graph.Options) error {
	if g.ForceShare && !g.ReadOnly {
		return errForceShare
	}
	if d.Check != nil {
		if err := d.Check(g.Canonical.U); err != nil {
			return err
		}
	}
	if g.DetectZeroes == types.BlockdevDetectZeroesOptionsUnmap && !g.Discard {
		return errUnmap
	}
	_, err := graph.GivenName(g.Canonical.NodeName)
	return err
}
