package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/throttle"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

func reopen(t testing.TB, m *Manager, texts ...string) error {
	t.Helper()
	var l []*types.BlockdevOptions
	for _, text := range texts {
		l = append(l, options(t, text))
	}
	return m.Reopen(l).Run(context.Background())
}

func mustReopen(t testing.TB, m *Manager, texts ...string) {
	t.Helper()
	if err := reopen(t, m, texts...); err != nil {
		t.Fatalf("%s: %v", texts, err)
	}
}

// writer is a root that writes and reads back, until it is told to stop.
func writer(t testing.TB, n *graph.Node, root *graph.Root, stop *atomic.Bool, seed byte) {
	buf, got := make([]byte, 3000), make([]byte, 3000)
	for i := 0; !stop.Load(); i++ {
		off := int64(seed)*131072 + int64(i%40)*3000
		for j := range buf {
			buf[j] = byte(i) ^ byte(j) ^ seed
		}
		r, err := root.Begin(context.Background())
		if err != nil {
			t.Error(err)
			return
		}
		err = root.Edge().WriteAt(r, blk.Buf(buf), off, 0)
		if err == nil {
			err = root.Edge().ReadAt(r, blk.Buf(got), off, 0)
		}
		root.End(r)
		if err != nil || !bytes.Equal(buf, got) {
			t.Errorf("round %d at %d: %v, equal: %v", i, off, err, bytes.Equal(buf, got))
			return
		}
	}
}

// TestReopenEndsBar: a node that a job has left without writers gets them again when its user
// reopens it as writable, which it is already.
func TestReopenEndsBar(t *testing.T) {
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'file'}`)
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'n', 'file': 'file'}`)
	n, why := m.Graph().Node("n"), errors.New("it was to be read-only")
	if err := m.Graph().Do(t.Context(), func(tx *graph.Tx) error { return tx.BarWriters(n, why) }); err != nil {
		t.Fatal(err)
	}
	spec := graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}
	if _, err := m.Graph().AddRoot(t.Context(), spec, n); !errors.Is(err, why) {
		t.Errorf("a writer comes: %v", err)
	}
	mustReopen(t, m, `{'driver': 'raw', 'node-name': 'n', 'file': 'file'}`)
	drivertest.AddRoot(t, m.Graph(), n, drivertest.Writer)
}

// TestReopenUnderLoad changes everything that can be changed again and again while clients write
// and read.
func TestReopenUnderLoad(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "b.qcow2")
	create(t, a, "", "")
	create(t, b, "", "")
	m := newManager(t, Config{})
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'b', 'read-only': true, 'file': {'driver': 'file', 'filename': '%s'}}`, b))
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'q', 'file': {'driver': 'file', 'filename': '%s', 'node-name': 'f'}}`, a))
	n := m.Graph().Node("q")
	root := drivertest.AddRoot(t, m.Graph(), n, drivertest.Writer)
	var stop atomic.Bool
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() { writer(t, n, root, &stop, byte(i)) })
	}
	for range 30 {
		mustReopen(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'f', 'backing': 'b', 'l2-cache-entry-size': 512, 'cache-size': 65536}`)
		mustReopen(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'f', 'backing': null, 'lazy-refcounts': true, 'cache': {'direct': true}}`)
		mustReopen(t, m, fmt.Sprintf(`{'driver': 'file', 'node-name': 'f', 'filename': '%s', 'cache': {'no-flush': true}}`, a),
			`{'driver': 'qcow2', 'node-name': 'q', 'file': 'f', 'overlap-check': 'all', 'discard': 'unmap'}`)
		if err := reopen(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'f', 'read-only': true}`); err == nil {
			t.Fatal("writers did not keep the node from becoming read-only")
		}
	}
	stop.Store(true)
	wg.Wait()
	tx := m.Graph().Begin(context.Background())
	defer tx.Abort()
	if err := errors.Join(tx.SetClaim(root.Edge(), drivertest.Reader), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	mustReopen(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'f', 'read-only': true}`)
	if q, f := n.ReadOnly(), m.Graph().Node("f").ReadOnly(); !q || !f {
		t.Fatalf("read-only: image %v, file %v", q, f)
	}
}

