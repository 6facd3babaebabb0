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
		d = c.definition("enum", n.Name, n.If, n.Features, pair("data", c.values(n.Values)), pair("prefix", n.Prefix))
	case *qapi.Struct:
		d = c.definition("struct", n.Name, n.If, n.Features, pair("data", c.members(n.Members)), pair("base", n.Base))
	case *qapi.Union:
		base := pair("base", n.Base.Name)
		if n.Base.Name == "" {
			base = pair("base", c.members(n.Base.Members))
		}
		d = c.definition("union", n.Name, n.If, n.Features,
			pair("discriminator", n.Discriminator), pair("data", c.branches(n.Branches)), base)
	case *qapi.Alternate:
		alts := model.Dict{}
		for _, a := range n.Data {
			c.noCond(a.If)
			alts = append(alts, pair(a.Name, ref(a.Type)))
		}
		d = c.definition("alternate", n.Name, n.If, n.Features, pair("data", alts))
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

func pair(key string, val any) model.Pair { return model.Pair{Key: key, Val: val} }

// definition is a definition with those of rest that have a value.
func (c *converter) definition(
	meta, name string, cond *qapi.Cond, features []qapi.Feature, rest ...model.Pair,
) model.Dict {
	c.noCond(cond)
	d := model.Dict{pair(meta, name)}
	for _, p := range rest {
		if p.Val != nil && p.Val != "" {
			d = append(d, p)
		}
	}
	return c.features(d, features)
}

func (c *converter) command(n *qapi.Command) model.Dict {
	var rest []model.Pair
	switch {
	case n.Data.Embed != nil:
		rest = append(rest, pair("data", c.members(n.Data.Embed.Members)))
	case n.Data.Ref != nil:
		rest = append(rest, pair("data", string(*n.Data.Ref)))
	}
	if n.Returns != nil {
		rest = append(rest, pair("returns", ref(*n.Returns)))
	}
	for key, flag := range map[string]*bool{
		"boxed": n.Boxed, "allow-oob": n.AllowOOB, "coroutine": n.Coroutine, "gen": n.Gen,
		"success-response": n.SuccessResponse, "allow-preconfig": n.AllowPreconfig,
	} {
		if flag != nil {
			rest = append(rest, pair(key, *flag))
		}
	}
	return c.definition("command", n.Name, n.If, n.Features, rest...)
}

func (c *converter) event(n *qapi.Event) model.Dict {
	var rest []model.Pair
	sel := n.Data.Selector
	switch {
	case sel.Ref != "":
		rest = append(rest, pair("data", sel.Ref))
	case sel.Embed != nil && sel.Embed.Type != "":
		rest = append(rest, pair("data", sel.Embed.Type))
	case sel.Embed != nil:
		rest = append(rest, pair("data", c.members(sel.Embed.Members)))
	}
	if n.Data.Boxed {
		rest = append(rest, pair("boxed", true))
	}
	return c.definition("event", n.Name, n.If, n.Features, rest...)
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
		d = append(d, pair(key, val))
	}
	return d
}

func (c *converter) branches(bs []qapi.Branch) model.Dict {
	d := model.Dict{}
	for _, b := range bs {
		c.noCond(b.If)
		d = append(d, pair(b.Name, ref(b.Type)))
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
	return append(d, pair("features", l))
}

func ref(t qapi.TypeRef) any {
	if t.TypeArray != "" {
		return model.List{string(t.TypeArray)}
	}
	return t.Type
}
