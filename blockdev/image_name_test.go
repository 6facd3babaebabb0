package blockdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivers"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// overlay makes an image whose header names a backing file and opens it, writable, as "t".
func overlay(t *testing.T, m *Manager, dir, backing, format string) error {
	t.Helper()
	top := filepath.Join(dir, "overlay")
	_ = os.Remove(top)
	create(t, top, backing, format)
	return add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+top+`'}}`)
}

// wantRefused fails the test unless err says so.
func wantRefused(t *testing.T, what string, err error, want string) {
	t.Helper()
	if want = "Could not open backing file: " + want; err == nil || err.Error() != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

// filesOfEveryKind makes a folder with a regular file, which is open as fd, a fifo, a socket, and
// links to them and elsewhere.
func filesOfEveryKind(t *testing.T) (dir, fd string) {
	t.Helper()
	dir = t.TempDir()
	writeFile(t, dir+"/regular", strings.Repeat("x", 1024))
	if err := syscall.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", dir+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	open, err := os.Open(dir + "/regular")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { open.Close() })
	fd = fmt.Sprint(open.Fd())
	for link, to := range map[string]string{"to-fifo": "fifo", "to-proc": "/proc/self/status", "to-fd": "/proc/self/fd/" + fd, "to-dev": "/dev/zero", "to-regular": "regular"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	return dir, fd
}

// What an image may name is for the kind of file to decide that its name leads to.
func TestImageNamesFilesOfEveryKind(t *testing.T) {
	dir, fd := filesOfEveryKind(t)
	kind := "An image may only name regular files and block devices: '%s' is neither"
	proc := "An image may not name a file that the kernel makes up: '%s'"
	magic := "Could not open '%s': Too many levels of symbolic links"
	device := "The image policy allows no devices"
	for _, c := range []struct{ name, path, want string }{
		{"regular", "", ""},
		{"DIR/regular", "", ""},
		{"file:DIR/regular", "", ""},
		{"to-regular", "", ""},
		{"sub/../regular", "DIR/sub/../regular", "Could not open '%s': No such file or directory"},
		{"fifo", "DIR/fifo", kind},
		{"to-fifo", "DIR/to-fifo", kind},
		{"file:DIR/fifo", "DIR/fifo", kind},
		{"socket", "DIR/socket", kind},
		{"DIR", "DIR", kind},
		{"/proc/self/status", "/proc/self/status", proc},
		{"/dev/../proc/self/status", "/dev/../proc/self/status", proc},
		{"to-proc", "DIR/to-proc", proc},
		{"/proc/self/mem", "/proc/self/mem", proc},
		{"/sys/kernel/uevent_seqnum", "/sys/kernel/uevent_seqnum", proc},
		{"/proc/self/fd/" + fd, "/proc/self/fd/" + fd, magic},
		{"/dev/fd/" + fd, "/dev/fd/" + fd, magic},
		{"/proc/self/root/DIR/regular", "/proc/self/root/DIR/regular", magic},
		{"to-fd", "DIR/to-fd", magic},
		{"/dev/zero", "", device},
		{"to-dev", "", device},
		{"file:/dev/zero", "/dev/zero", kind},
		{"host_device:/dev/zero", "", device},
		{"host_device:DIR/regular", "", device},
		{`json:{"driver": "raw", "file.driver": "host_device", "file.filename": "/dev/zero"}`, "", device},
		{`json:{"driver": "raw", "file.driver": "file", "file.filename": "/proc/self/mem"}`, "/proc/self/mem", proc},
		{`json:{"file": {"filename": "DIR/fifo"}}`, "DIR/fifo", kind},
	} {
		name, path := strings.ReplaceAll(c.name, "DIR", dir), strings.ReplaceAll(c.path, "DIR", dir)
		fds := openFDs(t)
		m := newManager(t, Config{})
		err := overlay(t, m, dir, name, "raw")
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			mustDel(t, m, "t")
		} else {
			want := c.want
			if path != "" {
				want = fmt.Sprintf(want, path)
			}
			wantRefused(t, name, err, want)
		}
		clean(t, m, fds)
	}
	// What a client names is free.
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'file', 'node-name': 'n', 'read-only': true, 'filename': '/dev/fd/`+fd+`'}`)
}

// The policy names folders, which links do not lead out of.
func TestImagePolicyRoots(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"in", "in/deep", "in-not", "out"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, d, "file"), strings.Repeat("x", 512))
	}
	for link, to := range map[string]string{"in/link": "../out/file", "out/link": "../in/file", "root": "in"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	var p Policy
	if err := p.SetRoots(dir + "/root"); err != nil {
		t.Fatal(err)
	}
	for name, good := range map[string]bool{
		dir + "/in/file": true, dir + "/in/deep/file": true, dir + "/root/file": true, dir + "/out/link": true, "../in/file": true,
		dir + "/out/file": false, dir + "/in/link": false, dir + "/in/../out/file": false, dir + "/in-not/file": false, "file": false,
	} {
		m := newManager(t, Config{Policy: p})
		err := overlay(t, m, dir+"/out", name, "raw")
		if want := "The image policy does not allow files in the folder of '" + name + "'"; !good && name[0] == '/' {
			wantRefused(t, name, err, want)
		} else if good != (err == nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bad := range []string{"relative", dir + "/missing"} {
		if err := p.SetRoots(bad); err == nil {
			t.Errorf("root %s is accepted", bad)
		}
	}
}

// Only drivers that read are for images to name, and only options that say what is read.
func TestImageNamesDriversAndOptions(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	writeFile(t, dir+"/victim", strings.Repeat("precious ", 1000))
	file := func(name string) string { return `{"driver": "file", "filename": "` + dir + "/" + name + `"}` }
	base := `{"driver": "qcow2", "file": ` + file("base") + `}`
	not := func(driver string) string { return "An image may not name a node of the driver '" + driver + "'" }
	for _, c := range []struct{ name, format, want string }{
		{`json:` + base, "", ""},
		{`json:{"driver": "compress", "file": ` + base + `}`, "compress", ""},
		{`json:{"driver": "raw", "offset": 512, "size": 512, "file": ` + base + `}`, "", ""},
		{`json:{"driver": "qcow2", "read-only": "off", "auto-read-only": true, "discard": "unmap", "detect-zeroes": "unmap", "force-share": true, "cache": {"no-flush": true}, "file": ` + file("base") + `}`, "", ""},
		{`json:{"driver": "blklogwrites", "file": {"driver": "null-co"}, "log": ` + file("victim") + `}`, "", not("blklogwrites")},
		{`json:{"driver": "copy-before-write", "file": {"driver": "null-co"}, "target": ` + file("victim") + `}`, "", not("copy-before-write")},
		{`json:{"driver": "preallocate", "file": ` + file("victim") + `}`, "", not("preallocate")},
		{`json:{"driver": "copy-on-read", "file": ` + base + `}`, "", not("copy-on-read")},
		{`json:{"driver": "snapshot-access", "file": ` + base + `}`, "", not("snapshot-access")},
		{`json:{"driver": "blkverify", "raw": ` + base + `, "test": ` + base + `}`, "", not("blkverify")},
		{`json:{"driver": "quorum", "vote-threshold": 1, "rewrite-corrupted": true, "children": [` + base + `, {"driver": "raw", "read-only": false, "file": ` + base + `}]}`, "", ""},
		{`json:{"driver": "quorum", "vote-threshold": "1", "children.0.driver": "qcow2", "children.0.file.driver": "file", "children.0.file.filename": "` + dir + `/base"}`, "", ""},
		{`json:{"driver": "quorum", "vote-threshold": 1, "children": [` + base + `, {"driver": "preallocate", "file": ` + file("victim") + `}]}`, "", not("preallocate")},
		{`json:{"driver": "quorum", "vote-threshold": 1, "children": ["node"]}`, "", "An image may not name the node 'node'"},
		{`json:{"driver": "quorum", "vote-threshold": 1, "children": [[[]]]}`, "", "Invalid parameter type for 'null', expected: BlockdevRef"},
		{`json:{"driver": "quorum", "vote-threshold": 1, "children.1.driver": "null-co"}`, "", "Invalid parameter type for 'children', expected: array"},
		{"blkdebug:/etc/shadow:DIR/base", "raw", not("blkdebug")},
		{"blkverify:DIR/base:DIR/base", "raw", not("blkverify")},
		{`json:{"driver": "blkdebug", "config": "/etc/shadow", "image": ` + file("base") + `}`, "", not("blkdebug")},
		{`json:{"driver": "raw", "file": {"driver": "blkdebug", "config": "/etc/shadow", "image": ` + file("base") + `}}`, "", not("blkdebug")},
		{`json:{"driver": "qcow2", "file": ` + file("base") + `, "backing": {"driver": "preallocate", "file": ` + file("victim") + `}}`, "", not("preallocate")},
		{`json:{"driver": "throttle", "throttle-group": "g", "file": ` + base + `}`, "", "An image may not name a throttle group"},
		{`json:{"driver": "raw", "node-name": "mine", "file": ` + base + `}`, "", "An image may not give a node the name 'mine'"},
		{`json:{"driver": "qcow2", "file": ` + file("base") + `, "backing": "node"}`, "", "An image may not name the node 'node'"},
		{`json:{"driver": "qcow2", "file": ` + file("base") + `, "backing": {"driver": "throttle", "throttle-group": "g", "file": ` + base + `}}`, "", "An image may not name a throttle group"},
		{`json:{"file.filename": "` + dir + `/base", "node-name": "mine"}`, "", "Must specify either driver or file"},
		{`json:{"driver": "qcow2", "cache.writeback": true, "file": ` + file("base") + `}`, "", "Parameter 'cache.writeback' is unexpected"},
		{`json:{"driver": "qcow2", "latency-ns": 1, "file": ` + file("base") + `}`, "", "Parameter 'latency-ns' is unexpected"},
	} {
		m := newManager(t, Config{})
		fds := openFDs(t)
		err := overlay(t, m, dir, c.name, c.format)
		if c.want != "" {
			wantRefused(t, c.name, err, c.want)
			clean(t, m, fds)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for _, n := range m.Graph().Node("t").Backing().Node().NodesBelow() {
			o := n.Options()
			readOnly := n.ReadOnly() && types.Or(o.Inherited.ReadOnly, false) && !o.AutoReadOnly
			if !readOnly || o.ForceShare || o.NoFlush {
				t.Errorf("%s: %s has the options %+v", c.name, n.DriverName(), o)
			}
		}
	}
}

// Options that say only how data are read do not keep an image from being opened, as in QEMU, and
// have no effect.
func TestImageGivesHints(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	caches := `"cache-size": 1073741824, "l2-cache-size": "1G", "l2-cache-entry-size": 512, "refcount-cache-size": 1e9, "cache-clean-interval": 1`
	discards := `"lazy-refcounts": true, "pass-discard-request": true, "pass-discard-snapshot": "on", "pass-discard-other": true, "discard-no-unref": true`
	for _, name := range []string{
		`{"driver": "qcow2", ` + caches + `, ` + discards + `, "overlap-check": "none", "file.filename": "DIR/base"}`,
		`{"driver": "qcow2", "overlap-check.template": "none", "file": {"driver": "file", "filename": "DIR/base", "aio": "io_uring", "aio-max-batch": 4}}`,
		`{"driver": "qcow2", "file": {"filename": "DIR/base", "aio": "native", "cache": {"direct": true}, "drop-cache": true, "x-check-cache-dropped": true}}`,
		`{"driver": "raw", "file": {"driver": "null-co", "size": 65536, "latency-ns": 1000000000000}}`,
		`{"file.filename": "DIR/base", "l2-cache-size": "1G", "discard": "unmap", "detect-zeroes": "on", "cache.no-flush": true, "force-share": true}`,
		`{"file": {"filename": "DIR/base", "aio": "threads"}, "read-only": false}`,
		`{"driver": "qcow2", "file.filename": "DIR/base", "backing": {"driver": "raw", "file": {"driver": "file", "filename": "DIR/base", "aio": "io_uring"}}}`,
	} {
		m := newManager(t, Config{})
		fds := openFDs(t)
		if err := overlay(t, m, dir, "json:"+strings.ReplaceAll(name, "DIR", dir), ""); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, n := range m.Graph().Node("t").Backing().Node().NodesBelow() {
			switch u := n.Options().Canonical.U.(type) {
			case *types.BlockdevOptionsFile:
				if *u != (types.BlockdevOptionsFile{Filename: dir + "/base"}) {
					t.Errorf("%s: the file has %+v", name, u)
				}
			case *types.BlockdevOptionsNull:
				if u.LatencyNs != nil {
					t.Errorf("%s: a latency of %d", name, *u.LatencyNs)
				}
			case *types.BlockdevOptionsQcow2:
				if u.L2CacheSize != nil || u.OverlapCheck != nil || u.LazyRefcounts != nil {
					t.Errorf("%s: the image has %+v", name, u)
				}
			}
			if o := n.Options(); !n.ReadOnly() || o.ForceShare || o.NoFlush || o.Direct {
				t.Errorf("%s: %s has the options %+v", name, n.DriverName(), o)
			}
		}
		mustDel(t, m, "t")
		clean(t, m, fds)
	}
	// A user's own names are taken as they are.
	m := newManager(t, Config{})
	_, err := m.OpenImage(context.Background(), OpenImage{Filename: `json:{"driver": "qcow2", "l2-cache-entry-size": 3, "file.filename": "` + dir + `/base"}`, Mode: new(types.NewImageModeExisting)})
	if err == nil {
		t.Error("an option of a user does not count")
	}
}

// Whatever an image's header names as the format of its backing file, and however long that is: an
// image or an error.
func TestImageNamesFormats(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	formats := []string{"bogus", "qcow", "nbd", "blkdebug", "commit_top", "mirror_top", strings.Repeat("x", 15), "a b", "\x01"}
	for _, d := range drivers.All {
		formats = append(formats, string(d.Name))
	}
	for _, f := range formats {
		m := newManager(t, Config{})
		fds := openFDs(t)
		top := dir + "/overlay"
		create(t, top, dir+"/base", "qcow2")
		setFormat(t, top, f)
		err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+top+`'}}`)
		switch f {
		case "qcow2", "raw", "file":
			if err != nil {
				t.Errorf("%s: %v", f, err)
				continue
			}
			mustDel(t, m, "t")
		default:
			if err == nil {
				t.Errorf("%s is accepted", f)
			}
		}
		clean(t, m, fds)
	}
	// The same where a client says so.
	for _, f := range formats {
		m := newManager(t, Config{})
		o, err := m.OpenImage(context.Background(), OpenImage{
			Filename: dir + "/base", Format: &f, Mode: new(types.NewImageModeExisting),
		})
		if err == nil {
			o.Discard()
		} else if f == "qcow2" || f == "raw" || f == "file" {
			t.Errorf("%s: %v", f, err)
		}
		clean(t, m, -1)
	}
}

