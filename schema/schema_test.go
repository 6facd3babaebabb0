package schema

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"slices"
	"sort"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "set the marks in testdata/introspection.tsv anew")

// info is a SchemaInfo.
type info struct {
	Name        string   `json:"name"`
	MetaType    string   `json:"meta-type"`
	JSONType    string   `json:"json-type"`
	ElementType string   `json:"element-type"`
	ArgType     string   `json:"arg-type"`
	RetType     string   `json:"ret-type"`
	AllowOOB    bool     `json:"allow-oob"`
	Features    []string `json:"features"`
	Tag         string   `json:"tag"`
	Members     []member `json:"members"`
	Values      []string `json:"values"`
	Variants    []struct{ Case, Type string }
}

type member struct {
	Name, Type string
	Optional   bool `json:"-"`
	Features   []string
}

func (m *member) UnmarshalJSON(b []byte) error {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return err
	}
	_, m.Optional = raw["default"]
	for key, to := range map[string]any{"name": &m.Name, "type": &m.Type, "features": &m.Features} {
		if v, ok := raw[key]; ok {
			if err := json.Unmarshal(v, to); err != nil {
				return err
			}
		}
	}
	return nil
}

func introspect(t *testing.T) []info {
	t.Helper()
	var infos []info
	if err := json.Unmarshal(QueryQMPSchema(), &infos); err != nil {
		t.Fatal(err)
	}
	return infos
}

// walker flattens a schema: type names mean nothing, so it goes down from commands and
// events and names what it meets by paths.
type walker struct {
	types map[string]*info
	rows  []string
}

func (w *walker) row(cells ...string) { w.rows = append(w.rows, strings.Join(cells, "\t")) }

func (w *walker) describe(name string) string {
	switch t := w.types[name]; t.MetaType {
	case "builtin":
		return t.JSONType
	case "array":
		return "[" + w.describe(t.ElementType) + "]"
	case "alternate":
		var alts []string
		for _, m := range t.Members {
			alts = append(alts, w.describe(m.Type))
		}
		sort.Strings(alts)
		return "alternate(" + strings.Join(alts, "/") + ")"
	default:
		return t.MetaType
	}
}

func (w *walker) walk(kind, owner, path, name string, stack []string) {
	t := w.types[name]
	switch t.MetaType {
	case "enum":
		kind = map[string]string{"arg": "value", "ret": "retvalue", "data": "datavalue"}[kind]
		if path == "" {
			path = "."
		}
		for _, m := range t.Members {
			w.row(kind, owner, path, m.Name, "", strings.Join(m.Features, ","))
		}
		return
	case "array":
		w.walk(kind, owner, path+"[]", t.ElementType, stack)
		return
	case "builtin":
		return
	}
	if slices.Contains(stack, name) {
		w.row(kind, owner, path+".~", "again", "", "")
		return
	}
	stack = append(slices.Clone(stack), name)
	if t.MetaType == "alternate" {
		for _, m := range t.Members {
			p := path + "<" + w.describe(m.Type) + ">"
			if w.types[m.Type].Tag == "driver" {
				w.row(kind, owner, p+".~", "again", "", "") // a node in a node: walked once
			} else {
				w.walk(kind, owner, p, m.Type, stack)
			}
		}
		return
	}
	w.object(kind, owner, path, t, stack)
}

func (w *walker) object(kind, owner, path string, t *info, stack []string) {
	for _, m := range t.Members {
		p, need := m.Name, "required"
		if path != "" {
			p = path + "." + p
		}
		if m.Optional {
			need = "optional"
		}
		sort.Strings(m.Features)
		w.row(kind, owner, p, w.describe(m.Type), need, strings.Join(m.Features, ","))
		w.walk(kind, owner, p, m.Type, stack)
	}
	for _, v := range t.Variants {
		p := path + "{" + t.Tag + "=" + v.Case + "}"
		if slices.Contains(stack, v.Type) {
			w.row(kind, owner, p+".~", "again", "", "")
		} else {
			w.walk(kind, owner, p, v.Type, stack)
		}
	}
}

