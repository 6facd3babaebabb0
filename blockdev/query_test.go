package blockdev

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// chainDriver is a format without a file, for chains without images.
type chainDriver struct{ header string }

func (chainDriver) Caps() graph.Caps { return graph.Caps{Backing: true} }
func (chainDriver) Size() int64      { return 65536 }
func (chainDriver) Close() error     { return nil }
func (chainDriver) ReadAt(_ *blk.Req, v blk.Vec, _ int64, _ blk.Flags) error {
	v.Zero()
	return nil
}
func (d chainDriver) BackingFile() (name, format string) { return d.header, "" }
func (chainDriver) ImageInfo(i *types.ImageInfo)         { i.ClusterSize = new(int64) }

// chain adds n nodes on top of a null-co node, each the backing node of the next.
func chain(t testing.TB, m *Manager, n int) {
	t.Helper()
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'n0', 'size': 65536, 'read-only': true}`)
	for i := 1; i <= n; i++ {
		mustAdd(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'n%d', 'read-only': true, 'file': 'n0', 'backing': 'n%d'}`, i, i-1))
	}
}

// chained is a Manager whose qcow2 needs no image; opened names what it would open by itself.
func chained(t testing.TB, header string) *Manager {
	list := overridden("qcow2", func(driver.OpenFunc, *driver.Opening) (graph.Driver, error) { return chainDriver{header}, nil })
	return newManager(t, Config{Drivers: list})
}

func parse(t testing.TB, enc []byte) value.Value {
	t.Helper()
	v, err := value.Parse(string(enc))
	if err != nil {
		t.Fatalf("%v in %s", err, enc)
	}
	return v
}

// The answers are JSON in QEMU's order of members, though spliced. (Read and printed once,
// members of one bucket change places; twice, they are back.)
func TestAnswersAreWellFormed(t *testing.T) {
	dir := t.TempDir()
	create(t, dir+"/base", "", "")
	create(t, dir+"/top \"x\", \"actual-size\": -1", "base", "qcow2")
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'qcow2', 'node-name': 't', 'file': {'driver': 'file', 'filename': '`+dir+`/top "x", "actual-size": -1'}}`)
	for _, flat := range []bool{false, true} {
		enc := namedNodes(m, flat)
		v := parse(t, enc)
		if !ordered(t, enc) {
			t.Errorf("flat %v: %s", flat, enc)
		}
		l := v.(value.List)
		top, _ := l[2].(*value.Dict).Get("image")
		_, deep := top.(*value.Dict).Get("backing-image")
		depth, _ := l[2].(*value.Dict).Get("backing_file_depth")
		if len(l) != 4 || deep == flat || (depth == int64(1)) == flat {
			t.Errorf("flat %v: %s", flat, enc)
		}
	}
	for _, enc := range [][]byte{m.AppendNodeStats(nil), m.DebugGraph().AppendJSON(nil)} {
		if !ordered(t, enc) {
			t.Errorf("%s", enc)
		}
	}
	empty := newManager(t, Config{})
	if got := string(namedNodes(empty, false)) + string(empty.AppendNodeStats(nil)); got != "[][]" {
		t.Errorf("no nodes: %s", got)
	}
}

func ordered(t testing.TB, enc []byte) bool {
	again := value.Append(nil, parse(t, value.Append(nil, parse(t, enc))))
	return string(again) == string(enc)
}

// encodings counts the nodes whose encoding differs between two queries.
func encodings(m *Manager, query func()) (fresh int) {
	before := map[*graph.Node]*nodeInfo{}
	nodes := m.Graph().Nodes()
	for _, n := range nodes {
		before[n] = m.record(n).info.Load()
	}
	query()
	for _, n := range nodes {
		if m.record(n).info.Load() != before[n] {
			fresh++
		}
	}
	return fresh
}

// A query encodes each node once, and only what changed again.
func TestEncodedOnce(t *testing.T) {
	const n = 200
	m := chained(t, "")
	chain(t, m, n)
	query := func() { namedNodes(m, false) }
	if got := encodings(m, query); got != n+1 {
		t.Errorf("first query: %d of %d encoded", got, n+1)
	}
	if got := encodings(m, query); got != 0 {
		t.Errorf("second query: %d encoded", got)
	}
	if got := encodings(m, func() { namedNodes(m, true) }); got != 0 {
		t.Errorf("flat query: %d encoded", got)
	}
	if err := m.SetWriteThreshold(context.Background(), "n100", 5); err != nil {
		t.Fatal(err)
	}
	if got := encodings(m, query); got != 1 {
		t.Errorf("after a change of one: %d encoded", got)
	}
	if !strings.Contains(string(namedNodes(m, true)), `"write_threshold": 5`) {
		t.Error("the change does not show")
	}
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'new'}`)
	if got := encodings(m, query); got != 1 {
		t.Errorf("after a new node: %d encoded", got)
	}
}

