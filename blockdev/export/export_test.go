package export_test

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/export"
	"qblockd/blockdev/export/nbd"
	"qblockd/blockdev/nbdwire"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

const patience = 20 * time.Second

// fixture is a graph with a table and a running NBD server.
type fixture struct {
	*export.Table
	nbd  *nbd.Type
	t    *testing.T
	g    *graph.Graph
	sink *drivertest.Sink
	path string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	g, sink := drivertest.NewGraphSink(t)
	table := export.New(g, export.Options{})
	f := &fixture{table, nbd.NewType(table, nbd.Options{}), t, g, sink, filepath.Join(t.TempDir(), "s")}
	t.Cleanup(func() { f.Close(context.Background()) })
	return f
}

func (f *fixture) start() {
	f.t.Helper()
	if err := f.nbd.Start(f.t.Context(), unixServer(f.path)); err != nil {
		f.t.Fatal(err)
	}
}

func unixServer(path string) *types.NbdServerOptions {
	return &types.NbdServerOptions{
		Addr: types.SocketAddress{Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddress{Path: path}},
	}
}

func (f *fixture) node(name string) (*graph.Node, *drivertest.Fault) {
	f.t.Helper()
	d := drivertest.NewFault(drivertest.NewHostFile(f.t, 1<<20))
	return drivertest.AddNode(f.t, f.g, name, d), d
}

func (f *fixture) add(id, node string, change ...func(*types.BlockExportOptions)) error {
	o := &types.BlockExportOptions{Type: types.BlockExportTypeNbd, ID: id, NodeName: node,
		U: &types.BlockExportOptionsNbd{}}
	for _, c := range change {
		c(o)
	}
	return f.Add(f.t.Context(), o)
}

func writable(o *types.BlockExportOptions) { yes := true; o.Writable = &yes }

func named(name string) func(*types.BlockExportOptions) {
	return func(o *types.BlockExportOptions) { o.U.(*types.BlockExportOptionsNbd).Name = &name }
}

func (f *fixture) is(err error, want string) {
	f.t.Helper()
	switch {
	case err == nil && want != "":
		f.t.Errorf("no error, want %s", want)
	case err != nil && err.Error() != want:
		f.t.Errorf("%v, want %s", err, want)
	}
}

// deleted are the ids of the BLOCK_EXPORT_DELETED events so far.
func (f *fixture) deleted() string {
	var ids []string
	for _, e := range f.sink.Events() {
		if d, ok := e.(types.BlockExportDeletedEvent); ok {
			ids = append(ids, d.ID)
		}
	}
	return strings.Join(ids, " ")
}

func (f *fixture) query() string {
	var l []string
	for _, i := range f.Query() {
		s := i.ID + "@" + i.NodeName
		if i.ShuttingDown {
			s += "!"
		}
		l = append(l, s)
	}
	return strings.Join(l, " ")
}

// client connects to an export and sends requests; replies are read with read.
func (f *fixture) client(name string, qs ...nbdwire.Request) net.Conn {
	f.t.Helper()
	nc, err := net.Dial("unix", f.path)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	b := append([]byte{0, 0, 0, 3}, nbdwire.AppendOption(nil, nbdwire.OptExportName, []byte(name))...)
	for i := range qs {
		b = qs[i].Append(b)
	}
	nc.Write(b)
	f.read(nc, nbdwire.GreetingSize+nbdwire.ExportNameReply)
	return nc
}

func (f *fixture) read(nc net.Conn, n int) []byte {
	f.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(nc, b); err != nil {
		f.t.Fatal(err)
	}
	return b
}

func TestAddErrors(t *testing.T) {
	f := newFixture(t)
	f.node("n")
	f.node("m")
	drivertest.MustBuild(t, f.g, drivertest.Spec{
		Options: graph.Options{Name: "ro", Kind: graph.Protocol, ReadOnly: true},
		Open:    drivertest.Opened(drivertest.NewHostFile(t, 4096)),
	})
	f.is(f.add("e", "n"), "NBD server not running")
	f.is(f.nbd.Stop(t.Context()), "NBD server not running")
	f.start()
	f.is(f.nbd.Start(t.Context(), unixServer(f.path+"2")), "NBD server already running")
	f.is(f.add("e", "none"), "Cannot find device='' nor node-name='none'")
	for _, id := range []string{"", "1e", "e/", "#e", "é"} {
		f.is(f.add(id, "n"), "Invalid block export id")
	}
	f.is(f.add("e", "ro", writable), "Cannot export read-only node as writable")
	f.is(f.add("e", "n", func(o *types.BlockExportOptions) { s := "io"; o.Iothread = &s }), `iothread "io" not found`)
	f.is(f.add("e", "n", named("x")), "")
	f.is(f.add("e", "m"), "Block export id 'e' is already in use")
	f.is(f.add("f", "m", named("x")), "NBD server already has export named 'x'")
	f.is(f.add("f", "m"), "")
	f.is(f.Del(t.Context(), "g", ""), "Export 'g' is not found")
	if q := f.query(); q != "f@m e@n" {
		t.Error(q)
	}
	// A failed attempt leaves nothing behind.
	f.is(f.Del(t.Context(), "e", ""), "")
	f.is(f.Del(t.Context(), "f", ""), "")
	if n := len(f.g.Roots()); n != 0 {
		t.Errorf("%d roots are left", n)
	}
	if d := f.deleted(); d != "e f" {
		t.Error(d)
	}
}