func flatten(infos []info) []string {
	w := &walker{types: map[string]*info{}}
	for i := range infos {
		w.types[infos[i].Name] = &infos[i]
	}
	for _, e := range infos {
		flags := slices.Clone(e.Features)
		sort.Strings(flags)
		if e.AllowOOB {
			flags = append(flags, "oob")
		}
		switch e.MetaType {
		case "command":
			w.row("command", e.Name, "", w.describe(e.RetType), "", strings.Join(flags, ","))
			w.walk("arg", e.Name, "", e.ArgType, nil)
			if e.Name != "query-qmp-schema" {
				w.walk("ret", e.Name, "", e.RetType, nil)
			}
		case "event":
			w.row("event", e.Name, "", "", "", strings.Join(flags, ","))
			w.walk("data", e.Name, "", e.ArgType, nil)
		}
	}
	return w.rows
}

// TestIntrospection compares our schema with QEMU's, line by line.
func TestIntrospection(t *testing.T) {
	const file = "testdata/introspection.tsv"
	ours := map[string]bool{}
	for _, r := range flatten(introspect(t)) {
		ours[r] = true
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	seen := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		if line[0] == '#' {
			out.WriteString(line)
			continue
		}
		mark, row, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		seen[row] = true
		switch {
		case mark == "+" && !ours[row]:
			t.Errorf("gone, which only we had: %s", row)
			continue
		case mark == "" && !ours[row]:
			t.Errorf("gone, which QEMU has: %s", row)
			mark = "-"
		case mark == "-" && ours[row]:
			t.Errorf("no longer missing (-update sets the marks): %s", row)
			mark = ""
		}
		out.WriteString(mark + "\t" + row + "\n")
	}
	for _, row := range flatten(introspect(t)) {
		if !seen[row] {
			t.Errorf("QEMU does not have: %s", row)
			out.WriteString("+\t" + row + "\n")
		}
	}
	if *update {
		if err := os.WriteFile(file, []byte(out.String()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMaskedNames checks what clients may rely on about type names: numbers without
// gaps in the order of first mention, arrays named by their element, and every type
// mentioned is there once.
func TestMaskedNames(t *testing.T) {
	have := map[string]bool{}
	builtin := []string{"str", "int", "number", "bool", "null", "any", "[int]", "[str]"}
	infos := introspect(t)
	for _, e := range infos {
		if have[e.Name] {
			t.Errorf("%s is there twice", e.Name)
		}
		have[e.Name] = true
		isType := e.MetaType != "command" && e.MetaType != "event"
		masked := strings.Trim(e.Name, "[]0123456789") == ""
		if isType != (masked || slices.Contains(builtin, e.Name)) {
			t.Errorf("%s %s", e.MetaType, e.Name)
		}
	}
	for _, e := range infos {
		used := []string{e.ArgType, e.RetType, e.ElementType}
		if e.MetaType != "enum" {
			for _, m := range e.Members {
				used = append(used, m.Type)
			}
		}
		for _, v := range e.Variants {
			used = append(used, v.Type)
		}
		for _, u := range used {
			if u != "" && !have[u] {
				t.Errorf("%s uses %s, which is not there", e.Name, u)
			}
		}
	}
	if infos[0].Name != "query-block" || infos[0].ArgType != "0" || infos[0].RetType != "[1]" {
		t.Errorf("the first entry is %+v", infos[0])
	}
}

func TestCommands(t *testing.T) {
	var list []struct{ Name string }
	if err := json.Unmarshal(QueryCommands(), &list); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range list {
		names = append(names, c.Name)
	}
	if names[len(names)-1] != "query-block" {
		t.Errorf("the last command is %s", names[len(names)-1])
	}
	sort.Strings(names)
	if !slices.Equal(names, Commands()) {
		t.Errorf("query-commands: %v\nJSON Schemas: %v", names, Commands())
	}
	for _, c := range names {
		if !json.Valid(JSONSchema(c)) {
			t.Errorf("the schema of %s is not JSON", c)
		}
	}
	if JSONSchema("quux") != nil || JSONSchema("../query-commands") != nil {
		t.Error("a schema for a command that does not exist")
	}
}

// TestLight makes sure that the daemon can import this package and the generated types
// without paying for the parser or for jsonschema at start.
func TestLight(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "qblockd/schema", "qblockd/schema/types").Output()
	if err != nil {
		t.Skipf("SKIPPED: go list: %v", err)
	}
	for _, heavy := range []string{"go-qemu", "jsonschema"} {
		if strings.Contains(string(out), heavy) {
			t.Errorf("%s is imported", heavy)
		}
	}
}