// Names that hold the names of everything below are cut off and share their parts: the memory of a
// chain is linear in its length.
func TestNamesAreNotQuadratic(t *testing.T) {
	size := func(n int) (total int) {
		m := chained(t, "overridden")
		chain(t, m, n)
		for _, x := range m.Graph().Nodes() {
			name := m.name(x)
			if len(name.filename) > maxName {
				t.Fatalf("%s: a name of %d bytes", x.Name(), len(name.filename))
			}
			total += len(name.filename) + 64*len(name.options.members)
		}
		top := m.Filename(m.Graph().Node(fmt.Sprintf("n%d", n)))
		if !strings.HasPrefix(top, `json:{"backing": {"backing": {"backing": `) || !strings.HasSuffix(top, "...") || len(top) != maxName {
			t.Errorf("the name of the top: %d bytes, %.60s", len(top), top)
		}
		return total
	}
	a, b := size(200), size(400)
	if b > 2*a+maxName*100 {
		t.Errorf("names of 200 nodes take %d bytes, of 400 %d", a, b)
	}
}

// Changing an edge changes the names above it, and those alone.
func TestNamesFollowTheGraph(t *testing.T) {
	m := chained(t, "hdr")
	chain(t, m, 2)
	mustAdd(t, m, `{'driver': 'null-aio', 'node-name': 'other'}`)
	top, other := m.Graph().Node("n2"), m.Graph().Node("other")
	before, apart := m.name(top), m.name(other)
	tx := m.Graph().Begin(context.Background())
	if err := tx.Replace(m.Graph().Node("n1").Backing(), other); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	after := m.Filename(top)
	if after == before.filename || !strings.Contains(after, "null-aio") {
		t.Errorf("the name is still %s", after)
	}
	if m.Filename(other) != apart.filename {
		t.Error("the name of another node changed")
	}
}

// stuckSize is a driver whose allocated size never arrives once stuck is set.
type stuckSize struct {
	chainDriver
	stuck chan struct{}
	asked chan struct{}
}

func (d *stuckSize) ActualSize() (int64, error) {
	select {
	case <-d.asked: // the second question
		<-d.stuck
		return 2, nil
	default:
		close(d.asked)
		return 1, nil
	}
}

