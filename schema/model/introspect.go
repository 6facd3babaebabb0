package model

import (
	"cmp"
	"slices"
	"strconv"

	"qblockd/schema/value"
)

// Introspect is the reply to query-qmp-schema (QAPI type SchemaInfoList): commands
// and events file by file, then the types they use, in the order in which they are
// met. Type names are replaced by numbers in the order of their first mention, so
// that clients do not come to rely on them; integer types are all called int, arrays
// by their element in brackets.
func (s *Schema) Introspect() []byte {
	v := &introspector{masks: map[string]string{}}
	for _, e := range s.Entities {
		switch e := e.(type) {
		case *Command:
			v.command(e)
		case *Event:
			v.entity(e.Name, "event", e.Features, entry{"arg-type", v.use(orEmpty(e.Arg))})
		}
	}
	for i := 0; i < len(v.used); i++ { // grows on the way
		v.typ(v.used[i])
	}
	return value.Append(nil, v.out)
}

// CommandList is the reply to query-commands: QEMU lists commands in the
// reverse order of their definition.
func (s *Schema) CommandList() []byte {
	l := value.List{}
	for _, c := range slices.Backward(s.Commands) {
		l = append(l, dict(entry{"name", c.Name}))
	}
	return value.Append(nil, l)
}

// empty is the type of absent arguments, replies and branches.
var empty = &Type{Name: "q_empty", Kind: Object, Implicit: true}

// What integers of all sizes are called, and lists of them.
var (
	integer  = &Type{Name: "int", Kind: Builtin}
	integers = &Type{Name: "intList", Kind: Array, Elem: integer}
)

func orEmpty(t *Type) *Type {
	if t == nil {
		return empty
	}
	return t
}

type introspector struct {
	masks map[string]string
	used  []*Type
	out   value.List
}

// entry is a member of a JSON object.
type entry struct {
	key string
	val value.Value
}

// dict makes an object; members are inserted in the order of their names.
func dict(es ...entry) *value.Dict {
	slices.SortFunc(es, func(a, b entry) int { return cmp.Compare(a.key, b.key) })
	d := &value.Dict{}
	for _, e := range es {
		d.Set(e.key, e.val)
	}
	return d
}

func (v *introspector) entity(name, metaType string, features []string, es ...entry) {
	es = append(es, entry{"name", name}, entry{"meta-type", metaType})
	v.out = append(v.out, dict(withFeatures(es, features)...))
}

func withFeatures(es []entry, features []string) []entry {
	if len(features) == 0 {
		return es
	}
	return append(es, entry{"features", strs(features)})
}

func strs(ss []string) value.List {
	l := value.List{}
	for _, s := range ss {
		l = append(l, s)
	}
	return l
}

func (v *introspector) mask(name string) string {
	m, ok := v.masks[name]
	if !ok {
		m = strconv.Itoa(len(v.masks))
		v.masks[name] = m
	}
	return m
}

// use notes that t has to be described and returns the name to call it by.
func (v *introspector) use(t *Type) string {
	switch {
	case t.JSONType() == "int":
		t = integer
	case t.Kind == Array && t.Elem.JSONType() == "int":
		t = integers
	}
	if !slices.Contains(v.used, t) {
		v.used = append(v.used, t)
	}
	switch t.Kind {
	case Builtin:
		return t.Name
	case Array:
		return "[" + v.use(t.Elem) + "]"
	}
	return v.mask(t.Name)
}

func (v *introspector) command(c *Command) {
	es := []entry{{"arg-type", v.use(orEmpty(c.Arg))}, {"ret-type", v.use(orEmpty(c.Ret))}}
	if c.AllowOOB {
		es = append(es, entry{"allow-oob", true})
	}
	v.entity(c.Name, "command", c.Features, es...)
}

func (v *introspector) typ(t *Type) {
	switch t.Kind {
	case Builtin:
		v.entity(t.Name, "builtin", nil, entry{"json-type", t.JSONType()})
	case Array:
		elem := v.use(t.Elem)
		v.entity("["+elem+"]", "array", nil, entry{"element-type", elem})
	case Enum:
		members, values := value.List{}, value.List{}
		for _, e := range t.Values {
			members = append(members, dict(withFeatures([]entry{{"name", e.Name}}, e.Features)...))
			values = append(values, e.Name)
		}
		v.entity(v.mask(t.Name), "enum", t.Features, entry{"members", members}, entry{"values", values})
	case Alternate:
		members := value.List{}
		for _, m := range t.Local {
			members = append(members, dict(entry{"type", v.use(m.Type)}))
		}
		v.entity(v.mask(t.Name), "alternate", t.Features, entry{"members", members})
	case Object:
		v.object(t)
	}
}

func (v *introspector) object(t *Type) {
	members := value.List{}
	for _, m := range t.Members() {
		es := []entry{{"name", m.Name}, {"type", v.use(m.Type)}}
		if m.Optional {
			es = append(es, entry{"default", value.Null{}})
		}
		members = append(members, dict(withFeatures(es, m.Features)...))
	}
	es := []entry{{"members", members}}
	if t.Tag != nil {
		es = append(es, entry{"tag", t.Tag.Name}, entry{"variants", v.variants(t)})
	}
	v.entity(v.mask(t.Name), "object", t.Features, es...)
}

// variants lists the branches, then the tag values without branch.
func (v *introspector) variants(t *Type) value.List {
	l := value.List{}
	for _, b := range t.Variants {
		l = append(l, dict(entry{"case", b.Case}, entry{"type", v.use(b.Type)}))
	}
	for _, e := range t.Tag.Type.Values {
		if t.Variant(e.Name) == nil {
			l = append(l, dict(entry{"case", e.Name}, entry{"type", v.use(empty)}))
		}
	}
	return l
}
