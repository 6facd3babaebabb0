package model

import (
	"encoding/json"
	"strings"
	"testing"
)

// build makes a schema of one file; definitions without documentation comment get one.
func build(text string) (*Schema, error) {
	exprs, err := Scan("f", text)
	if err != nil {
		return nil, err
	}
	for i, e := range exprs {
		if e.Doc != "" {
			continue
		}
		for _, p := range e.Dict {
			if name, ok := p.Val.(string); ok && metas[p.Key] != (struct{ need, may string }{}) {
				exprs[i].Doc = describe(name, e.Dict)
			}
		}
	}
	return Build("f", func(string) ([]Expr, error) { return exprs, nil })
}

// describe is a comment that documents every member and feature of a definition.
func describe(name string, d Dict) string {
	doc := "@" + name + ":\n\nIt.\n\n"
	var features []string
	note := func(v any) {
		l, _ := v.(List)
		for _, f := range l {
			if s, ok := f.(string); ok {
				features = append(features, s)
			}
		}
	}
	note(d.Get("features"))
	for _, key := range []string{"base", "data"} {
		ms, _ := d.Get(key).(Dict)
		if key == "data" && d.Get("union") != nil {
			continue
		}
		for _, m := range ms {
			doc += "@" + strings.TrimPrefix(m.Key, "*") + ": a member\n"
			if ext, ok := m.Val.(Dict); ok {
				note(ext.Get("features"))
			}
		}
	}
	if features != nil {
		doc += "\nFeatures:\n\n"
		for _, f := range features {
			doc += "@" + f + ": a feature\n"
		}
	}
	return doc
}

func TestErrors(t *testing.T) {
	const (
		enum   = "{ 'enum': 'E', 'data': [ 'a', 'b' ] }\n"
		object = "{ 'struct': 'S', 'data': { 's': 'str' } }\n"
	)
	for _, c := range []struct{ text, want string }{
		{"{ 'struct': 'A', 'data': { 'a': 'Nothing' } }\n", "f:1: there is no type 'Nothing'"},
		{"{ 'struct': 'A', 'data': { 'a': [ 'int', 'int' ] } }\n", "f:1: an array type has one element type"},
		{object + object, "f:2: 'S' is already defined in f:1"},
		{object + "{ 'command': 'S' }\n", "f:2: 'S' is already defined in f:1"},
		{"{ 'struct': 'int', 'data': {} }\n", "f:1: 'int' is a built-in type"},
		{"{ 'enum': 'E', 'data': [ 'a', 'a' ] }\n", "f:1: enum 'E' has the value 'a' twice"},
		{"{ 'enum': 'E', 'data': [ 'A' ] }\n", "f:1: the value 'A' of 'E' is not in lower case with hyphens"},
		{"{ 'enum': 'E', 'data': [] }\n", "f:1: enum 'E' has no values"},
		{"{ 'struct': 'A', 'data': { 'a_b': 'int' } }\n", "f:1: the member 'a_b' of 'A' is not in lower case with hyphens"},
		{"{ 'struct': 'a-b', 'data': {} }\n", "f:1: the type name 'a-b' is not in CamelCase"},
		{object + "{ 'struct': 'A', 'base': 'S', 'data': { '*s': 'int' } }\n", "f:2: 'A' has the member 's' twice"},
		{"{ 'struct': 'A', 'base': 'B', 'data': {} }\n{ 'struct': 'B', 'base': 'A', 'data': {} }\n", "f:1: 'B' cannot be the base of 'A'"},
		{enum + "{ 'struct': 'A', 'base': 'E', 'data': {} }\n", "f:2: 'E' cannot be the base of 'A'"},
		{enum + object + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'x', 'data': { 'a': 'S' } }\n", "f:3: 'U' has no member 'x' to tell its branches apart"},
		{enum + object + "{ 'union': 'U', 'base': { '*e': 'E' }, 'discriminator': 'e', 'data': { 'a': 'S' } }\n", "f:3: the discriminator 'e' of 'U' is not a mandatory enum"},
		{enum + object + "{ 'union': 'U', 'base': { 'e': 'str' }, 'discriminator': 'e', 'data': { 'a': 'S' } }\n", "f:3: the discriminator 'e' of 'U' is not a mandatory enum"},
		{enum + object + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'e', 'data': { 'c': 'S' } }\n", "f:3: branch 'c' of 'U' is not a value of 'E'"},
		{enum + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'e', 'data': { 'a': 'E' } }\n", "f:2: branch 'a' of 'U' is not a struct"},
		{enum + object + "{ 'union': 'U', 'base': { 'e': 'E', 's': 'int' }, 'discriminator': 'e', 'data': { 'a': 'S' } }\n", "f:3: 'U' has the member 's' twice"},
		{enum + "{ 'union': 'U', 'base': { 'e': 'E' }, 'data': {} }\n", "f:2: union 'U' lacks 'discriminator'"},
		{enum + "{ 'alternate': 'A', 'data': { 'a': 'str', 'b': 'E' } }\n", "f:2: 'A' has two alternatives that are a JSON string"},
		{"{ 'alternate': 'A', 'data': { 'a': 'int' } }\n", "f:1: the alternative 'a' of 'A' is neither object nor string nor null"},
		{"{ 'command': 'do_it' }\n", "f:1: the command name 'do_it' is not in lower case with hyphens"},
		{"{ 'command': 'do', 'returns': 'int' }\n", "f:1: 'do' returns neither an object nor objects"},
		{"{ 'command': 'do', 'data': {}, 'boxed': true }\n", "f:1: command 'do' is boxed but has no named type"},
		{"{ 'command': 'do', 'gen': false }\n", "f:1: command 'do' has a key 'gen', which is not supported"},
		{"{ 'event': 'happened' }\n", "f:1: the event name 'happened' is not in upper case with underscores"},
		{"{ 'command': 'a', 'event': 'B' }\n", "f:1: both 'command' and 'event'"},
		{"{ 'colour': 'red' }\n", "f:1: neither a definition nor an inclusion"},
		{"##\n# @B:\n#\n# It.\n##\n" + object, "f:6: the comment above 'S' starts with \"@B:\", not with \"@S:\""},
		{"##\n# @S:\n#\n# It.\n##\n" + object, "f:6: the comment above 'S' does not describe 's'"},
		{"##\n# @S:\n#\n# @s: a\n# @t: b\n##\n" + object, "f:7: the comment above 'S' describes 't', which is not there"},
		{"##\n# @S:\n#\n# @s: a\n# @s: b\n##\n" + object, "f:7: the comment above 'S' describes 's' twice"},
		{"##\n# @do:\n#\n# It.\n##\n{ 'command': 'do', 'features': [ 'unstable' ] }\n", "f:6: the comment above 'do' does not describe the feature 'unstable'"},
		{"##\n# open\n{ 'command': 'do' }\n", "f:3: documentation comment without closing \"##\""},
	} {
		_, err := build(c.text)
		if err == nil || err.Error() != c.want {
			t.Errorf("%s got  %v\n want %s", c.text, err, c.want)
		}
	}
}

