package blockdev

import (
	"context"
	"os"
	"strings"
	"testing"

	"qblockd/schema/value"
)

// What header strings lead to: the name of the backing node and the driver, or an error.
func TestBackingNames(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/a:b", "", "")
	writeFile(t, dir+"/raw", strings.Repeat("x", 4096))
	writeFile(t, dir+"/empty", "")
	if err := os.Mkdir(dir+"/sub", 0o700); err != nil {
		t.Fatal(err)
	}
	create(t, dir+"/sub/up", "../base", "qcow2")
	create(t, dir+"/gone", "missing", "qcow2")
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
		{`json:{"file": {"filename": "DIR/base"}}`, "", "qcow2 DIR/base"},
		{`json:{"driver": "qcow2", "file": {"filename": "DIR/base"}}`, "", "qcow2 DIR/base"},
		{`json:{"driver": "qcow2", "file.filename": "DIR/base", "backing": null}`, "", "qcow2 DIR/base"},

		{"gone", "", "error: Could not open backing file: Could not open 'DIR/missing': No such file or directory"},
		{"missing", "", "error: Could not open 'DIR/missing': No such file or directory"},
		{"raw", "qcow2", "error: Image is not in qcow2 format"},
		{"base", "bogus", "error: Unknown driver 'bogus'"},
		{"nbd:localhost:1", "raw", "error: The image policy allows no sockets: an image may not name a node of the driver 'nbd'"},
		{"foo:bar", "", "error: Unknown protocol 'foo'"},
		{":bar", "", "error: Unknown protocol ''"},
		{"a:b", "", "error: Unknown protocol 'a'"},
		{"null-co://x", "raw", "error: The only allowed filename for this driver is 'null-co://'"},
		{"null-co://x", "null-co", "error: The only allowed filename for this driver is 'null-co://'"},
		{`json:{`, "", "error: Could not parse the JSON options: JSON parse error, premature EOI"},
		{`json:[]`, "", "error: Invalid JSON object given"},
		{`json:{}`, "", "error: Must specify either driver or file"},
		{`json:{"driver": "bogus"}`, "", "error: Unknown driver 'bogus'"},
		{`json:{"driver": 5}`, "", "error: Unknown driver '5'"},
		{`json:{"driver": "null-co", "x.y": 1}`, "", "error: Parameter 'x' is unexpected"},
		{`json:{"driver": "null-co", "size": 1, "size.x": 1}`, "", "error: Cannot mix scalar and non-scalar keys"},
		{`json:{"driver": "null-co", "size.x": 1, "size": 1}`, "", "error: Cannot mix scalar and non-scalar keys"},
		{`json:{"driver": "raw", "file.driver": "null-co", "file": {"size": 512}}`, "", `raw json:{"driver": "raw", "file": {"driver": "null-co", "size": 512}}`},
		{`json:{"a.b.c": 1, "a": {"b": {"d": 2}}, "driver": "null-co"}`, "", "error: Parameter 'a' is unexpected"},
		{`json:{"driver": "raw", "file": "node"}`, "", "error: An image may not name the node 'node'"},
	} {
		name, want := strings.ReplaceAll(c.name, "DIR", dir), strings.ReplaceAll(c.want, "DIR", dir)
		m := newManager(t, Config{})
		mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'node'}`)
		top := dir + "/top"
		_ = os.Remove(top)
		create(t, top, name, c.format)
		fds := openFDs(t)
		err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+top+`'}}`)
		if text, bad := strings.CutPrefix(want, "error: "); bad {
			if text = "Could not open backing file: " + text; err == nil || err.Error() != text {
				t.Errorf("%s (%s): %v, want %s", name, c.format, err, text)
			}
			mustDel(t, m, "node")
			clean(t, m, fds)
			continue
		}
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
