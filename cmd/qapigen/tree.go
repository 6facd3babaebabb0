package main

import (
	"fmt"

	qapi "github.com/digitalocean/go-qemu/qapi-schema"

	"qblockd/schema/model"
)

// fromTree gives one expression of the parser's tree in canonical form. Conditions
// and pragmas, which our files do not use, are refused.
func fromTree(t *qapi.Tree) (model.Dict, error) {
	c := &converter{}
	var d model.Dict
	switch n := t.Node.(type) {
	case qapi.Include:
		d = model.Dict{{Key: "include", Val: string(n)}}
	case *qapi.Enum:
		c.noCond(n.If)
		d = model.Dict{{Key: "enum", Val: n.Name}, {Key: "data", Val: c.values(n.Values)}}
		if n.Prefix != "" {
			d = append(d, model.Pair{Key: "prefix", Val: n.Prefix})
		}
		d = c.features(d, n.Features)
	case *qapi.Struct:
		c.noCond(n.If)
		d = model.Dict{{Key: "struct", Val: n.Name}, {Key: "data", Val: c.members(n.Members)}}
		if n.Base != "" {
			d = append(d, model.Pair{Key: "base", Val: n.Base})
		}
		d = c.features(d, n.Features)
	case *qapi.Union:
		c.noCond(n.If)
		d = model.Dict{{Key: "union", Val: n.Name}, {Key: "discriminator", Val: n.Discriminator}, {Key: "data", Val: c.branches(n.Branches)}}
		if n.Base.Name != "" {
			d = append(d, model.Pair{Key: "base", Val: n.Base.Name})
		} else {
			d = append(d, model.Pair{Key: "base", Val: c.members(n.Base.Members)})
		}
		d = c.features(d, n.Features)
	case *qapi.Alternate:
		c.noCond(n.If)
		alts := model.Dict{}
		for _, a := range n.Data {
			c.noCond(a.If)
			alts = append(alts, model.Pair{Key: a.Name, Val: ref(a.Type)})
		}
		d = c.features(model.Dict{{Key: "alternate", Val: n.Name}, {Key: "data", Val: alts}}, n.Features)
	case *qapi.Command:
		d = c.command(n)
	case *qapi.Event:
		d = c.event(n)
	default:
		return nil, fmt.Errorf("expressions like this (%T) are not supported", t.Node)
	}
	return sorted(d), c.err
}

type converter struct{ err error }

func (c *converter) noCond(cond *qapi.Cond) {
	if cond != nil {
		c.err = fmt.Errorf("conditions are not supported")
	}
}

func (c *converter) command(n *qapi.Command) model.Dict {
	c.noCond(n.If)
	d := model.Dict{{Key: "command", Val: n.Name}}
	switch {
	case n.Data.Embed != nil:
		d = append(d, model.Pair{Key: "data", Val: c.members(n.Data.Embed.Members)})
	case n.Data.Ref != nil:
		d = append(d, model.Pair{Key: "data", Val: string(*n.Data.Ref)})
	}
	if n.Returns != nil {
		d = append(d, model.Pair{Key: "returns", Val: ref(*n.Returns)})
	}
	for key, flag := range map[string]*bool{
		"boxed": n.Boxed, "allow-oob": n.AllowOOB, "coroutine": n.Coroutine, "gen": n.Gen,
		"success-response": n.SuccessResponse, "allow-preconfig": n.AllowPreconfig,
	} {
		if flag != nil {
			d = append(d, model.Pair{Key: key, Val: *flag})
		}
	}
	return c.features(d, n.Features)
}

func (c *converter) event(n *qapi.Event) model.Dict {
	c.noCond(n.If)
	d := model.Dict{{Key: "event", Val: n.Name}}
	sel := n.Data.Selector
	switch {
	case sel.Ref != "":
		d = append(d, model.Pair{Key: "data", Val: sel.Ref})
	case sel.Embed != nil && sel.Embed.Type != "":
		d = append(d, model.Pair{Key: "data", Val: sel.Embed.Type})
	case sel.Embed != nil:
		d = append(d, model.Pair{Key: "data", Val: c.members(sel.Embed.Members)})
	}
	if n.Data.Boxed {
		d = append(d, model.Pair{Key: "boxed", Val: true})
	}
	return c.features(d, n.Features)
}

func (c *converter) members(ms []qapi.Member) model.Dict {
	d := model.Dict{}
	for _, m := range ms {
		c.noCond(m.If)
		key := m.Name
		if m.Optional {
			key = "*" + key
		}
		val := ref(m.Type)
		if len(m.Features) > 0 {
			val = sorted(c.features(model.Dict{{Key: "type", Val: val}}, m.Features))
		}
		d = append(d, model.Pair{Key: key, Val: val})
	}
	return d
}

func (c *converter) branches(bs []qapi.Branch) model.Dict {
	d := model.Dict{}
	for _, b := range bs {
		c.noCond(b.If)
		d = append(d, model.Pair{Key: b.Name, Val: ref(b.Type)})
	}
	return d
}

func (c *converter) values(vs []qapi.EnumValue) model.List {
	l := model.List{}
	for _, v := range vs {
		c.noCond(v.Cond)
		if len(v.Features) > 0 {
			l = append(l, sorted(c.features(model.Dict{{Key: "name", Val: v.Value}}, v.Features)))
		} else {
			l = append(l, v.Value)
		}
	}
	return l
}

func (c *converter) features(d model.Dict, fs []qapi.Feature) model.Dict {
	if len(fs) == 0 {
		return d
	}
	l := model.List{}
	for _, f := range fs {
		if f.Cond != (qapi.Cond{}) {
			c.err = fmt.Errorf("conditions are not supported")
		}
		l = append(l, f.Name)
	}
	return append(d, model.Pair{Key: "features", Val: l})
}

func ref(t qapi.TypeRef) any {
	if t.TypeArray != "" {
		return model.List{string(t.TypeArray)}
	}
	return t.Type
}
