package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"qblockd/schema/model"
)

// encoder writes AppendJSON of a type.
func (g *generator) encoder(w *text, t *model.Type) {
	w.p("// AppendJSON appends x in QEMU's form, members in hash order.")
	w.p("func (x *%s) AppendJSON(b []byte) []byte {", typeName(t))
	switch {
	case t.Kind == model.Alternate:
		w.p("switch {")
		for _, m := range t.Local {
			f := "x." + camel(m.Name)
			if goType(m.Type) == "bool" {
				w.p("case %s:\nreturn append(b, \"null\"...)", f)
				continue
			}
			w.p("case %s != nil:\nreturn %s", f, encode(m.Type, "*"+f, f))
		}
		w.p("}")
		w.p("panic(\"%s with no field set\")", typeName(t))
	case t.Tag != nil:
		g.encodeUnion(w, t)
	default:
		g.encodeMembers(w, t.Members(), nil)
	}
	w.p("}\n")
}

// encodeUnion writes one case for each Go type of a branch: the order of members
// depends on all members together.
func (g *generator) encodeUnion(w *text, t *model.Type) {
	u := "" // unless a branch has members
	for _, v := range t.Variants {
		if len(v.Type.Members()) > 0 {
			u = "u := "
		}
	}
	w.p("switch %sx.U.(type) {", u)
	done := map[string]bool{}
	for _, v := range t.Variants {
		name := typeName(v.Type)
		if done[name] || len(v.Type.Members()) == 0 {
			continue
		}
		done[name] = true
		w.p("case *%s:", name)
		g.encodeMembers(w, t.Members(), v.Type.Members())
	}
	w.p("case nil:")
	g.encodeMembers(w, t.Members(), nil)
	w.p("}")
	w.p("panic(\"%s with a branch of another type\")", typeName(t))
}

// encodeMembers writes the members of an object; those of the branch are in u.
func (g *generator) encodeMembers(w *text, ms, branch []*model.Member) {
	all := slices.Concat(ms, branch)
	if len(all) == 0 {
		w.p("return append(b, \"{}\"...)")
		return
	}
	// While only optional members came before, the separator is decided at run time.
	first := true
	sure := false
	for _, m := range hashOrder(all) {
		f := "x." + camel(m.Name)
		if slices.Contains(branch, m) {
			f = "u." + camel(m.Name)
		}
		key := fmt.Sprintf("appendKey(b, %q)", m.Name)
		open := ""
		switch {
		case first && !m.Optional:
			key = fmt.Sprintf("append(b, `{%q: `...)", m.Name)
		case first:
			open = "b = append(b, '{')\n"
		case sure:
			key = fmt.Sprintf("append(b, `, %q: `...)", m.Name)
		}
		first = false
		if !m.Optional {
			sure = true
			w.p("%sb = %s\nb = %s", open, key, encode(m.Type, f, "&"+f))
			continue
		}
		val := "*" + f
		if m.Type.Kind == model.Array || goType(m.Type) == "value.Value" {
			val = f
		}
		w.p("%sif %s != nil {\nb = %s\nb = %s\n}", open, f, key, encode(m.Type, val, f))
	}
	w.p("return append(b, '}')")
}

// encode is the expression that appends a value to b: val names the value, ptr a pointer to it.
func encode(t *model.Type, val, ptr string) string {
	switch t.Kind {
	case model.Enum:
		return "appendEnum(b, " + val + ")"
	case model.Array:
		if k := t.Elem.Kind; k == model.Object || k == model.Alternate {
			return fmt.Sprintf("appendList(b, %s, func(b []byte, v *%s) []byte { return v.AppendJSON(b) })", val, typeName(t.Elem))
		}
		return fmt.Sprintf("appendList(b, %s, %s)", val, appender(t.Elem))
	case model.Builtin:
		return appender(t) + "(b, " + val + ")"
	}
	return strings.TrimPrefix(ptr, "&") + ".AppendJSON(b)"
}

// appender is the function that appends a scalar.
func appender(t *model.Type) string {
	if t.Kind == model.Enum {
		return "appendEnum[" + typeName(t) + "]"
	}
	switch t.JSONType() {
	case "string":
		return "value.AppendString"
	case "boolean":
		return "appendBool"
	case "number":
		return "value.AppendDouble"
	case "value":
		return "value.Append"
	}
	if strings.HasPrefix(goType(t), "u") {
		return "appendUint"
	}
	return "appendInt"
}