// TestReopenConcurrently has several clients reopen the same nodes; each call is all or nothing.
func TestReopenConcurrently(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "r.raw")
	writeFile(t, file, strings.Repeat("x", 1<<16))
	m := newManager(t, Config{})
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'file', 'filename': '%s', 'node-name': 'f'}}`, file))
	var wg sync.WaitGroup
	for i := range 4 {
		text := fmt.Sprintf(`{'driver': 'raw', 'node-name': 'r', 'file': 'f', 'read-only': %v, 'offset': %d, 'cache': {'no-flush': %v}}`, i%2 == 0, 512*i, i < 2)
		wg.Go(func() {
			for range 25 {
				if err := reopen(t, m, text); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	r, f := m.Graph().Node("r"), m.Graph().Node("f")
	i := (1<<16 - r.Size()) / 512
	ro, noFlush := i%2 == 0, i < 2
	if r.ReadOnly() != ro || f.ReadOnly() != ro || r.Options().NoFlush != noFlush || f.Options().NoFlush != noFlush {
		t.Fatalf("a mixture: %d %v %v %v %v", i, r.ReadOnly(), f.ReadOnly(), r.Options().NoFlush, f.Options().NoFlush)
	}
	mustDel(t, m, "r")
}

// TestReopenUndone: an image cannot become writable, as its header cannot be written. Everything
// that was to change besides goes back.
func TestReopenUndone(t *testing.T) {
	dir := t.TempDir()
	a, b, c := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "b.qcow2"), filepath.Join(dir, "c.qcow2")
	for _, f := range []string{a, b, c} {
		create(t, f, "", "")
	}
	// An autoclear bit that nobody knows has to be cleared by who writes.
	f, err := os.OpenFile(a, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{0x40}, 88); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, Config{})
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'c', 'read-only': true, 'file': {'driver': 'file', 'filename': '%s'}}`, c))
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'q', 'read-only': true, 'l2-cache-size': 65536,
		'file': {'driver': 'blkdebug', 'node-name': 'd', 'inject-error': [{'event': 'none', 'iotype': 'write'}], 'image': {'driver': 'file', 'filename': '%s', 'node-name': 'f'}},
		'backing': {'driver': 'qcow2', 'node-name': 'b', 'file': {'driver': 'file', 'filename': '%s'}}}`, a, b))
	before := namedNodes(m, true)
	for range 3 {
		err = reopen(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'd', 'read-only': false, 'backing': 'c', 'cache': {'no-flush': true}, 'detect-zeroes': 'on'}`)
		if err == nil || !strings.Contains(err.Error(), "Could not update qcow2 header") {
			t.Fatalf("%v", err)
		}
		if after := namedNodes(m, true); !bytes.Equal(before, after) {
			t.Fatalf("before: %s\nafter:  %s", before, after)
		}
	}
	b1 := m.Graph().Node("q").Backing().Node()
	if b1.Name() != "b" {
		t.Fatalf("the backing file is %s", b1.Name())
	}
	// It goes on following its parent.
	mustReopen(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'd', 'read-only': true, 'backing': 'b', 'cache': {'no-flush': true}}`)
	if !b1.Options().NoFlush || !m.Graph().Node("f").Options().NoFlush {
		t.Fatal("the nodes below did not follow")
	}
	mustReopen(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'd', 'read-only': true, 'backing': null}`)
	if m.Graph().Node("b") != nil {
		t.Fatal("the backing file that nobody uses is still there")
	}
	mustDel(t, m, "q", "c")
}

