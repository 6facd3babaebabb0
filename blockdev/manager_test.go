package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// A failing command says why in QEMU's words and leaves nothing behind.
func TestAddErrors(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/raw", strings.Repeat("x", 4096))
	create(t, dir+"/top", "base", "qcow2")
	top := `'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'file', 'filename': '` + dir + `/top'}`
	for _, c := range []struct{ options, want string }{
		{`{'driver': 'null-co'}`, "'node-name' must be specified for the root node"},
		{`{'driver': 'null-co', 'node-name': ''}`, "Invalid node-name: ''"},
		{`{'driver': 'null-co', 'node-name': '1'}`, "Invalid node-name: '1'"},
		{`{'driver': 'null-co', 'node-name': 'n'}`, "Duplicate nodes with node-name='n'"},
		{`{'driver': 'null-co', 'node-name': 'a2345678901234567890123456789012'}`, "Node name too long"},
		{`{'driver': 'raw', 'node-name': 'x', 'file': {'driver': 'null-co', 'node-name': 'x'}}`, "Duplicate nodes with node-name='x'"},
		{`{'driver': 'raw', 'node-name': 'x', 'file': 'x'}`, "Cannot find device='x' nor node-name='x'"},
		{`{'driver': 'null-co', 'node-name': 'x', 'force-share': true}`, "force-share=on can only be used with read-only images"},
		{`{'driver': 'null-co', 'node-name': 'x', 'detect-zeroes': 'unmap'}`, "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"},
		{`{'driver': 'file', 'node-name': 'x', 'filename': ''}`, "The 'file' block driver requires a file name"},
		{`{'driver': 'file', 'node-name': 'x', 'filename': '` + dir + `/none'}`, "Could not open '" + dir + "/none': No such file or directory"},
		{`{'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'file', 'filename': '` + dir + `/raw'}}`, "Image is not in qcow2 format"},
		{`{` + top + `}`, "Could not open backing file: Could not open '" + dir + "/base': No such file or directory"},
		{`{` + top + `, 'backing': 'none'}`, "Could not open backing file: Cannot find device='none' nor node-name='none'"},
		{`{` + top + `, 'backing': {'driver': 'null-co', 'node-name': 'x'}}`, "Could not open backing file: Duplicate nodes with node-name='x'"},
		{`{` + top + `, 'backing': {'driver': 'null-co', 'read-only': false, 'force-share': true}}`, "Could not open backing file: force-share=on can only be used with read-only images"},
		{`{'driver': 'raw', 'node-name': 'x', 'offset': 513, 'file': {'driver': 'null-co', 'size': 512}}`, "Offset (513) cannot be greater than size of the containing file (512)"},
	} {
		t.Run(c.want, func(t *testing.T) {
			m := newManager(t, Config{})
			mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'n'}`)
			fds := openFDs(t)
			err := add(t, m, c.options)
			if err == nil || err.Error() != c.want {
				t.Errorf("%s: %v, want %s", c.options, err, c.want)
			}
			mustDel(t, m, "n")
			clean(t, m, fds)
			mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'x'}`)
		})
	}
}

// The order of the list, the generated names and the file names, as QEMU has them.
func TestImplicitChain(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/mid", "base", "qcow2")
	create(t, dir+"/top", "mid", "")
	fds := openFDs(t)
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+dir+`/top'}}`)
	want := strings.ReplaceAll(`#block4 qcow2 DIR/base
#block3 file DIR/base
#block2 qcow2 DIR/mid
#block1 file DIR/mid
t qcow2 DIR/top
#block0 file DIR/top`, "DIR", dir)
	if got := listed(m); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, n := range m.Graph().Nodes() {
		if wantRO := n.Name() != "t" && n.Name()[:7] != "#block0"; n.ReadOnly() != wantRO {
			t.Errorf("%s: read-only %v", n.Name(), n.ReadOnly())
		}
	}
	err := m.Del(context.Background(), m.Graph().Node("t").Backing().Node().Name())
	if err == nil || !strings.HasSuffix(err.Error(), "is busy: node is used as backing hd of 't'") {
		t.Errorf("deleting a backing file: %v", err)
	}
	mustDel(t, m, "t")
	clean(t, m, fds)
}

