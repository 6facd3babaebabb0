package model

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
)

// JSONSchema is the JSON Schema (draft 2020-12) of a command's arguments, complete in
// itself, indented, with the texts of the documentation comments. The branch called
// V of a union U is the definition "U.V".
//
// QAPI is stricter or laxer than it in these points: numbers such as 1.0 are integers
// here and not for QAPI, and QAPI accepts negative numbers for uint64 and size.
func (s *Schema) JSONSchema(c *Command) []byte {
	j := &schemaWriter{defs: map[string]bool{}}
	arg := orEmpty(c.Arg)
	root := j.object(arg)
	if arg.Tag != nil {
		root = j.union(arg)
	}
	head := obj{
		{"$schema", "https://json-schema.org/draft/2020-12/schema"},
		{"title", c.Name},
		{"description", c.Doc.Body},
	}
	if c.Doc.Since != "" {
		head = append(head, prop{"$comment", "since QEMU " + c.Doc.Since})
	}
	root = append(append(head, flags(c.Features)...), root...)
	var defs obj
	for i := 0; i < len(j.queue); i++ { // grows on the way
		name, t := j.queue[i].name, j.queue[i].t
		defs = append(defs, prop{name, j.definition(name, t)})
	}
	if defs != nil {
		root = append(root, prop{"$defs", defs})
	}
	var b bytes.Buffer
	if err := json.Indent(&b, root.appendTo(nil), "", "  "); err != nil {
		panic(err)
	}
	b.WriteByte('\n')
	return b.Bytes()
}

// obj is a JSON object whose members keep their order.
type obj []prop

type prop struct {
	key string
	val any // obj, []obj, []string, string, bool, json.Number
}

func (o obj) appendTo(b []byte) []byte {
	b = append(b, '{')
	for i, p := range o {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(strconv.AppendQuote(b, p.key), ':')
		switch v := p.val.(type) {
		case obj:
			b = v.appendTo(b)
		case []obj:
			b = append(b, '[')
			for i, e := range v {
				if i > 0 {
					b = append(b, ',')
				}
				b = e.appendTo(b)
			}
			b = append(b, ']')
		default:
			text, err := json.Marshal(v)
			if err != nil {
				panic(err)
			}
			b = append(b, text...)
		}
	}
	return append(b, '}')
}

type schemaWriter struct {
	defs  map[string]bool
	queue []queued
}

type queued struct {
	name string
	t    *Type
}

// ref refers to the definition of a type, which is queued to be written.
func (j *schemaWriter) ref(name string, t *Type) obj {
	if !j.defs[name] {
		j.defs[name] = true
		j.queue = append(j.queue, queued{name, t})
	}
	return obj{{"$ref", "#/$defs/" + name}}
}

func (j *schemaWriter) definition(name string, t *Type) obj {
	var o obj
	if t.Doc.Body != "" && name == t.Name {
		o = obj{{"description", t.Doc.Body}}
	}
	o = append(o, flags(t.Features)...)
	_, branch, isBranch := strings.Cut(name, ".")
	switch {
	case t.Kind == Enum:
		var values []string
		for _, v := range t.Values {
			values = append(values, v.Name)
		}
		return append(o, obj{{"type", "string"}, {"enum", values}}...)
	case t.Kind == Alternate:
		var any []obj
		for _, m := range t.Local {
			any = append(any, j.value(m.Type))
		}
		return append(o, prop{"anyOf", any})
	case isBranch:
		return append(o, j.branch(t, branch)...)
	case t.Tag != nil:
		return append(o, j.union(t)...)
	}
	return append(o, j.object(t)...)
}

// value is the schema of a value of type t.
func (j *schemaWriter) value(t *Type) obj {
	switch t.Kind {
	case Builtin:
		return builtin(t.Name)
	case Array:
		return obj{{"type", "array"}, {"items", j.value(t.Elem)}}
	}
	return j.ref(t.Name, t)
}

// limits are the ranges of integer types.
var limits = map[string][2]json.Number{
	"int":  {"-9223372036854775808", "9223372036854775807"},
	"int8": {"-128", "127"}, "int16": {"-32768", "32767"}, "int32": {"-2147483648", "2147483647"},
	"int64": {"-9223372036854775808", "9223372036854775807"},
	"uint8": {"0", "255"}, "uint16": {"0", "65535"}, "uint32": {"0", "4294967295"},
	"uint64": {"0", "18446744073709551615"}, "size": {"0", "18446744073709551615"},
}

func builtin(name string) obj {
	switch t := jsonTypes[name]; t {
	case "int":
		return obj{{"type", "integer"}, {"minimum", limits[name][0]}, {"maximum", limits[name][1]}}
	case "value":
		return obj{}
	default:
		return obj{{"type", t}}
	}
}

func (j *schemaWriter) object(t *Type) obj { return j.members(t.Members(), nil, "") }

// members is the schema of an object with exactly these members; tag has the value tagValue.
func (j *schemaWriter) members(ms []*Member, tag *Member, tagValue string) obj {
	o := obj{{"type", "object"}}
	var required []string
	props := obj{}
	for _, m := range ms {
		v := j.value(m.Type)
		if m == tag {
			v = obj{{"const", tagValue}}
		}
		if m.Doc != "" {
			v = append(v[:len(v):len(v)], prop{"description", m.Doc})
		}
		props = append(props, prop{m.Name, append(v, flags(m.Features)...)})
		if !m.Optional {
			required = append(required, m.Name)
		}
	}
	if len(props) > 0 {
		o = append(o, prop{"properties", props})
	}
	if required != nil {
		o = append(o, prop{"required", required})
	}
	return append(o, prop{"additionalProperties", false})
}

// branch is the whole object that a union is when its tag has the given value.
func (j *schemaWriter) branch(t *Type, tagValue string) obj {
	ms := t.Members()
	if b := t.Variant(tagValue); b != nil {
		ms = append(ms[:len(ms):len(ms)], b.Members()...)
	}
	return j.members(ms, t.Tag, tagValue)
}

// union lets the tag decide which branch applies.
func (j *schemaWriter) union(t *Type) obj {
	var cases []obj
	for _, v := range t.Tag.Type.Values {
		is := obj{{"properties", obj{{t.Tag.Name, obj{{"const", v.Name}}}}}}
		cases = append(cases, obj{{"if", is}, {"then", j.ref(t.Name+"."+v.Name, t)}})
	}
	return obj{
		{"type", "object"},
		{"properties", obj{{t.Tag.Name, j.value(t.Tag.Type)}}},
		{"required", []string{t.Tag.Name}},
		{"allOf", cases},
	}
}

// flags turns features into annotations.
func flags(features []string) obj {
	var o obj
	for _, f := range features {
		if f == "deprecated" {
			o = append(o, prop{"deprecated", true})
		} else {
			o = append(o, prop{"x-" + f, true})
		}
	}
	return o
}
