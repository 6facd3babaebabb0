package introspect

import (
	"slices"
	"strings"
	"testing"

	"qblockd/schema"
)

func names(l []Member) string {
	var s []string
	for _, m := range l {
		s = append(s, m.Name)
	}
	return strings.Join(s, " ")
}

func none(string) string { return "" }

const small = `[
 {"name": "add", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
 {"name": "BOOM", "meta-type": "event", "arg-type": "0"},
 {"name": "0", "meta-type": "object", "members": []},
 {"name": "1", "meta-type": "object", "tag": "kind", "members": [
   {"name": "kind", "type": "2"}, {"name": "n", "type": "int", "default": null}, {"name": "list", "type": "[1]", "default": null}],
   "variants": [{"case": "x", "type": "3"}, {"case": "y", "type": "0"}]},
 {"name": "2", "meta-type": "enum", "values": ["x", "y"], "members": [{"name": "x"}, {"name": "y", "features": []}]},
 {"name": "3", "meta-type": "object", "members": [{"name": "child", "type": "4"}]},
 {"name": "4", "meta-type": "alternate", "members": [{"type": "1"}, {"type": "str"}, {"type": "null"}]},
 {"name": "[1]", "meta-type": "array", "element-type": "1"},
 {"name": "int", "meta-type": "builtin", "json-type": "int"},
 {"name": "null", "meta-type": "builtin", "json-type": "null"},
 {"name": "str", "meta-type": "builtin", "json-type": "string"}]`

func TestSmall(t *testing.T) {
	s, err := Parse([]byte(small))
	if err != nil {
		t.Fatal(err)
	}
	given := func(key string) string {
		return map[string]string{"kind": "x", "child.kind": "x", "list.0.kind": "x", "list.1.kind": "y"}[key]
	}
	for _, c := range []struct {
		prefix string
		given  func(string) string
		want   string
	}{
		{"", none, "kind n list"},
		{"", given, "kind n list child"},
		{"child.", none, ""},
		{"child.", given, "kind n list child"},
		{"child.child.", given, "kind n list"},
		{"list.0.", given, "kind n list child"},
		{"list.1.", given, "kind n list"},
		{"list.x.", given, ""},
		{"n.", given, ""},
		{"nothing.", given, ""},
	} {
		if got := names(s.Members("add", c.prefix, c.given)); got != c.want {
			t.Errorf("%q: %s, want %s", c.prefix, got, c.want)
		}
	}
	m, ok := s.Find("add", "list.3", none)
	if !ok || m.Type != "1" || !m.Optional {
		t.Errorf("list.3 is %+v", m)
	}
	if m, ok = s.Find("add", "child", given); !ok || m.Optional || s.Describe(m.Type) != "object or string or null" {
		t.Errorf("child is %+v, %s", m, s.Describe(m.Type))
	}
	if object, other := s.Object(m.Type); !object || !other || !slices.Equal(s.Values(m.Type), []string{"null"}) {
		t.Error("child is not what it is")
	}
	if s.OpenTag("add", "", none) != "kind" || s.OpenTag("add", "", given) != "" {
		t.Error("the tag")
	}
	if _, ok := s.Find("no", "x", none); ok || s.Has("no") || !s.Has("add") || !slices.Equal(s.Events(), []string{"BOOM"}) {
		t.Error("commands")
	}
	for _, bad := range []string{``, `{}`, `[{"name": "x", "meta-type": "object", "members": [1]}]`} {
		if _, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%s is a schema", bad)
		}
	}
}

// TestOurs: the schema of qblockd is understood whole, and its arguments are explained.
func TestOurs(t *testing.T) {
	s, err := Parse(schema.QueryQMPSchema())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Commands()) == 0 || len(s.Events()) == 0 {
		t.Fatal(s.Commands(), s.Events())
	}
	for _, c := range s.Commands() {
		prose := NewProse(schema.JSONSchema(c))
		if prose.Text() == "" {
			t.Errorf("%s is not explained", c)
		}
		for _, m := range s.Members(c, "", none) {
			if s.Describe(m.Type) == "" {
				t.Errorf("%s: %s is of no type", c, m.Name)
			}
		}
	}
	given := func(key string) string {
		return map[string]string{"driver": "qcow2", "file.driver": "file"}[key]
	}
	prose := NewProse(schema.JSONSchema("blockdev-add"))
	for _, key := range []string{"node-name", "backing", "file.filename", "file.locking"} {
		m, ok := s.Find("blockdev-add", key, given)
		if !ok || prose.Of(key, given).Text() == "" {
			t.Errorf("%s: %+v, explained as %q", key, m, prose.Of(key, given).Text())
		}
	}
	if m, _ := s.Find("blockdev-add", "backing", given); s.Describe(m.Type) != "node name, null or definition" {
		t.Error(s.Describe(m.Type))
	}
	if text := prose.Of("no.such.0", given).Text(); text != "" {
		t.Errorf("%q", text)
	}
	// What all branches have is explained before one is chosen.
	prose = NewProse(schema.JSONSchema("block-export-add"))
	if prose.Of("node-name", none).Text() == "" {
		t.Error("block-export-add: node-name is not explained without a type")
	}
	if text := NewProse(nil).Of("x", none).Text(); text != "" {
		t.Errorf("%q", text)
	}
}