// Storage that does not tell how much it holds does not hold up queries: they show what was last
// known.
func TestStuckActualSize(t *testing.T) {
	d := &stuckSize{stuck: make(chan struct{}), asked: make(chan struct{})}
	list := overridden("null-aio", func(driver.OpenFunc, *driver.Opening) (graph.Driver, error) { return d, nil })
	m := newManager(t, Config{Drivers: list})
	mustAdd(t, m, `{'driver': 'null-aio', 'node-name': 'stuck'}`)
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'free'}`)
	for range 3 { // only the first of them asks
		got := string(namedNodes(m, true))
		if !strings.Contains(got, `"actual-size": 1,`) && !strings.Contains(got, `"actual-size": 1}`) {
			t.Errorf("the last known size is not shown: %s", got)
		}
	}
	close(d.stuck)
	for !strings.Contains(string(namedNodes(m, true)), `"actual-size": 2`) {
		time.Sleep(time.Millisecond)
	}
}

func TestDebugGraph(t *testing.T) {
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'null-co', 'node-name': 'n'}`)
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'r', 'file': 'n'}`)
	name := "r"
	ctx := context.Background()
	root, err := m.OpenForCreate(ctx, &types.BlockdevRef{Reference: &name})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"edges": [{"name": "file", "parent": 2, "shared-perm": ["write-unchanged", "consistent-read"], "perm": ["resize", "write"], "child": 3}, ` +
		`{"name": "root", "parent": 1, "shared-perm": ["write-unchanged", "consistent-read"], "perm": ["resize", "write"], "child": 2}], ` +
		`"nodes": [{"name": "r", "type": "block-driver", "id": 2}, {"name": "n", "type": "block-driver", "id": 3}, {"name": "", "type": "block-backend", "id": 1}]}`
	if got := string(m.DebugGraph().AppendJSON(nil)); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if err := m.Graph().CloseRoot(ctx, root); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkAdd10000(b *testing.B) {
	for b.Loop() {
		m := newManager(b, Config{})
		for i := range 10000 {
			mustAdd(b, m, fmt.Sprintf(`{'driver': 'null-co', 'node-name': 'n%d'}`, i))
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/10000, "ns/add")
}

func BenchmarkFlatQuery10000(b *testing.B) {
	m := newManager(b, Config{})
	for i := range 10000 {
		mustAdd(b, m, fmt.Sprintf(`{'driver': 'null-co', 'node-name': 'n%d'}`, i))
	}
	var out []byte
	for b.Loop() {
		out = namedNodes(m, true)
	}
	b.SetBytes(int64(len(out)))
}

// The answer about a chain of 200 is a few megabytes: each image holds all below it.
func BenchmarkChain200(b *testing.B) {
	for _, header := range []string{"", "overridden"} {
		b.Run("header="+header, func(b *testing.B) {
			m := chained(b, header)
			chain(b, m, 200)
			var out []byte
			for b.Loop() {
				out = namedNodes(m, false)
			}
			b.SetBytes(int64(len(out)))
		})
	}
}

// What the headers of overlays name: no filters, and nothing that could not be opened again.
func TestHeaderName(t *testing.T) {
	dir := t.TempDir()
	m := newManager(t, Config{})
	create(t, dir+"/a", "", "")
	create(t, dir+"/mid", "a", "qcow2")
	create(t, dir+"/target", "", "")
	qcow2 := func(name, more string) string {
		return `{'driver': 'qcow2', 'file': {'driver': 'file', 'filename': '` + dir + `/` + name + `'}` + more + `}`
	}
	for i, c := range []struct{ options, want string }{
		{`'driver': 'qcow2', 'file': {'driver': 'file', 'filename': 'DIR/a'}`, "qcow2 DIR/a"},
		{`'driver': 'compress', 'file': ` + qcow2("a", ""), "qcow2 DIR/a"},
		{`'driver': 'preallocate', 'file': ` + qcow2("a", ""), "qcow2 DIR/a"},
		{`'driver': 'blkdebug', 'image': ` + qcow2("a", ""), "qcow2 DIR/a"},
		{`'driver': 'copy-on-read', 'file': {'driver': 'compress', 'file': ` + qcow2("mid", "") + `}`, "qcow2 DIR/mid"},
		{`'driver': 'copy-before-write', 'target': ` + qcow2("target", "") + `, 'file': ` + qcow2("a", ""), "qcow2 DIR/a"},
		{`'driver': 'qcow2', 'file': {'driver': 'blkdebug', 'image': {'driver': 'preallocate', 'file': {'driver': 'file', 'filename': 'DIR/a'}}}`, "qcow2 DIR/a"},
		{`'driver': 'qcow2', 'file': {'driver': 'file', 'filename': 'DIR/mid'}, 'backing': {'driver': 'compress', 'file': ` + qcow2("a", "") + `}`, `qcow2 json:{"backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "DIR/a"}}, "driver": "qcow2", "file": {"driver": "file", "filename": "DIR/mid"}}`}, // may be another one
		{`'driver': 'qcow2', 'file': {'driver': 'file', 'filename': 'DIR/mid'}, 'backing': {'driver': 'compress', 'file': ` + qcow2("target", "") + `}`,
			`qcow2 json:{"backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "DIR/target"}}, "driver": "qcow2", "file": {"driver": "file", "filename": "DIR/mid"}}`},
		{`'driver': 'raw', 'offset': 512, 'file': {'driver': 'preallocate', 'file': {'driver': 'file', 'filename': 'DIR/a'}}`,
			`raw json:{"offset": 512, "driver": "raw", "file": {"driver": "file", "filename": "DIR/a"}}`},
		{`'driver': 'null-co', 'size': 512, 'latency-ns': 1`, `null-co json:{"driver": "null-co", "size": 512}`},
		{`'driver': 'snapshot-access', 'file': {'driver': 'copy-before-write', 'target': ` + qcow2("target", "") + `, 'file': ` + qcow2("a", "") + `}`,
			"error: An image cannot name a node of the driver 'snapshot-access' as its backing file"},
	} {
		mustAdd(t, m, strings.ReplaceAll(`{'node-name': 'n', `+c.options+`}`, "DIR", dir))
		name, format, err := m.HeaderName(graph.Now, m.Graph().Node("n"))
		got := format + " " + name
		if err != nil {
			got = "error: " + err.Error()
		}
		if want := strings.ReplaceAll(c.want, "DIR", dir); got != want {
			t.Errorf("%d: got %s, want %s", i, got, want)
		}
		mustDel(t, m, "n")
		if err != nil {
			continue
		}
		// An image that names it so can be opened.
		top := dir + "/top"
		_ = os.Remove(top)
		create(t, top, name, format)
		if err := add(t, m, `{'driver': 'qcow2', 'node-name': 'n', 'file': {'driver': 'file', 'filename': '`+top+`'}}`); err != nil {
			t.Errorf("%d: %v", i, err)
			continue
		}
		mustDel(t, m, "n")
	}
	// Names that hold those of two children do not grow without end.
	mustAdd(t, m, `{'driver': 'file', 'node-name': 'v0', 'read-only': true, 'filename': '`+dir+`/a'}`)
	for i := range 40 {
		v := fmt.Sprintf("v%d", i)
		mustAdd(t, m, fmt.Sprintf(`{'driver': 'blkverify', 'node-name': 'v%d', 'read-only': true, 'raw': '%s', 'test': '%s'}`, i+1, v, v))
	}
	if n := len(m.Filename(m.Graph().Node("v40"))); n > maxName {
		t.Errorf("a name of %d bytes", n)
	}
}
