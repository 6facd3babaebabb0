package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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

// nameData makes an image whose header says that its data are in the file name.
func nameData(t *testing.T, image, name string) {
	t.Helper()
	_ = os.Remove(image)
	create(t, image, "", "")
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	b[79] |= 4 // incompatible feature: external data file
	ext := append([]byte{'D', 'A', 'T', 'A', 0, 0, 0, byte(len(name))}, name...)
	copy(b[112:], append(ext, make([]byte, 16-len(ext)%8)...))
	writeFile(t, image, string(b))
}

// The same for the file that an image says that its data are in, which is opened for writing: only
// a regular file beside the image, as whose name nothing but a path counts.
func TestCVE_2024_4467_DataFile(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	secret := strings.Repeat("secret\n", 1000)
	writeFile(t, other+"/secret", secret)
	writeFile(t, dir+"/beside", secret)
	if err := os.Mkdir(dir+"/below", 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/below/secret", secret)
	for link, to := range map[string]string{"link": other + "/secret", "null": "/dev/null"} {
		if err := os.Symlink(to, dir+"/"+link); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		other + "/secret", dir + "/../" + filepath.Base(other) + "/secret", dir + "/link", dir + "/below/secret", dir + "/null", dir + "/fifo", "/proc/self/mem",
		`json:{"driver": "file", "filename": "` + dir + `/beside"}`, "file:" + dir + "/beside", "nbd:unix:" + dir + "/x", "null-co://", dir, dir + "/top",
	} {
		nameData(t, dir+"/top", name)
		for _, more := range []string{``, `, 'backing': null`, `, 'read-only': true`} {
			m := newManager(t, Config{})
			fds := openFDs(t)
			err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+dir+`/top'}`+more+`}`)
			switch own := strings.HasSuffix(name, "/top") && strings.Contains(more, "read-only"); {
			case own && err == nil: // it reads what it is in
				mustDel(t, m, "t")
			case err == nil:
				t.Fatalf("%s: is opened", name)
			}
			clean(t, m, fds)
		}
		for _, file := range []string{other + "/secret", dir + "/beside", dir + "/below/secret"} {
			if b, err := os.ReadFile(file); err != nil || string(b) != secret {
				t.Errorf("%s: the file has changed", name)
			}
		}
	}
}

// TestDataFilePolicy: what the policy says of data files, and which they are.
func TestDataFilePolicy(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	writeFile(t, dir+"/beside", strings.Repeat("x", 1<<20))
	writeFile(t, other+"/elsewhere", strings.Repeat("x", 1<<20))
	if err := os.Symlink(dir, other+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		policy       Policy
		folder, name string
		want         string // the error; "": none
	}{
		{Policy{}, dir, dir + "/beside", ""},
		{Policy{}, other + "/link", dir + "/beside", ""},
		{Policy{}, dir, other + "/link/beside", ""},
		{Policy{}, dir, other + "/elsewhere", "The image policy allows data files beside the image only: '" + other + "/elsewhere'"},
		{Policy{DataFiles: DataAnywhere}, dir, other + "/elsewhere", ""},
		{Policy{DataFiles: DataAnywhere, Roots: []string{dir}}, dir, other + "/elsewhere",
			"The image policy does not allow files in the folder of '" + other + "/elsewhere'"},
		{Policy{DataFiles: DataNowhere}, dir, dir + "/beside", "The image policy allows no data files: '" + dir + "/beside'"},
		{Policy{MaxChain: -1}, dir, dir + "/beside", "The image policy allows no backing files"},
		{Policy{}, dir, dir + "/none", "Could not open '" + dir + "/none': No such file or directory"},
	} {
		nameData(t, dir+"/top", c.name)
		m := newManager(t, Config{Policy: c.policy})
		err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+c.folder+`/top'}}`)
		if got := fmt.Sprint(err); err == nil && c.want != "" || err != nil && got != c.want {
			t.Errorf("%+v, %s: %v", c.policy, c.name, err)
		}
		if err != nil {
			continue
		}
		data := m.Graph().Node("t").Child("data-file").Node()
		if data.ReadOnly() {
			t.Errorf("%s: read-only", c.name)
		}
		ctx := context.Background()
		for _, ro := range []bool{true, false} {
			if err := m.Graph().SwitchReadOnly(ctx, ro, graph.Now.WithFiles(m.Graph().Node("t"))...); err != nil {
				t.Fatal(err)
			}
			if data.ReadOnly() != ro {
				t.Errorf("%s: read-only is %v after a switch to %v", c.name, data.ReadOnly(), ro)
			}
		}
		mustReopen(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+c.folder+`/top'}, 'read-only': true}`)
		if !data.ReadOnly() {
			t.Errorf("%s: writable after a reopen", c.name)
		}
		mustDel(t, m, "t")
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
		"lists":          `{"a": ` + strings.Repeat("[", maxNameLevels+1) + strings.Repeat("]", maxNameLevels+1) + `}`,
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