// A node is listed above the children that were opened before it, also where its name was taken
// before.
func TestOrder(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/top", "base", "qcow2")
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'qcow2', 'node-name': 'q', 'file': {'driver': 'file', 'filename': '`+dir+`/top'}}}`)
	want := strings.ReplaceAll(`r raw json:{"driver": "raw", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "DIR/top"}}}
#block2 qcow2 DIR/base
#block1 file DIR/base
q qcow2 DIR/top
#block0 file DIR/top`, "DIR", dir)
	if got := listed(m); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Which generic options children take over.
func TestInherit(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/top", "base", "qcow2")
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'qcow2', 'node-name': 't', 'read-only': true, 'auto-read-only': true, 'force-share': true, 'cache': {'no-flush': true},
		'detect-zeroes': 'on', 'file': {'driver': 'file', 'filename': '`+dir+`/top', 'cache': {'no-flush': false}}}`)
	got := ""
	for _, n := range m.Graph().Nodes() {
		o := n.Options()
		got += fmt.Sprintln(o.DriverName, o.ReadOnly, o.AutoReadOnly, o.ForceShare, o.NoFlush, o.Discard, o.DetectZeroes)
	}
	want := `qcow2 true false true true true off
file true false true true true off
qcow2 true true true true false on
file true true true false true off
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestBackingOptions(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/top", "base", "qcow2")
	create(t, dir+"/abs", dir+"/base", "qcow2")
	for _, c := range []struct{ file, backing, want string }{
		{"top", `'backing': null`, `json:{"backing": null, "driver": "qcow2", "file": {"driver": "file", "filename": "DIR/top"}}`},
		{"top", `'backing': ''`, `json:{"backing": null, "driver": "qcow2", "file": {"driver": "file", "filename": "DIR/top"}}`},
		{"base", `'backing': null`, `DIR/base`},
		{"top", `'backing': 'n'`, `json:{"backing": {"driver": "null-co"}, "driver": "qcow2", "file": {"driver": "file", "filename": "DIR/top"}}`},
		// The header's words are compared, and they are relative here, but not there.
		{"top", `'backing': {'driver': 'qcow2', 'file': {'driver': 'file', 'filename': 'DIR/base'}}`,
			`json:{"backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "DIR/base"}}, "driver": "qcow2", "file": {"driver": "file", "filename": "DIR/top"}}`},
		{"abs", `'backing': {'driver': 'qcow2', 'file': {'driver': 'file', 'filename': 'DIR/base'}}`, `DIR/abs`},
	} {
		m := newManager(t, Config{})
		mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'n'}`)
		mustAdd(t, m, strings.ReplaceAll(`{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': 'DIR/`+c.file+`'}, `+c.backing+`}`, "DIR", dir))
		if got, want := m.Filename(m.Graph().Node("t")), strings.ReplaceAll(c.want, "DIR", dir); got != want {
			t.Errorf("%s, %s: got %s, want %s", c.file, c.backing, got, want)
		}
		mustDel(t, m, "t")
	}
}