const sample = `
{ 'enum': 'E', 'data': [ 'a', { 'name': 'b', 'features': [ 'deprecated' ] } ] }
{ 'struct': 'S', 'data': { 'n': 'uint8', '*s': [ 'size' ] } }
{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'e', 'data': { 'a': 'S' } }
{ 'alternate': 'A', 'data': { 'o': 'U', 's': 'str', 'n': 'null' } }
{ 'command': 'do', 'data': 'U', 'boxed': true, 'returns': [ 'S' ], 'features': [ 'unstable' ] }
{ 'event': 'DONE', 'data': { 'a': 'A' } }
{ 'command': 'rest', 'allow-oob': true }
`

// TestIntrospect shows the whole algorithm on a schema of a few lines.
func TestIntrospect(t *testing.T) {
	s, err := build(sample)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		`{"name": "do", "ret-type": "[1]", "meta-type": "command", "arg-type": "0", "features": ["unstable"]}`,
		`{"name": "DONE", "meta-type": "event", "arg-type": "2"}`,
		`{"name": "rest", "ret-type": "3", "meta-type": "command", "arg-type": "3", "allow-oob": true}`,
		`{"name": "0", "members": [{"name": "e", "type": "4"}], "meta-type": "object", "tag": "e", "variants": [{"case": "a", "type": "1"}, {"case": "b", "type": "3"}]}`,
		`{"name": "[1]", "element-type": "1", "meta-type": "array"}`,
		`{"name": "1", "members": [{"name": "n", "type": "int"}, {"name": "s", "default": null, "type": "[int]"}], "meta-type": "object"}`,
		`{"name": "2", "members": [{"name": "a", "type": "5"}], "meta-type": "object"}`,
		`{"name": "3", "members": [], "meta-type": "object"}`,
		`{"name": "4", "members": [{"name": "a"}, {"name": "b", "features": ["deprecated"]}], "meta-type": "enum", "values": ["a", "b"]}`,
		`{"name": "int", "json-type": "int", "meta-type": "builtin"}`,
		`{"name": "[int]", "element-type": "int", "meta-type": "array"}`,
		`{"name": "5", "members": [{"type": "0"}, {"type": "str"}, {"type": "null"}], "meta-type": "alternate"}`,
		`{"name": "str", "json-type": "string", "meta-type": "builtin"}`,
		`{"name": "null", "json-type": "null", "meta-type": "builtin"}`,
	}
	var got, exp []any
	if err := json.Unmarshal(s.Introspect(), &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte("["+strings.Join(want, ",")+"]"), &exp); err != nil {
		t.Fatal(err)
	}
	for i := range max(len(got), len(exp)) {
		var g, w []byte
		if i < len(got) {
			g, _ = json.Marshal(got[i])
		}
		if i < len(exp) {
			w, _ = json.Marshal(exp[i])
		}
		if string(g) != string(w) {
			t.Errorf("entry %d\n got  %s\n want %s", i, g, w)
		}
	}
	if got, want := string(s.CommandList()), `[{"name": "rest"}, {"name": "do"}]`; got != want {
		t.Errorf("commands: got %s, want %s", got, want)
	}
}

