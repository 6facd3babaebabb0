package blockdev

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"qblockd/schema/value"
)

// namedFiles makes a folder with the files that these tests name.
func namedFiles(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/a:b", "", "")
	writeFile(t, dir+"/raw", strings.Repeat("x", 4096))
	writeFile(t, dir+"/empty", "")
	if err := os.Mkdir(dir+"/sub", 0o700); err != nil {
		t.Fatal(err)
	}
	create(t, dir+"/sub/up", "../base", "qcow2")
	create(t, dir+"/gone", "missing", "qcow2")
	return dir
}

// named opens an image whose header names a backing file of that format, beside a node of that
// name.
func named(t *testing.T, dir, name, format string) (*Manager, error) {
	t.Helper()
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'node'}`)
	return m, overlay(t, m, dir, name, format)
}

// What header strings lead to: the driver of the backing node and its name.
func TestBackingNames(t *testing.T) {
	dir := namedFiles(t)
	for _, c := range []struct{ name, format, want string }{
		{"base", "qcow2", "qcow2 DIR/base"},
		{"base", "", "qcow2 DIR/base"},
		{"base", "raw", "raw DIR/base"},
		{"base", "file", "file DIR/base"},
		{"raw", "", "raw DIR/raw"},
		{"empty", "", "raw DIR/empty"},
		{"DIR/base", "qcow2", "qcow2 DIR/base"},
		{"file:DIR/base", "qcow2", "qcow2 DIR/base"},
		{"sub/up", "", "qcow2 DIR/sub/up"},
		{"null-co://", "raw", "raw null-co://"},
		{"null-co://", "null-co", "null-co null-co://"},
		{`json:{"driver": "null-co"}`, "", "null-co null-co://"},
		{`json:{"driver": "null-co"}`, "null-aio", "null-aio null-aio://"},
		{`json:{"driver": "raw", "file.driver": "null-co", "file.size": "65536"}`, "", `raw json:{"driver": "raw", "file": {"driver": "null-co", "size": 65536}}`},
		{`json:{"driver": "raw", "file": {"driver": "null-co", "size": 65536, "read-zeroes": true}, "read-only": "on"}`, "",
			`raw json:{"driver": "raw", "file": {"read-zeroes": true, "driver": "null-co", "size": 65536}}`},
		{`json:{"driver": "raw", "file.driver": "null-co", "file": {"size": 512}}`, "", `raw json:{"driver": "raw", "file": {"driver": "null-co", "size": 512}}`},
		{`json:{"file": {"filename": "DIR/base"}}`, "", "qcow2 DIR/base"},
		{`json:{"driver": "qcow2", "file": {"filename": "DIR/base"}}`, "", "qcow2 DIR/base"},
		{`json:{"driver": "qcow2", "file.filename": "DIR/base", "backing": null}`, "", "qcow2 DIR/base"},
	} {
		name, want := strings.ReplaceAll(c.name, "DIR", dir), strings.ReplaceAll(c.want, "DIR", dir)
		m, err := named(t, dir, name, c.format)
		if err != nil {
			t.Errorf("%s (%s): %v", name, c.format, err)
			continue
		}
		b := m.Graph().Node("t").Backing().Node()
		if got := b.DriverName() + " " + m.Filename(b); got != want {
			t.Errorf("%s (%s): got %s, want %s", name, c.format, got, want)
		}
		if m.BackingOverridden(m.Graph().Node("t")) {
			t.Errorf("%s (%s): counts as overridden", name, c.format)
		}
	}
}

// What header strings do not lead to anything, and why.
func TestBadBackingNames(t *testing.T) {
	dir := namedFiles(t)
	for _, c := range []struct{ name, format, want string }{
		{"gone", "", "Could not open backing file: Could not open 'DIR/missing': No such file or directory"},
		{"missing", "", "Could not open 'DIR/missing': No such file or directory"},
		{"raw", "qcow2", "Image is not in qcow2 format"},
		{"base", "bogus", "Unknown driver 'bogus'"},
		{"nbd:localhost:1", "raw", "The image policy allows no sockets: an image may not name a node of the driver 'nbd'"},
		{"foo:bar", "", "Unknown protocol 'foo'"},
		{":bar", "", "Unknown protocol ''"},
		{"a:b", "", "Unknown protocol 'a'"},
		{"null-co://x", "raw", "The only allowed filename for this driver is 'null-co://'"},
		{"null-co://x", "null-co", "The only allowed filename for this driver is 'null-co://'"},
		{`json:{`, "", "Could not parse the JSON options: JSON parse error, premature EOI"},
		{`json:[]`, "", "Invalid JSON object given"},
		{`json:{}`, "", "Must specify either driver or file"},
		{`json:{"driver": "bogus"}`, "", "Unknown driver 'bogus'"},
		{`json:{"driver": 5}`, "", "Unknown driver '5'"},
		{`json:{"driver": "null-co", "x.y": 1}`, "", "Parameter 'x' is unexpected"},
		{`json:{"driver": "null-co", "size": 1, "size.x": 1}`, "", "Cannot mix scalar and non-scalar keys"},
		{`json:{"driver": "null-co", "size.x": 1, "size": 1}`, "", "Cannot mix scalar and non-scalar keys"},
		{`json:{"a.b.c": 1, "a": {"b": {"d": 2}}, "driver": "null-co"}`, "", "Parameter 'a' is unexpected"},
		{`json:{"driver": "raw", "file": "node"}`, "", "An image may not name the node 'node'"},
	} {
		name, want := strings.ReplaceAll(c.name, "DIR", dir), strings.ReplaceAll(c.want, "DIR", dir)
		fds := openFDs(t)
		m, err := named(t, dir, name, c.format)
		wantRefused(t, fmt.Sprintf("%s (%s)", name, c.format), err, want)
		mustDel(t, m, "node")
		clean(t, m, fds)
	}
}

func TestFindBacking(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/mid", dir+"/base", "qcow2")
	create(t, dir+"/top", "mid", "qcow2")
	if err := os.Symlink("base", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+dir+`/top'}}`)
	top := m.Graph().Node("t")
	mid := top.Backing().Node()
	base := mid.Backing().Node()
	for name, want := range map[string]any{
		"mid": mid, dir + "/mid": mid, dir + "/../" + dir[strings.LastIndex(dir, "/")+1:] + "/mid": mid,
		"base": base, dir + "/base": base, "link": base, "top": nil, "none": nil, "": nil, "nbd:x": nil,
	} {
		got := m.FindBacking(top, name)
		if want == nil && got != nil || want != nil && any(got) != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}

// Options in names never crash the daemon, and come out as options or as an error.
func FuzzJSONName(f *testing.F) {
	for _, s := range []string{`{}`, `{"driver": "raw", "file.driver": "null-co", "file.size": 1e3}`, `{"file": {"driver": null}}`, `{"a.b.c": [1], "a": {"b": 2}}`} {
		f.Add(s, "")
	}
	f.Fuzz(func(t *testing.T, text, format string) {
		m := New(nil, Config{})
		o, file, err := m.jsonOptions(context.Background(), text, format, true)
		if err == nil && (o == nil) == (file == nil) {
			t.Errorf("%v %v", o, file)
		}
		if o != nil {
			_, _ = m.admit(o)
		}
		if v, err := value.Parse(text); err == nil {
			if d, ok := v.(*value.Dict); ok {
				_, _ = unflatten(d)
			}
		}
	})
}
