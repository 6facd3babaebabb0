package blockdev

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// newManager is a Manager whose graph is closed when the test ends.
func newManager(t testing.TB, c Config) *Manager {
	t.Helper()
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if c.Drivers == nil {
		c.Drivers = drivers.All
	}
	return New(drivertest.NewGraph(t), c)
}

// overridden are all drivers, but those of that name, or all if it is empty, open by the given
// function, which gets what they would be opened by.
func overridden(
	name types.BlockdevDriver, open func(was driver.OpenFunc, x *driver.Opening) (graph.Driver, error),
) []*driver.Any {
	list := slices.Clone(drivers.All)
	for i, d := range list {
		if name == "" || d.Name == name {
			other := *d
			other.Open = func(x *driver.Opening, u any) (graph.Driver, error) { return open(d.With(u), x) }
			list[i] = &other
		}
	}
	return list
}

// options decodes what a client would send, with single quotes for double ones.
func options(t testing.TB, text string) *types.BlockdevOptions {
	t.Helper()
	v, err := value.Parse(text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	o, err := types.DecodeBlockdevOptions(v, types.ModeQObject)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return o
}

func add(t testing.TB, m *Manager, text string) error {
	t.Helper()
	return m.Add(context.Background(), options(t, text))
}

func mustAdd(t testing.TB, m *Manager, text string) {
	t.Helper()
	if err := add(t, m, text); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

func mustDel(t testing.TB, m *Manager, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := m.Del(context.Background(), n); err != nil {
			t.Fatal(err)
		}
	}
}

// create makes a qcow2 image of 1 MiB whose header names a backing file.
func create(t testing.TB, file, backing, format string) {
	t.Helper()
	createWith(t, file, func(o *types.BlockdevCreateOptionsQcow2) {
		if backing != "" {
			o.BackingFile = &backing
		}
		if format != "" {
			o.BackingFmt = (*types.BlockdevDriver)(&format)
		}
	})
}

// createWith makes a qcow2 image of 1 MiB, or as change says.
func createWith(t testing.TB, file string, change func(o *types.BlockdevCreateOptionsQcow2)) {
	t.Helper()
	m := newManager(t, Config{})
	ctx, started := context.Background(), func() {}
	f := &types.BlockdevCreateOptions{Driver: "file", U: &types.BlockdevCreateOptionsFile{Filename: file}}
	if err := m.Creator(f)(ctx, started); err != nil {
		t.Fatal(err)
	}
	o := &types.BlockdevCreateOptionsQcow2{Size: 1 << 20}
	o.File.Definition = options(t, `{'driver': 'file', 'filename': '`+file+`'}`)
	change(o)
	if err := m.Creator(&types.BlockdevCreateOptions{Driver: "qcow2", U: o})(ctx, started); err != nil {
		t.Fatal(err)
	}
}

func writeFile(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// clean fails the test if anything is left of what was opened: nodes, names, records, descriptors.
func clean(t testing.TB, m *Manager, fds int) {
	t.Helper()
	for _, n := range m.Graph().Nodes() {
		t.Errorf("node %s is left", n.Name())
	}
	for _, r := range m.Graph().Roots() {
		t.Errorf("a root on %s is left", r.Node().Name())
	}
	m.records.mu.RLock()
	for key := range m.records.of {
		if n := key.Value(); n != nil && m.Graph().ReserveName(n.Name(), "test") != nil {
			t.Errorf("a record of %s is left", n.Name())
		} else if n != nil {
			m.Graph().ReleaseName(n.Name())
		}
	}
	m.records.mu.RUnlock()
	if fds < 0 {
		return
	}
	// What was stuck in the kernel when it was given up is closed when it comes back.
	for end := time.Now().Add(5 * time.Second); openFDs(t) != fds; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("%d descriptors were open, now %d", fds, openFDs(t))
			return
		}
	}
}

// namedNodes is the answer to query-named-block-nodes.
func namedNodes(m *Manager, flat bool) []byte {
	b, _ := m.NamedNodes(flat, func(int64) error { return nil })
	return b
}

func openFDs(t testing.TB) int {
	t.Helper()
	l, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

var generated = regexp.MustCompile(`#block(\d+)\d\d`)

// listed is the list of nodes as "name driver file", newest first, with the random part of
// generated names left out.
func listed(m *Manager) string {
	var s []string
	for _, n := range m.Graph().Nodes() {
		s = append(s, n.Name()+" "+n.DriverName()+" "+m.Filename(n))
	}
	return generated.ReplaceAllString(strings.Join(s, "\n"), "#block$1")
}
