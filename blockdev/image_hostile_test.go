package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// CVE-2024-4467: an image that is only looked at made QEMU open, for writing even, files that
// "json:" names in its header named.
func TestCVE_2024_4467(t *testing.T) {
	dir := t.TempDir()
	dirty := dir + "/victim.qcow2"
	create(t, dirty, "", "")
	b, err := os.ReadFile(dirty)
	if err != nil {
		t.Fatal(err)
	}
	b[79] |= 1    // dirty: a writer would repair it
	b[88] |= 0x80 // an autoclear bit that a writer would clear
	writeFile(t, dirty, string(b))
	writeFile(t, dir+"/victim.raw", strings.Repeat("precious\n", 1000))
	want := map[string]string{}
	for _, f := range []string{"victim.qcow2", "victim.raw"} {
		b, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		want[f] = string(b)
	}
	for _, name := range []string{
		`json:{"driver": "qcow2", "read-only": "off", "file": {"driver": "file", "filename": "DIR/victim.qcow2", "read-only": "off"}}`,
		`json:{"driver": "qcow2", "read-only": "off", "auto-read-only": "off", "file": {"driver": "file", "filename": "DIR/victim.qcow2", "auto-read-only": "on", "read-only": false}}`,
		`json:{"driver": "blklogwrites", "read-only": "off", "file": {"driver": "null-co", "read-only": "off"}, "log": {"driver": "file", "filename": "DIR/victim.raw", "read-only": "off"}}`,
		`json:{"driver": "preallocate", "read-only": "off", "prealloc-size": 1048576, "file": {"driver": "file", "filename": "DIR/victim.raw", "read-only": "off"}}`,
		`json:{"driver": "copy-before-write", "read-only": "off", "file": {"driver": "null-co", "size": 65536, "read-only": "off"}, "target": {"driver": "file", "filename": "DIR/victim.raw", "read-only": "off"}}`,
		`json:{"driver": "qcow2", "file.filename": "DIR/victim.qcow2", "data-file": {"driver": "file", "filename": "DIR/victim.raw", "read-only": "off"}}`,
		`json:{"driver": "raw", "read-only": "off", "file.filename": "DIR/victim.raw", "file.read-only": "off"}`,
	} {
		for _, ro := range []string{"true", "false"} {
			m := newManager(t, Config{})
			top := dir + "/top"
			_ = os.Remove(top)
			create(t, top, strings.ReplaceAll(name, "DIR", dir), "")
			if err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'read-only': `+ro+`, 'file': {'driver': 'file', 'filename': '`+top+`'}}`); err == nil {
				for _, n := range m.Graph().Node("t").Backing().Node().NodesBelow() {
					if !n.ReadOnly() {
						t.Errorf("%s: %s is writable", name, n.DriverName())
					}
				}
				mustDel(t, m, "t")
			}
			for f, content := range want {
				if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || string(b) != content {
					t.Fatalf("%s: %s has changed (%v)", name, f, err)
				}
			}
		}
	}
}

// The same for the file that an image says that its data are in: there is no driver for that.
func TestCVE_2024_4467_DataFile(t *testing.T) {
	dir := t.TempDir()
	secret := strings.Repeat("secret\n", 1000)
	writeFile(t, dir+"/secret", secret)
	for _, name := range []string{dir + "/secret", `json:{"driver": "file", "filename": "` + dir + `/secret"}`} {
		top := dir + "/top"
		_ = os.Remove(top)
		create(t, top, "", "")
		b, err := os.ReadFile(top)
		if err != nil {
			t.Fatal(err)
		}
		b[79] |= 4 // incompatible feature: external data file
		ext := append([]byte{'D', 'A', 'T', 'A', 0, 0, 0, byte(len(name))}, name...)
		copy(b[112:], append(ext, make([]byte, 16-len(ext)%8)...))
		writeFile(t, top, string(b))
		for _, more := range []string{``, `, 'backing': null`, `, 'read-only': true`} {
			m := newManager(t, Config{})
			fds := openFDs(t)
			if err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+top+`'}`+more+`}`); err == nil {
				t.Errorf("%s: is opened", name)
			}
			clean(t, m, fds)
		}
		if b, err := os.ReadFile(dir + "/secret"); err != nil || string(b) != secret {
			t.Errorf("%s: the file has changed", name)
		}
	}
}