func TestJSONSchema(t *testing.T) {
	s, err := build(sample)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Required []string
		AllOf    []struct{ Then map[string]string }
		Defs     map[string]struct {
			Properties           map[string]map[string]any
			Required             []string
			AdditionalProperties *bool
		} `json:"$defs"`
	}
	if err := json.Unmarshal(s.JSONSchema(s.Command("do")), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.AllOf) != 2 || doc.AllOf[1].Then["$ref"] != "#/$defs/U.b" {
		t.Errorf("branches: %v", doc.AllOf)
	}
	a, b := doc.Defs["U.a"], doc.Defs["U.b"]
	if a.Properties["e"]["const"] != "a" || len(a.Properties) != 3 || len(a.Required) != 2 ||
		a.AdditionalProperties == nil || *a.AdditionalProperties {
		t.Errorf("branch a: %+v", a)
	}
	if len(b.Properties) != 1 {
		t.Errorf("branch b: %+v", b)
	}
	if a.Properties["n"]["maximum"] != 255.0 {
		t.Errorf("uint8: %v", a.Properties["n"])
	}
}

func TestScan(t *testing.T) {
	exprs, err := Scan("f", "# note\n##\n# @a:\n#\n# Text\n##\n{ 'x': [ true, false, { } ], # end\n  'y': 'z' }\n\n##\n# lost\n##\n\n{'a':[]}\n")
	if err != nil {
		t.Fatal(err)
	}
	if len(exprs) != 2 || exprs[0].Line != 7 || exprs[0].Doc != "@a:\n\nText" || exprs[1].Doc != "" || exprs[1].Line != 14 {
		t.Errorf("got %+v", exprs)
	}
	if v := exprs[0].Dict.Get("x").(List); v[0] != true || v[1] != false || len(v[2].(Dict)) != 0 {
		t.Errorf("got %v", v)
	}
	for _, bad := range []string{
		"x\n", "{\n", "{ 'a' }\n", "{ 'a': }\n", "{ 'a': 1 }\n", "{ 'a': 'b', }\n", "{ 'a': ['b',] }\n", "{ 'a': '' }\n", "{ 'a\n': 'b' }\n",
		"{ \"a\": 'b' }\n", "{ 'a': 'b' } }\n", "{ 'a': truth }\n", "{ 'a': " + strings.Repeat("[", 40) + "\n", "{'a':'b'}\t\n", "{'a':'b'}\r\n",
	} {
		if exprs, err := Scan("f", bad); err == nil {
			t.Errorf("%q was accepted: %v", bad, exprs)
		}
	}
}

func FuzzScan(f *testing.F) {
	f.Add(sample)
	f.Add("##\n# @a:\n##\n{ 'command': 'a' }\n")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := build(text)
		if err == nil && !json.Valid(s.Introspect()) {
			t.Error("the introspection is not JSON")
		}
	})
}