// setFormat overwrites the format of the backing file, "qcow2" so far, in the header of an image.
func setFormat(t *testing.T, name, format string) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	// The extension is the first one, and what follows it is not needed.
	at := 112
	if string(b[at:at+4]) != "\xe2\x79\x2a\xca" {
		t.Fatalf("the header of %s has no backing format at %d", name, at)
	}
	ext := append([]byte{0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, byte(len(format))}, format...)
	for len(ext)%8 != 0 {
		ext = append(ext, 0)
	}
	ext = append(ext, make([]byte, 8)...)
	copy(b[at:], ext)
	if int(b[14])<<8+int(b[15]) < at+len(ext) {
		t.Fatal("the name of the backing file is in the way")
	}
	writeFile(t, name, string(b))
}

// An image that is its own ancestor is found whatever the links of the chain call it.
func TestImageChainLimits(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/d", 0o700); err != nil {
		t.Fatal(err)
	}
	create(t, dir+"/self", "self", "qcow2")
	create(t, dir+"/a", "b", "qcow2")
	create(t, dir+"/b", "d/../a", "qcow2")
	create(t, dir+"/long", "d/../d/../long", "")
	create(t, dir+"/hard", "hard2", "qcow2")
	create(t, dir+"/soft", "soft2", "")
	create(t, dir+"/json", `json:{"driver": "qcow2", "file.filename": "`+dir+`/json", "file.driver": "file"}`, "")
	create(t, dir+"/window", `json:{"driver": "raw", "size": 65536, "file.driver": "file", "file.filename": "`+dir+`/window"}`, "")
	if err := errors.Join(os.Link(dir+"/hard", dir+"/hard2"), os.Symlink("soft", dir+"/soft2")); err != nil {
		t.Fatal(err)
	}
	create(t, dir+"/base", "", "")
	create(t, dir+"/1", "base", "qcow2")
	create(t, dir+"/2", "1", "qcow2")
	create(t, dir+"/3", "2", "qcow2")
	loop := func(name string) string { return "Backing file '" + name + "' creates an infinite loop" }
	for _, c := range []struct {
		name, want string
		max        int
	}{
		{"self", loop(dir + "/self"), 0},
		{"a", loop(dir + "/d/../a"), 0},
		{"long", loop(dir + "/d/../d/../long"), 0},
		{"hard", loop(dir + "/hard2"), 0},
		{"soft", loop(dir + "/soft2"), 0},
		{"json", loop(`json:{"driver": "qcow2", "file.filename": "` + dir + `/json", "file.driver": "file"}`), 0},
		{"window", "", 0}, // its bytes are its backing file; that ends there
		{"2", "", 2},
		{"3", "The chain of backing files is longer than 2 images", 2},
		{"1", "The image policy allows no backing files", -1},
		{"base", "", -1},
	} {
		m := newManager(t, Config{Policy: Policy{MaxChain: c.max}})
		fds := openFDs(t)
		for _, ro := range []string{"true", "false"} {
			err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'read-only': `+ro+`, 'file': {'driver': 'file', 'filename': '`+dir+`/`+c.name+`'}}`)
			switch {
			case c.name == "window" && ro == "false": // is in use
			case c.want == "":
				if err != nil {
					t.Errorf("%s: %v", c.name, err)
					continue
				}
				mustDel(t, m, "t")
			case err == nil || !strings.HasSuffix(err.Error(), "Could not open backing file: "+c.want):
				t.Errorf("%s: %v, want %s", c.name, err, c.want)
			}
			clean(t, m, fds)
		}
	}
}

// A name that leads to two images with names of their own, one within the other, doubles the work
// with each step of the chain: all count.
func TestImageNamesThatFork(t *testing.T) {
	dir := t.TempDir()
	ctx := context.Background()
	const steps, most = 9, 20
	opened := 0
	counting := overridden("qcow2", func(open driver.OpenFunc, x *driver.Opening) (graph.Driver, error) {
		opened++
		return open(x)
	})
	m := newManager(t, Config{Drivers: counting, Policy: Policy{MaxChain: most}})
	for i := range steps + 1 {
		file, name := fmt.Sprintf("%s/%d", dir, i), ""
		if i < steps {
			name = fmt.Sprintf(`json:{"driver": "qcow2", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "%s/%d"}}}`, dir, i+1)
		}
		create(t, file, name, "")
		inner, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		root, err := m.OpenForCreate(ctx, &types.BlockdevRef{Definition: options(t, `{'driver': 'qcow2', 'backing': null, 'file': {'driver': 'file', 'filename': '`+file+`'}}`)})
		if err != nil {
			t.Fatal(err)
		}
		r, err := root.Begin(ctx)
		if err == nil {
			err = root.Edge().WriteAt(r, blk.Buf(inner), 0, 0)
			root.End(r)
		}
		if err = errors.Join(err, m.Graph().CloseRoot(ctx, root)); err != nil {
			t.Fatal(err)
		}
	}
	fds := openFDs(t)
	opened = 0
	err := add(t, m, `{'driver': 'qcow2', 'node-name': 't', 'read-only': true, 'file': {'driver': 'file', 'filename': '`+dir+`/0'}}`)
	if err == nil || !strings.HasSuffix(err.Error(), "The chain of backing files is longer than 20 images") {
		t.Errorf("%v", err)
	}
	if opened > 2*most+1 {
		t.Errorf("%d images were opened", opened)
	}
	clean(t, m, fds)
}

func TestImagePolicyReferences(t *testing.T) {
	dir := t.TempDir()
	m := newManager(t, Config{Policy: Policy{References: true}})
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'node', 'read-only': true}`)
	if err := overlay(t, m, dir, `json:{"driver": "raw", "file": "node"}`, ""); err != nil {
		t.Error(err)
	}
	if err := overlay(t, newManager(t, Config{Policy: Policy{References: true}}), dir, `json:{"driver": "throttle", "throttle-group": "g", "file": {"driver": "null-co"}}`, ""); err == nil ||
		!strings.Contains(err.Error(), "'g'") {
		t.Errorf("a throttle group that is not there: %v", err)
	}
}

// TestNamesInNames: names have an end, however many others are in them.
func TestNamesInNames(t *testing.T) {
	m := newManager(t, Config{})
	name := strings.Repeat("blkdebug::", maxNameLevels-1) + "blkverify:a:b"
	if _, err := m.protocolOptions(t.Context(), strings.TrimPrefix(name, "blkdebug::")); err != nil {
		t.Error(err)
	}
	if _, err := m.protocolOptions(t.Context(), name); err != errNameTooLarge {
		t.Error(err)
	}
}
