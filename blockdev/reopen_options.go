package blockdev

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// followed are the generic options that follow what a reopen says without further ado.
var followed = map[string]bool{
	"node-name": true, "discard": true, "cache": true, "read-only": true, "auto-read-only": true, "detect-zeroes": true,
}

// optionDict is options as a JSON object.
func optionDict(o *types.BlockdevOptions) *value.Dict {
	v, err := value.Parse(string(o.AppendJSON(nil)))
	if err != nil {
		panic("blockdev: " + err.Error())
	}
	return v.(*value.Dict)
}

// mergeOptions is given with what only old says added; either may be nil. Of children with
// different drivers given's counts alone.
func mergeOptions(given, old *types.BlockdevOptions) *types.BlockdevOptions {
	if given == nil || old == nil || given.Driver != old.Driver {
		if given != nil {
			return given
		}
		return old
	}
	d := optionDict(given)
	addMissing(d, optionDict(old))
	o, err := types.DecodeBlockdevOptions(d, types.ModeQObject)
	if err != nil {
		return given // they contradict each other in a way that nothing here knows of
	}
	return o
}

func addMissing(to, from *value.Dict) {
	for _, mem := range from.Members() {
		have, ok := to.Get(mem.Name)
		if !ok {
			to.Set(mem.Name, mem.Value)
			continue
		}
		a, okA := have.(*value.Dict)
		b, okB := mem.Value.(*value.Dict)
		if !okA || !okB {
			continue
		}
		is, _ := a.Get("driver")
		if was, _ := b.Get("driver"); is == was {
			addMissing(a, b)
		}
	}
}

// flatten adds what v holds to d, under dotted names.
func flatten(d *value.Dict, name string, v value.Value) {
	switch v := v.(type) {
	case *value.Dict:
		for _, mem := range v.Members() {
			flatten(d, name+"."+mem.Name, mem.Value)
		}
	case value.List:
		for i, x := range v {
			flatten(d, name+"."+strconv.Itoa(i), x)
		}
	default:
		d.Set(name, v)
	}
}

// ownOptions are the options of a node, flat, without those that follow a reopen and without its
// children. A node has force-share from its parent, too.
func (c *catalog) ownOptions(o *types.BlockdevOptions, g *graph.Options) *value.Dict {
	child := map[string]bool{}
	for _, k := range c.childOptions(o) {
		child[k.Name] = true
	}
	d := &value.Dict{}
	for _, mem := range optionDict(o).Members() {
		if !followed[mem.Name] && !child[mem.Name] && mem.Name != "backing" {
			flatten(d, mem.Name, mem.Value)
		}
	}
	if s := g.Inherited.ForceShare; s != nil {
		d.Set("force-share", *s)
	}
	return d
}

// change tells whether a reopen may change an option, and whether it may leave it out.
func change(d *driver.Any, option string) (may, reset bool) {
	first, _, _ := strings.Cut(option, ".")
	reset = slices.Contains(d.Changeable, first)
	return reset || slices.Contains(d.ChangeOnly, first), reset
}

// resettable tells which option the node has that cannot be left out, if it is.
func (e *reopening) resettable(drivers *catalog, d *driver.Any) (err error) {
	if e.kept {
		return nil
	}
	is := drivers.ownOptions(e.opts, e.gen)
	drivers.ownOptions(e.was.Canonical, e.was).EachHashed(func(name string, _ value.Value) bool {
		if _, given := is.Get(name); given && name != activity {
			return true
		}
		if _, reset := change(d, name); reset {
			return true
		}
		err = fmt.Errorf("Option '%s' cannot be reset to its default value", name)
		return false
	})
	return err
}

// activity is the option that says whether a node is opened active. As in QEMU a reopen neither
// looks at it nor is possible once it was given.
const activity = "active"

// unchanged tells which option cannot be changed, if one is.
func (e *reopening) unchanged(drivers *catalog, d *driver.Any) (err error) {
	if e.kept {
		return nil
	}
	is, was := drivers.ownOptions(e.opts, e.gen), drivers.ownOptions(e.was.Canonical, e.was)
	if name := e.opts.NodeName; name != nil && *name != e.node.Name() {
		is.Set("node-name", *name)
	}
	for _, c := range e.refs {
		switch {
		case c.Ref.Definition != nil:
			flatten(is, c.Name, optionDict(c.Ref.Definition))
		case c.Name == "backing" || c.Name == "file": // that was looked at
		case c.Ref.Reference != nil && e.node.Child(c.Name) != nil &&
			e.node.Child(c.Name).Node().Name() == *c.Ref.Reference:
		default:
			is.Set(c.Name, c.Ref)
		}
	}
	is.EachHashed(func(name string, v value.Value) bool {
		if name == activity {
			return true
		}
		if may, _ := change(d, name); may {
			return true
		}
		if old, ok := was.Get(name); ok && reflect.DeepEqual(old, v) {
			return true
		}
		err = fmt.Errorf("Cannot change the option '%s'", name)
		return false
	})
	return err
}
