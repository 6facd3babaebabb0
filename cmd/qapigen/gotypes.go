package main

import (
	"strings"

	"qblockd/schema/model"
)

// typeDecl writes the declaration of a type.
func (g *generator) typeDecl(w *text, t *model.Type) {
	name := typeName(t)
	switch t.Kind {
	case model.Enum:
		w.comment("", name+": "+describe(t))
		w.p("type %s string\n", name)
		w.p("// The values of %s.\nconst (", name)
		for _, v := range t.Values {
			if d := t.Doc.Members[v.Name]; d != "" {
				w.comment("\t", sentence(d))
			}
			w.p("\t%s%s %s = %q", name, camel(v.Name), name, v.Name)
		}
		w.p(")\n")
		w.p("// %sValues lists the values of %s in the order of the schema.", name, name)
		w.p("var %sValues = []%s{", name, name)
		for _, v := range t.Values {
			w.p("\t%s%s,", name, camel(v.Name))
		}
		w.p("}\n")
	case model.Alternate:
		w.comment("", name+": "+describe(t)+" Just one field is set.")
		w.p("type %s struct {", name)
		for _, m := range t.Local {
			w.comment("\t", sentence(m.Doc))
			typ := "*" + goType(m.Type)
			if goType(m.Type) == "bool" {
				typ = "bool" // null: there or not
			}
			w.p("\t%s %s", camel(m.Name), typ)
		}
		w.p("}\n")
	case model.Object:
		w.comment("", name+": "+describe(t))
		g.structBody(w, t)
	}
}

func (g *generator) structBody(w *text, t *model.Type) {
	w.p("type %s struct {", typeName(t))
	w.fields(t.Members())
	if t.Tag != nil {
		w.comment("\t", "U holds the members of the branch that "+camel(t.Tag.Name)+" selects; nil where the branch has none.")
		var lines []string
		for _, v := range t.Variants {
			lines = append(lines, "*"+typeName(v.Type)+" for "+v.Case)
		}
		w.comment("\t", strings.Join(lines, ", ")+".")
		w.p("\tU any")
	}
	w.p("}\n")
}

func (w *text) fields(ms []*model.Member) {
	for _, m := range ms {
		if m.Doc != "" {
			w.comment("\t", sentence(m.Doc))
		}
		w.p("\t%s %s", camel(m.Name), fieldType(m))
	}
}

// describe is the text of a type's comment.
func describe(t *model.Type) string {
	if t.Implicit {
		owner := strings.TrimSuffix(strings.TrimPrefix(t.Name, "q_obj_"), "-arg")
		return "the arguments of " + owner + "."
	}
	if t.Doc.Body == "" {
		return "part of the schema's structure."
	}
	return lowerFirst(t.Doc.Body)
}

func lowerFirst(s string) string {
	if s == "" || len(s) > 1 && s[1] >= 'A' && s[1] <= 'Z' {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}

func sentence(s string) string {
	if s == "" {
		return s
	}
	s = strings.ToUpper(s[:1]) + s[1:]
	if !strings.HasSuffix(s, ".") {
		s += "."
	}
	return s
}

// event writes the type of an event.
func (g *generator) event(types, enc *text, e *model.Event) {
	name := eventName(e.Name)
	types.comment("", name+" is the event "+e.Name+": "+lowerFirst(e.Doc.Body))
	if e.Arg == nil {
		types.p("type %s struct{}\n", name)
	} else {
		types.p("type %s struct {", name)
		types.fields(e.Arg.Members())
		types.p("}\n")
	}
	types.p("// EventName returns %q.", e.Name)
	types.p("func (%s) EventName() string { return %q }\n", name, e.Name)
	enc.p("// AppendJSON appends the data of the event in QEMU's form.")
	if e.Arg == nil {
		enc.p("func (%s) AppendJSON(b []byte) []byte { return b }\n", name)
		return
	}
	enc.p("func (x %s) AppendJSON(b []byte) []byte {", name)
	g.encodeMembers(enc, e.Arg.Members(), nil)
	enc.p("}\n")
}