func TestPermissions(t *testing.T) {
	f := newFixture(t)
	n, _ := f.node("n")
	f.start()
	f.is(f.add("e", "n", writable), "")
	c := f.g.Roots()[0].Edge().Claim()
	if c.Need != perm.ConsistentRead|perm.Write || c.Share != perm.All&^perm.Resize {
		t.Errorf("claim %+v", c)
	}
	tx := f.g.Begin(t.Context())
	defer tx.Abort()
	tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: perm.Claim{Need: perm.Resize, Share: perm.All}}, n)
	f.is(tx.Commit(), "Permission conflict on node 'n': permissions 'resize' are both required by an unnamed block device "+
		"(uses node 'n' as 'root' child) and unshared by an unnamed block device (uses node 'n' as 'root' child).")
	f.is(f.add("e2", "n", writable, named("2")), "")

	other := drivertest.AddRoot(t, f.g, drivertest.AddNode(t, f.g, "m", drivertest.NewHostFile(t, 4096)),
		perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.ConsistentRead})
	_ = other
	f.is(f.add("e3", "m", writable), "Permission conflict on node 'm': permissions 'write' are both required by an unnamed block device "+
		"(uses node 'm' as 'root' child) and unshared by an unnamed block device (uses node 'm' as 'root' child).")
	f.is(f.add("e3", "m"), "Permission conflict on node 'm': permissions 'resize' are both required by an unnamed block device "+
		"(uses node 'm' as 'root' child) and unshared by an unnamed block device (uses node 'm' as 'root' child).")
	if n := len(f.g.Roots()); n != 3 {
		t.Errorf("%d roots", n)
	}
}

// An export follows its node when that is replaced, and serves the new one.
func TestReplacedNode(t *testing.T) {
	f := newFixture(t)
	n, _ := f.node("n")
	m, _ := f.node("m")
	r := drivertest.AddRoot(t, f.g, m, drivertest.Writer)
	q, _ := r.Begin(t.Context())
	if err := r.WriteAt(q, vec("new"), 0, 0); err != nil {
		t.Fatal(err)
	}
	r.End(q)
	f.start()
	f.is(f.add("e", "n"), "")
	rd := nbdwire.Request{Len: 3}
	nc := f.client("n", rd)
	if b := f.read(nc, nbdwire.SimpleSize+3)[nbdwire.SimpleSize:]; string(b) != "\x00\x00\x00" {
		t.Errorf("%q", b)
	}
	tx := f.g.Begin(t.Context())
	if err := tx.ReplaceNode(n, m); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if q := f.query(); q != "e@m" {
		t.Error(q)
	}
	nc.Write(rd.Append(nil))
	if b := f.read(nc, nbdwire.SimpleSize+3)[nbdwire.SimpleSize:]; string(b) != "new" {
		t.Errorf("%q", b)
	}
}

// The options of an export make it again as it is: clients find it by the same name, on the node
// that it shows.
func TestOptions(t *testing.T) {
	f := newFixture(t)
	n, _ := f.node("n")
	m, _ := f.node("m")
	f.start()
	f.is(f.add("e", "n", writable), "")
	tx := f.g.Begin(t.Context())
	defer tx.Abort()
	if err := tx.ReplaceNode(n, m); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	o := f.Options()
	f.is(f.Del(t.Context(), "e", ""), "")
	f.is(f.Add(t.Context(), o[0]), "")
	if q := f.query(); q != "e@m" {
		t.Error(q)
	}
	f.client("n")
}

func TestRemoval(t *testing.T) {
	f := newFixture(t)
	f.node("n")
	f.start()
	f.is(f.add("e", "n"), "")
	nc := f.client("n")
	err := f.Del(t.Context(), "e", types.BlockExportRemoveModeSafe)
	f.is(err, "export 'e' still in use")
	if h, ok := err.(interface{ Hint() string }); !ok || h.Hint() != "Use mode='hard' to force client disconnect\n" {
		t.Errorf("hint of %v", err)
	}
	f.is(f.Del(t.Context(), "e", types.BlockExportRemoveModeHard), "")
	if _, err := nc.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the client was not dropped: %v", err)
	}
	if d := f.deleted(); d != "e" {
		t.Errorf("deleted: %q", d)
	}
	f.is(f.add("e", "n"), "")
}

