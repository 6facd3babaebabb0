package export

import (
	"context"
	"sync"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// bench is a table with a type whose exports have no clients, a node "file" with a format "top"
// over it, and a node "other".
type bench struct {
	*testing.T
	g *graph.Graph
	x *Table
}

type fakeType struct{}

func (fakeType) Check(*graph.Node, *types.BlockExportOptions) ([]*graph.Node, error) { return nil, nil }
func (fakeType) Serve(*Export, *graph.Hold) (Server, error) {
	return &fakeServer{done: make(chan struct{})}, nil
}
func (fakeType) Close() {}
func (fakeType) Claim(_ *types.BlockExportOptions, need perm.Perm) perm.Claim {
	return perm.Claim{Need: need, Share: perm.All}
}

type fakeServer struct {
	once sync.Once
	done chan struct{}
}

func (s *fakeServer) Shutdown()                           { s.once.Do(func() { close(s.done) }) }
func (s *fakeServer) ShutdownIfIdle(context.Context) bool { s.Shutdown(); return true }
func (s *fakeServer) Done() <-chan struct{}               { return s.done }

type fakeGroup struct{ id string }

func (fakeGroup) Enter(context.Context) error { return nil }
func (fakeGroup) Leave()                      {}

func newBench(t *testing.T) *bench {
	t.Helper()
	g := drivertest.NewGraph(t)
	groups := map[string]Workers{"io0": fakeGroup{"io0"}, "io1": fakeGroup{"io1"}}
	x := New(g, Options{Iothread: func(id string) Workers { return groups[id] }})
	t.Cleanup(func() { x.Close(context.Background()) })
	x.Register(types.BlockExportTypeNbd, fakeType{})
	file := drivertest.AddNode(t, g, "file", drivertest.NewMemFile(1<<20))
	drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "top", DriverName: "raw", Kind: graph.Format},
		Children: []drivertest.Child{drivertest.File(file)},
		Open:     raw.Def.With(&types.BlockdevOptionsRaw{}),
	})
	drivertest.AddNode(t, g, "other", drivertest.NewMemFile(1<<20))
	return &bench{t, g, x}
}

// export adds an export of node; iothread "" is none.
func (b *bench) export(id, node, iothread string, fixed bool) error {
	o := &types.BlockExportOptions{Type: types.BlockExportTypeNbd, ID: id, NodeName: node, FixedIothread: &fixed,
		U: &types.BlockExportOptionsNbd{Name: &id}}
	if iothread != "" {
		o.Iothread = &iothread
	}
	return b.x.Add(context.Background(), o)
}

// set is x-blockdev-set-iothread; "" is null.
func (b *bench) set(node, iothread string, force bool) error {
	var id *string
	if iothread != "" {
		id = &iothread
	}
	return b.x.SetIothread(b.g.Node(node), id, force)
}

// served checks who serves an export.
func (b *bench) served(export, want string) {
	b.Helper()
	e, _ := b.x.find(export, false)
	got := ""
	if w := e.Workers(); w != nil {
		got = w.(fakeGroup).id
	}
	if got != want {
		b.Errorf("export %s is served by %q, not %q", export, got, want)
	}
}

// fails checks the text of an error; "" is none.
func (b *bench) fails(err error, want string) {
	b.Helper()
	got := ""
	if err != nil {
		got = err.Error()
	}
	if got != want {
		b.Errorf("error %q, want %q", got, want)
	}
}

func TestIothreads(t *testing.T) {
	b := newBench(t)
	b.fails(b.set("top", "nope", false), "Cannot find iothread nope")
	b.fails(b.set("top", "io0", false), "")
	b.fails(b.export("e", "top", "", false), "")
	b.served("e", "io0")
	b.fails(b.export("o", "other", "io1", false), "")
	b.served("o", "io1")
	b.fails(b.set("top", "io1", false), "Node top is associated with a BlockBackend and could be in use (use force=true to override this check)")
	b.served("e", "io0")
	b.fails(b.set("file", "io1", false), "") // moves all that is connected
	b.served("e", "io1")
	b.fails(b.set("top", "", true), "")
	b.served("e", "")
	b.fails(b.export("e2", "file", "io0", false), "") // takes the others with it
	b.served("e", "io0")
	b.served("o", "io1")
	b.fails(b.export("bad", "top", "nope", false), `iothread "nope" not found`)
}

func TestFixedIothread(t *testing.T) {
	b := newBench(t)
	b.fails(b.export("e", "top", "io1", true), "")
	b.fails(b.set("top", "io0", true), "Cannot change iothread of active block backend")
	b.fails(b.set("file", "", false), "Cannot change iothread of active block backend")
	b.fails(b.set("file", "io1", false), "")
	b.fails(b.export("e2", "file", "io0", true), "Cannot change iothread of active block backend")
	b.fails(b.export("e3", "file", "io0", false), "")
	b.served("e3", "io1")
	b.fails(b.x.Del(context.Background(), "e", types.BlockExportRemoveModeSafe), "")
	b.fails(b.set("file", "", true), "")
	b.served("e3", "")
	b.fails(b.set("other", "io0", false), "")
}

// TestIothreadsForget: nodes that are gone are not kept.
func TestIothreadsForget(t *testing.T) {
	b := newBench(t)
	b.fails(b.set("other", "io0", false), "")
	tx := b.g.Begin(context.Background())
	defer tx.Abort()
	if err := tx.Delete("other"); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	b.fails(b.set("top", "io0", false), "")
	b.x.iothreads.mu.Lock()
	defer b.x.iothreads.mu.Unlock()
	if n := len(b.x.iothreads.group); n != 2 {
		t.Errorf("%d nodes are assigned", n)
	}
}
