package blockdev

import (
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// inherit computes the generic options of a node. up are those of the parent that defines the
// node in its options or image, nil for a node that stands alone: a child takes over how its parent
// caches, shares and writes unless it says otherwise, backing files are read-only, and discards that
// a parent lets through are passed on.
func inherit(o *types.BlockdevOptions, up *graph.Options, role perm.Role) *graph.Options {
	g := &graph.Options{
		DriverName:   string(o.Driver),
		DetectZeroes: types.BlockdevDetectZeroesOptionsOff,
		Canonical:    o,
	}
	if up != nil {
		g.Direct, g.NoFlush, g.ForceShare = up.Direct, up.NoFlush, up.ForceShare
		g.Discard = true
		if role&perm.COW != 0 {
			g.ReadOnly = true
		} else {
			g.ReadOnly, g.AutoReadOnly = up.ReadOnly, up.AutoReadOnly
		}
	}
	set(&g.Name, o.NodeName)
	set(&g.ReadOnly, o.ReadOnly)
	set(&g.AutoReadOnly, o.AutoReadOnly)
	set(&g.ForceShare, o.ForceShare)
	set(&g.DetectZeroes, o.DetectZeroes)
	if o.Cache != nil {
		set(&g.Direct, o.Cache.Direct)
		set(&g.NoFlush, o.Cache.NoFlush)
	}
	if o.Discard != nil {
		g.Discard = *o.Discard == types.BlockdevDiscardOptionsUnmap
	}
	return g
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// checkGeneric refuses options that contradict each other, in the reference's order.
func (d *Driver) checkGeneric(g *graph.Options) error {
	if g.ForceShare && !g.ReadOnly {
		return errors.New("force-share=on can only be used with read-only images")
	}
	if d.File != nil && d.File(g.Canonical.U) == "" {
		return fmt.Errorf("The '%s' block driver requires a file name", d.Name)
	}
	if g.DetectZeroes == types.BlockdevDetectZeroesOptionsUnmap && !g.Discard {
		return errors.New("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
	}
	if g.Name == "" && g.Canonical.NodeName != nil {
		return errors.New("Invalid node-name: ''")
	}
	return nil
}