// Names of any depth and size lead to an answer, in a short time.
func TestNamesAreBounded(t *testing.T) {
	m := newManager(t, Config{})
	nest := func(n int) string { return strings.Repeat(`{"a":`, n) + `1` + strings.Repeat(`}`, n) }
	many := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `"m%d": 1, `, i)
		}
		return "{" + b.String() + `"x": 1}`
	}
	for name, text := range map[string]string{
		"dots":           `{"` + strings.Repeat("a.", 8<<20) + `a": 1}`,
		"tokens":         `{"a": [` + strings.Repeat("1,", 1<<20) + `1]}`,
		"some dots":      `{"` + strings.Repeat("a.", maxNameLevels) + `a": 1}`,
		"nesting":        nest(maxNameLevels + 1),
		"dots in nests":  `{"a": {"` + strings.Repeat("b.", maxNameLevels) + `c": 1}}`,
		"members":        many(maxNameParts),
		"dotted members": `{"x.` + strings.Repeat("a.", 100) + `a": 1, ` + strings.ReplaceAll(many(100)[1:], `"m`, `"`+strings.Repeat("a.", 100)+`m`),
	} {
		began := time.Now()
		if _, _, err := m.jsonOptions(context.Background(), text, "", true); !errors.Is(err, errNameTooLarge) {
			t.Errorf("%s: %.200v", name, err)
		}
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("%s: after %v", name, d)
		}
	}
	deep := `{"driver": "raw", "` + strings.Repeat("file.", 20) + `driver": "null-co"`
	for i := range 19 {
		deep += `, "` + strings.Repeat("file.", i+1) + `driver": "raw"`
	}
	if o, _, err := m.jsonOptions(context.Background(), deep+"}", "", true); err != nil || o.Driver != types.BlockdevDriverRaw {
		t.Errorf("twenty levels: %v", err)
	}
}

// TestImageNamesNull: a null node that an image names reads as zeroes. It would show what the
// reader's buffer held before.
func TestImageNamesNull(t *testing.T) {
	for _, name := range []string{`json:{"driver": "null-co"}`, `json:{"driver": "null-co", "read-zeroes": false}`, `json:{"driver": "raw", "file": {"driver": "null-aio"}}`, "null-co://"} {
		m := newManager(t, Config{})
		dir := t.TempDir()
		create(t, dir+"/top", name, "")
		mustAdd(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+dir+`/top'}}`)
		buf := []byte(strings.Repeat("secret", 256)[:512])
		n := m.Graph().Node("t").Backing().Node()
		for n.File() != nil {
			n = n.File().Node()
		}
		if err := n.Driver().ReadAt(&blk.Req{}, blk.Buf(buf), 0, 0); err != nil || strings.Trim(string(buf), "\x00") != "" {
			t.Errorf("%s: reads %q, %v", name, buf[:6], err)
		}
		mustDel(t, m, "t")
	}
}

// What an image says of its nodes is forgotten when it is opened: a reopen does not bring it back.
// A command makes such a node writable.
func TestImageNamesStayReadOnly(t *testing.T) {
	dir := t.TempDir()
	ctx := context.Background()
	create(t, dir+"/base", "", "")
	m := newManager(t, Config{})
	name := `json:{"driver": "qcow2", "read-only": "off", "file": {"driver": "file", "filename": "` + dir + `/base", "read-only": "off"}}`
	if err := overlay(t, m, dir, name, ""); err != nil {
		t.Fatal(err)
	}
	base := m.Graph().Node("t").Backing().Node()
	wantReadOnly := func(when string, want bool) {
		t.Helper()
		for _, n := range base.NodesBelow() {
			if n.ReadOnly() != want {
				t.Errorf("%s: %s read-only %v", when, n.DriverName(), n.ReadOnly())
			}
		}
	}
	wantReadOnly("opened", true)
	for _, more := range []string{`, 'backing': '` + base.Name() + `'`, `, 'read-only': false, 'backing': {'driver': 'qcow2', 'file': {'driver': 'file', 'filename': '` + dir + `/base'}}`} {
		mustReopen(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+dir+`/overlay'}`+more+`}`)
		wantReadOnly("reopened"+more, true)
	}
	if err := m.Graph().SwitchReadOnly(ctx, false, graph.Now.WithFiles(base)...); err != nil {
		t.Fatal(err)
	}
	wantReadOnly("switched", false)
}