// A client that has hung up is none that uses the export, also if the server has not heard of it
// yet.
func TestRemovalAfterHangup(t *testing.T) {
	f := newFixture(t)
	f.node("n")
	f.start()
	for range 300 {
		f.is(f.add("e", "n"), "")
		a, b := f.client("n"), f.client("n")
		f.is(f.Del(t.Context(), "e", types.BlockExportRemoveModeSafe), "export 'e' still in use")
		a.Close()
		f.is(f.Del(t.Context(), "e", types.BlockExportRemoveModeSafe), "export 'e' still in use")
		b.Close()
		f.is(f.Del(t.Context(), "e", types.BlockExportRemoveModeSafe), "")
	}
}

// A request stuck in the storage holds up neither removal nor the server's stop nor the
// end; its export goes when it ends.
func TestStuckRequest(t *testing.T) {
	f := newFixture(t)
	_, fault := f.node("n")
	f.node("m")
	f.start()
	f.is(f.add("e", "n"), "")
	f.is(f.add("f", "m"), "")
	entered, release := make(chan struct{}, 1), make(chan struct{})
	fault.Hook(func(drivertest.Op, int64, int64) {
		select {
		case entered <- struct{}{}:
		default:
		}
		<-release
	})
	// The device does not know NoWait: its reads are served inline by the connection.
	f.client("n", nbdwire.Request{Len: 512})
	<-entered
	start := time.Now()
	f.is(f.Del(t.Context(), "e", types.BlockExportRemoveModeHard), "")
	if q := f.query(); q != "f@m e@n!" {
		t.Error(q)
	}
	f.is(f.Del(t.Context(), "e", types.BlockExportRemoveModeHard), "Export 'e' is already shutting down")
	f.is(f.add("e", "m", named("y")), "Block export id 'e' is already in use")
	f.is(f.nbd.Stop(t.Context()), "")
	if d := time.Since(start); d > 10*export.Grace {
		t.Errorf("took %v", d)
	}
	if _, err := os.Lstat(f.path); !os.IsNotExist(err) {
		t.Error("the socket is left")
	}
	if d := f.deleted(); d != "f" {
		t.Errorf("deleted: %q", d)
	}
	f.start() // another server can be started meanwhile
	close(release)
	for end := time.Now().Add(patience); f.deleted() != "f e"; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("deleted: %q", f.deleted())
		}
	}
	f.is(f.add("e", "n"), "")
}

func TestStopOrder(t *testing.T) {
	f := newFixture(t)
	f.node("n")
	f.start()
	for _, id := range []string{"a", "b", "c"} {
		f.is(f.add(id, "n", named(id)), "")
	}
	f.client("b")
	if q := f.query(); q != "c@n b@n a@n" {
		t.Error(q)
	}
	f.is(f.nbd.Stop(t.Context()), "")
	if d := f.deleted(); d != "a b c" {
		t.Error(d)
	}
	f.start()
	f.is(f.add("a", "n"), "")
	f.Close(context.Background())
	if d := f.deleted(); d != "a b c a" {
		t.Error(d)
	}
	f.is(f.add("a", "n"), "NBD server not running")
	f.is(f.nbd.Start(t.Context(), unixServer(f.path)), "The daemon is shutting down")
}

// Adding and stopping at the same time leaves no export without a server.
func TestAddWhileStopping(t *testing.T) {
	f := newFixture(t)
	f.node("n")
	for range 20 {
		f.start()
		done := make(chan error)
		go func() { done <- f.add("e", "n") }()
		f.is(f.nbd.Stop(t.Context()), "")
		err := <-done
		if err != nil && err.Error() != "NBD server not running" {
			t.Fatal(err)
		}
		if err == nil && f.query() != "" {
			t.Fatalf("left: %s", f.query())
		}
		if n := len(f.g.Roots()); n != 0 {
			t.Fatalf("%d roots are left", n)
		}
	}
}

func TestSizeIsWholeSectors(t *testing.T) {
	f := newFixture(t)
	drivertest.AddNode(t, f.g, "n", drivertest.NewHostFile(t, 1000))
	f.start()
	f.is(f.add("e", "n"), "")
	nc, err := net.Dial("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.Write(append([]byte{0, 0, 0, 3}, nbdwire.AppendOption(nil, nbdwire.OptExportName, []byte("n"))...))
	b := f.read(nc, nbdwire.GreetingSize+nbdwire.ExportNameReply)
	if s := b[nbdwire.GreetingSize : nbdwire.GreetingSize+8]; s[6] != 2 || s[7] != 0 {
		t.Errorf("size % x", s)
	}
}

// CACHE copies nothing into the node through an export that does not claim to write.
func TestCacheOfReadOnlyExport(t *testing.T) {
	f := newFixture(t)
	_, fault := f.node("n")
	f.start()
	f.is(f.add("ro", "n"), "")
	f.is(f.add("rw", "n", writable, named("rw")), "")
	fault.Inject(drivertest.Rule{Ops: drivertest.OpModify})
	for _, name := range []string{"n", "rw"} {
		nc := f.client(name, nbdwire.Request{Cmd: nbdwire.CmdCache, Len: 1 << 20})
		if b := f.read(nc, nbdwire.SimpleSize); b[7] != 0 {
			t.Errorf("%s: error %d", name, b[7])
		}
	}
}