// TestReopenFailsAnywhere: of two nodes in one call the second is refused, for each kind of reason;
// the first stays as it was.
func TestReopenFailsAnywhere(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "r.raw")
	writeFile(t, file, strings.Repeat("x", 1<<16))
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'n', 'size': 65536}`)
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'file', 'node-name': 'f', 'filename': '%s'}`, file))
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'r', 'file': 'f'}`)
	drivertest.AddRoot(t, m.Graph(), m.Graph().Node("r"), drivertest.Writer)
	before := namedNodes(m, true)
	first := `{'driver': 'null-co', 'node-name': 'n', 'size': 65536, 'read-only': true, 'detect-zeroes': 'on'}`
	for _, c := range []struct{ second, want string }{
		{`{'driver': 'raw', 'node-name': 'x', 'file': 'f'}`, "Failed to find node with node-name='x'"},
		{`{'driver': 'raw', 'file': 'f'}`, "node-name not specified"},
		{`{'driver': 'raw', 'node-name': 'r', 'file': 'f', 'offset': 1048576}`, "Offset (1048576) cannot be greater than size of the containing file (65536)"},
		{`{'driver': 'raw', 'node-name': 'r', 'file': 'r'}`, "Making 'r' a file child of 'r' would create a cycle"},
		{`{'driver': 'raw', 'node-name': 'r', 'file': 'f', 'read-only': true}`, "Read-only block node 'r' cannot support read-write users"},
		{`{'driver': 'raw', 'node-name': 'r', 'file': 'f', 'detect-zeroes': 'unmap'}`, "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"},
		{`{'driver': 'null-co', 'node-name': 'r'}`, "Cannot change the option 'driver'"},
		{fmt.Sprintf(`{'driver': 'file', 'node-name': 'f', 'filename': '%s', 'locking': 'off'}`, file), "Cannot change the option 'locking'"},
	} {
		if err := reopen(t, m, first, c.second); err == nil || err.Error() != c.want {
			t.Errorf("%s: %v", c.second, err)
		}
		if after := namedNodes(m, true); !bytes.Equal(before, after) {
			t.Fatalf("%s\nbefore: %s\nafter:  %s", c.second, before, after)
		}
	}
}

// TestReopenKeepsLocks: whatever descriptor a reopen makes, others stay locked out.
func TestReopenKeepsLocks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "r.raw")
	writeFile(t, file, strings.Repeat("x", 1<<16))
	m, other := newManager(t, Config{}), newManager(t, Config{})
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'file', 'filename': '%s', 'node-name': 'f'}}`, file))
	root := drivertest.AddRoot(t, m.Graph(), m.Graph().Node("r"), perm.Claim{Need: perm.Write, Share: perm.ConsistentRead})
	for i := range 4 {
		mustReopen(t, m, fmt.Sprintf(`{'driver': 'file', 'node-name': 'f', 'filename': '%s', 'auto-read-only': %v, 'cache': {'direct': %v}}`, file, i > 1, i%2 == 0))
		err := add(t, other, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'file', 'filename': '%s'}}`, file))
		if err == nil || !strings.Contains(err.Error(), "lock") {
			t.Fatalf("round %d: %v", i, err)
		}
		r, err := root.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		err = root.Edge().WriteAt(r, blk.Buf(bytes.Repeat([]byte{byte(i)}, 700)), 100, 0)
		root.End(r)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil || b[99] != 'x' || b[100] != byte(i) || b[799] != byte(i) || b[800] != 'x' {
			t.Fatalf("round %d: %v", i, err)
		}
	}
}

// groups are throttle groups by name.
type groups map[string]*throttle.Group

func (g groups) Object(name string) any { return g[name] }

// TestReopenThrottle: a filter goes to another group and back while requests wait in it. All of
// them end, and a group can go when nobody is in it.
func TestReopenThrottle(t *testing.T) {
	rate := int64(300)
	slow, err := throttle.FromOptions(&types.ThrottleGroupProperties{Limits: &types.ThrottleLimits{IopsTotal: &rate}})
	if err != nil {
		t.Fatal(err)
	}
	all := groups{"slow": throttle.NewGroup("slow", slow, nil), "free": throttle.NewGroup("free", throttle.NoLimits(), nil)}
	m := newManager(t, Config{Objects: all})
	file := filepath.Join(t.TempDir(), "r.raw")
	writeFile(t, file, strings.Repeat("x", 1<<20))
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'throttle', 'node-name': 't', 'throttle-group': 'slow', 'file': {'driver': 'file', 'filename': '%s', 'node-name': 'f'}}`, file))
	n := m.Graph().Node("t")
	root := drivertest.AddRoot(t, m.Graph(), n, drivertest.Writer)
	var stop atomic.Bool
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() { writer(t, n, root, &stop, byte(i)) })
	}
	for range 10 {
		for _, g := range []string{"free", "slow"} {
			mustReopen(t, m, fmt.Sprintf(`{'driver': 'throttle', 'node-name': 't', 'throttle-group': '%s', 'file': 'f'}`, g))
		}
	}
	if all["slow"].Retire() || !all["free"].Retire() {
		t.Fatal("the filter is not just where it should be")
	}
	if err := reopen(t, m, `{'driver': 'throttle', 'node-name': 't', 'throttle-group': 'free', 'file': 'f'}`); err == nil || err.Error() != "Throttle group 'free' does not exist" {
		t.Fatal(err)
	}
	stop.Store(true)
	wg.Wait()
}

// A node that is named twice, with children of different drivers: the options cannot be merged.
func TestReopenTwiceWithOtherChildren(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/a", "", "")
	m := newManager(t, Config{})
	file := `{'driver': 'file', 'filename': '` + dir + `/a'}`
	q := func(file, more string) string {
		return `{'driver': 'qcow2', 'node-name': 'q', 'file': ` + file + more + `}`
	}
	mustAdd(t, m, q(file, ""))
	raw := `{'driver': 'raw', 'file': ` + file + `}`
	for _, two := range [][]string{{q(file, ""), q(raw, "")}, {q(raw, ""), q(file, "")}} {
		if err := reopen(t, m, two...); err == nil {
			t.Errorf("%s is accepted", two)
		}
	}
	mustReopen(t, m, q(file, `, 'overlap-check': 'all'`), q(file, `, 'overlap-check': {'template': 'none'}`))
}

// A node that is named twice, the first time without a word of its backing file: what is said the
// second time counts.
func TestReopenTwiceBackingOnceMissing(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/a", "", "")
	create(t, dir+"/b", "", "")
	m := newManager(t, Config{})
	q := func(more string) string {
		return `{'driver': 'qcow2', 'node-name': 'q', 'file': {'driver': 'file', 'filename': '` + dir + `/a'}` + more + `}`
	}
	mustAdd(t, m, q(`, 'backing': {'driver': 'qcow2', 'node-name': 'b', 'lazy-refcounts': true,
		'file': {'driver': 'file', 'filename': '`+dir+`/b'}}`))
	for _, missing := range [][]string{{q("")}, {q(""), q("")}} {
		if err := reopen(t, m, missing...); err == nil || err.Error() != "backing is missing for 'q'" {
			t.Errorf("%s: %v", missing, err)
		}
	}
	mustReopen(t, m, q(""), q(`, 'backing': 'b'`))
	if o := m.Graph().Node("b").Options().Canonical.U.(*types.BlockdevOptionsQcow2); o.LazyRefcounts == nil {
		t.Error("the backing file has lost an option")
	}
	mustReopen(t, m, q(""), q(`, 'backing': null`))
	if m.Graph().Node("q").Backing() != nil {
		t.Error("still there")
	}
}