func TestDel(t *testing.T) {
	m := newManager(t, Config{})
	ctx := context.Background()
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'base'}`)
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'top', 'file': 'base'}`)
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'other', 'file': {'driver': 'null-co', 'node-name': 'child'}}`)
	name := "top"
	spec := graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, Claim: perm.Unused}
	root, err := m.OpenRoot(ctx, &types.BlockdevRef{Reference: &name}, spec)
	if err != nil {
		t.Fatal(err)
	}
	for node, want := range map[string]string{
		"none":  "Failed to find node with node-name='none'",
		"base":  "Block device base is in use",
		"top":   "Node top is in use",
		"child": "Node child is not owned by the monitor",
	} {
		if err := m.Del(ctx, node); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", node, err, want)
		}
	}
	if err := m.Graph().CloseRoot(ctx, root); err != nil {
		t.Fatal(err)
	}
	mustDel(t, m, "top", "base", "other")
	clean(t, m, -1)
}

func TestLookups(t *testing.T) {
	m := newManager(t, Config{})
	d, n := "d", "n"
	for _, c := range []struct {
		device, node *string
		want         string
	}{
		{nil, nil, "Cannot find device='' nor node-name=''"},
		{&d, nil, "Cannot find device='d' nor node-name=''"},
		{nil, &n, "Cannot find device='' nor node-name='n'"},
		{&d, &n, "Cannot find device='d' nor node-name='n'"},
	} {
		if _, err := m.Lookup(c.device, c.node); err == nil || err.Error() != c.want {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
	var class interface{ QMPClass() string }
	if _, err := m.FindDevice("x"); !errors.As(err, &class) || class.QMPClass() != "DeviceNotFound" || err.Error() != "Device 'x' not found" {
		t.Errorf("FindDevice: %v", err)
	}
	if err := m.SetWriteThreshold(context.Background(), "x", 1); err == nil || err.Error() != "Device 'x' not found" {
		t.Errorf("SetWriteThreshold: %v", err)
	}
}

func TestResize(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/f", strings.Repeat("x", 4096))
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'file', 'node-name': 'f', 'filename': '`+dir+`/f'}`)
	mustAdd(t, m, `{'driver': 'file', 'node-name': 'ro', 'read-only': true, 'filename': '`+dir+`/f'}`)
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'n'}`)
	for _, c := range []struct {
		node string
		size int64
		want string
	}{
		{"f", -1, "Parameter 'size' expects a >0 size"},
		{"x", 0, "Cannot find device='' nor node-name='x'"},
		{"ro", 0, "Image is read-only"},
		{"n", 0, "Image format driver does not support resize"},
		{"f", 1000, ""},
	} {
		err := m.Resize(context.Background(), nil, &c.node, c.size, blk.PreallocOff)
		if (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("%s to %d: %v, want %s", c.node, c.size, err, c.want)
		}
	}
	if st, _ := os.Stat(dir + "/f"); st.Size() != 1000 {
		t.Errorf("the file has %d bytes", st.Size())
	}
	if got := string(namedNodes(m, true)); !strings.Contains(got, `"virtual-size": 1024`) {
		t.Errorf("sizes are rounded up: %s", got)
	}
	if len(m.Graph().Roots()) > 0 {
		t.Error("a root is left")
	}
}

// A FIFO that nobody writes to holds up its own command, and nothing else; when the client goes
// nothing is left.
func TestHangingOpen(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	opening := make(chan struct{})
	list := overridden("file", func(open driver.OpenFunc, x *driver.Opening) (graph.Driver, error) {
		close(opening)
		return open(x)
	})
	m := newManager(t, Config{Drivers: list})
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'n'}`)
	fds := openFDs(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	o := options(t, `{'driver': 'raw', 'node-name': 'slow', 'read-only': true, 'file': {'driver': 'file', 'node-name': 'inner', 'filename': '`+fifo+`'}}`)
	go func() { done <- m.Add(ctx, o) }()
	<-opening
	for _, name := range []string{"slow", "inner"} {
		err := add(t, m, `{'driver': 'null-co', 'node-name': '`+name+`'}`)
		if want := "Duplicate nodes with node-name='" + name + "'"; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if got := listed(m); got != "n null-co null-co://" {
		t.Errorf("others see %s", got)
	}
	for _, name := range []string{"slow", "inner"} {
		if err := m.Del(context.Background(), name); err == nil || !strings.HasPrefix(err.Error(), "Failed to find node") {
			t.Errorf("deleting %s: %v", name, err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("the FIFO was opened: %v", err)
	default:
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	mustDel(t, m, "n")
	clean(t, m, fds)
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'slow'}`)
	// Somebody writes to it after all: the open that was left behind ends, and closes what it got.
	// It may have been woken already: then nobody reads.
	w, err := os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0)
	switch {
	case err == nil:
		w.Close()
	case !errors.Is(err, syscall.ENXIO):
		t.Fatal(err)
	}
}

// Opening fails at every step in turn; nothing is left whichever it is.
func TestFailureAnywhere(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/mid", "base", "")
	create(t, dir+"/top", "mid", "qcow2")
	boom := errors.New("boom")
	failed := 0
	for i := 0; ; i++ {
		calls := 0
		list := overridden("", func(open driver.OpenFunc, x *driver.Opening) (graph.Driver, error) {
			calls++
			if calls > i {
				return nil, boom
			}
			return open(x)
		})
		fds := openFDs(t)
		m := newManager(t, Config{Drivers: list})
		err := add(t, m, `{'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'qcow2', 'file': {'driver': 'file', 'filename': '`+dir+`/top'}}}`)
		if err == nil {
			break
		}
		if !errors.Is(err, boom) {
			t.Fatalf("step %d: %v", i, err)
		}
		failed++
		clean(t, m, fds)
	}
	if failed != 7 {
		t.Errorf("%d steps failed", failed)
	}
}

// Opening is cancelled at every step in turn.
func TestCancelAnywhere(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/top", "base", "")
	for i := 0; ; i++ {
		ctx, cancel := context.WithCancel(context.Background())
		calls := 0
		list := overridden("", func(open driver.OpenFunc, x *driver.Opening) (graph.Driver, error) {
			d, err := open(x)
			if calls++; calls > i {
				cancel()
			}
			return d, err
		})
		fds := openFDs(t)
		m := newManager(t, Config{Drivers: list})
		err := m.Add(ctx, options(t, `{'driver': 'qcow2', 'node-name': 'q', 'file': {'driver': 'file', 'filename': '`+dir+`/top'}}`))
		cancel()
		if err == nil {
			if i < 3 { // after the last one nothing has to be waited for
				t.Errorf("step %d: the end of the context was not seen", i)
			}
			break
		}
		clean(t, m, fds)
	}
}

func TestOpenForCreate(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/f", "")
	m := newManager(t, Config{})
	ctx := context.Background()
	fds := openFDs(t)
	root, err := m.OpenForCreate(ctx, &types.BlockdevRef{Definition: options(t, `{'driver': 'file', 'filename': '`+dir+`/f'}`)})
	if err != nil {
		t.Fatal(err)
	}
	if err := root.Edge().Resize(ctx, 65536, true, ""); err != nil {
		t.Error(err)
	}
	if err := m.Graph().CloseRoot(ctx, root); err != nil {
		t.Error(err)
	}
	clean(t, m, fds)
	none := "none"
	if _, err := m.OpenForCreate(ctx, &types.BlockdevRef{Reference: &none}); err == nil || err.Error() != "Cannot find device='none' nor node-name='none'" {
		t.Errorf("unknown reference: %v", err)
	}
}

// Commands on disjoint nodes and queries at the same time.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	const workers, rounds = 4, 15
	for i := range workers {
		create(t, fmt.Sprintf("%s/top%d", dir, i), "base", "qcow2")
	}
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'shared'}`)
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			for range rounds {
				mustAdd(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 't%d', 'file': {'driver': 'file', 'filename': '%s/top%d'}}`, i, dir, i))
				mustAdd(t, m, fmt.Sprintf(`{'driver': 'raw', 'node-name': 'r%d', 'file': 'shared'}`, i))
				_ = add(t, m, `{'driver': 'raw', 'node-name': 'one', 'file': 'shared'}`)
				_ = m.Del(context.Background(), "one")
				mustDel(t, m, fmt.Sprintf("r%d", i), fmt.Sprintf("t%d", i))
			}
		})
		wg.Go(func() {
			for range rounds {
				namedNodes(m, i%2 == 0)
				m.AppendNodeStats(nil)
				m.DebugGraph().AppendJSON(nil)
			}
		})
	}
	wg.Wait()
	_ = m.Del(context.Background(), "one")
	mustDel(t, m, "shared")
	clean(t, m, -1)
}