// decoder writes the decoding functions of a type.
func (g *generator) decoder(w *text, t *model.Type) {
	name := typeName(t)
	if t.Kind != model.Enum && !t.Implicit {
		w.p("// Decode%s decodes v; faults are worded as QEMU does (*ArgError).", name)
		w.p("func Decode%s(v value.Value, m Mode) (*%s, error) { return decode(v, m, visit%s) }\n", name, name, name)
	} else if t.Implicit {
		w.p("// Decode%s decodes the arguments in v, nil for none; faults are worded as QEMU does (*ArgError).", name)
		w.p("func Decode%s(v *value.Dict) (*%s, error) { return args(v, visit%s) }\n", name, name, name)
	}
	w.p("func visit%s(d *decoder, name string, x *%s) bool {", name, name)
	switch t.Kind {
	case model.Enum:
		w.p("return enum(d, name, x, %sValues)\n}\n", name)
		return
	case model.Alternate:
		g.decodeAlternate(w, t)
		return
	}
	w.p("return object(d, name, x, members%s)\n}\n", name)
	w.p("func members%s(d *decoder, x *%s) bool {", name, name)
	var calls []string
	for _, m := range t.Members() {
		calls = append(calls, decodeMember(m))
	}
	if t.Tag == nil {
		if len(calls) == 0 {
			calls = []string{"true"}
		}
		w.p("return %s\n}\n", strings.Join(calls, " &&\n"))
		return
	}
	w.p("if !(%s) {\nreturn false\n}", strings.Join(calls, " &&\n"))
	g.decodeBranches(w, t)
	w.p("return true\n}\n")
}

func decodeMember(m *model.Member) string {
	f := "&x." + camel(m.Name)
	fn, visit := "", visitor(m.Type)
	if m.Type.Kind == model.Array {
		visit = visitor(m.Type.Elem)
		fn = "list"
		if m.Optional {
			fn = "optList"
		}
		if k := m.Type.Elem.Kind; k == model.Object || k == model.Alternate {
			fn += "Ptr"
		}
	} else if m.Optional {
		fn = "opt"
		if goType(m.Type) == "value.Value" {
			return fmt.Sprintf("(!d.has(%q) || visitAny(d, %q, %s))", m.Name, m.Name, f)
		}
	}
	if fn == "" {
		return fmt.Sprintf("%s(d, %q, %s)", visit, m.Name, f)
	}
	return fmt.Sprintf("%s(d, %q, %s, %s)", fn, m.Name, f, visit)
}

func (g *generator) decodeBranches(w *text, t *model.Type) {
	w.p("switch x.%s {", camel(t.Tag.Name))
	byType := map[string][]string{}
	for _, v := range t.Variants {
		if len(v.Type.Members()) > 0 {
			n := typeName(v.Type)
			byType[n] = append(byType[n], typeName(t.Tag.Type)+camel(v.Case))
		}
	}
	for _, n := range slices.Sorted(maps.Keys(byType)) {
		w.p("case %s:", strings.Join(byType[n], ", "))
		w.p("u := new(%s)\nx.U = u\nreturn members%s(d, u)", n, n)
	}
	w.p("}")
}

func (g *generator) decodeAlternate(w *text, t *model.Type) {
	w.p("v, ok := d.peek(name)\nif !ok {\nreturn d.missing(name)\n}")
	w.p("switch v.(type) {")
	for _, m := range t.Local {
		f := camel(m.Name)
		switch m.Type.JSONType() {
		case "object":
			w.p("case *value.Dict:")
		case "string":
			w.p("case string:")
		case "null":
			w.p("case value.Null:\nreturn visitNull(d, name, &x.%s)", f)
			continue
		}
		w.p("x.%s = new(%s)\nreturn %s(d, name, x.%s)", f, goType(m.Type), visitor(m.Type), f)
	}
	w.p("}")
	w.p("return d.fail(\"Invalid parameter type for '\" + last(name) + \"', expected: %s\")\n}\n", t.Name)
}
