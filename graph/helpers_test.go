package graph

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/events"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// memDriver is a disk in memory. The hooks make it block or fail.
type memDriver struct {
	mu     sync.Mutex
	data   []byte
	closed atomic.Bool
	order  *[]string // closes are appended here
	name   string

	onRead  func()
	onPerm  func(ctx context.Context, c perm.Claim) error
	onFlush func()
	perms   []string // what happened to permissions
}

func (d *memDriver) Caps() Caps  { return Caps{} }
func (d *memDriver) Size() int64 { return int64(len(d.data)) }
func (d *memDriver) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if d.onRead != nil {
		d.onRead()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed.Load() {
		return blk.ErrClosed
	}
	v.CopyIn(d.data[off:])
	return nil
}
func (d *memDriver) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	v.CopyOut(d.data[off:])
	return nil
}
func (d *memDriver) Flush(r *blk.Req) error {
	if d.onFlush != nil {
		d.onFlush()
	}
	return nil
}
func (d *memDriver) Close() error {
	d.closed.Store(true)
	if d.order != nil {
		d.mu.Lock()
		*d.order = append(*d.order, d.name)
		d.mu.Unlock()
	}
	return nil
}
func (d *memDriver) PermPrepare(ctx context.Context, c perm.Claim) error {
	if d.onPerm != nil {
		if err := d.onPerm(ctx, c); err != nil {
			return err
		}
	}
	d.perms = append(d.perms, "prepare")
	return nil
}
func (d *memDriver) PermCommit() { d.perms = append(d.perms, "commit") }
func (d *memDriver) PermAbort()  { d.perms = append(d.perms, "abort") }

// overDriver passes everything to one child of its node.
type overDriver struct {
	n      *Node
	closed func()
}

func (d *overDriver) below() *Edge {
	if e := d.n.File(); e != nil {
		return e
	}
	if e := d.n.Backing(); e != nil {
		return e
	}
	panic(fmt.Sprintf("a request in node %s (state %d, quiesce %d, owned %v) without children",
		d.n.name, d.n.state, d.n.quiesce, d.n.owned))
}
func (d *overDriver) Caps() Caps  { return Caps{Backing: true} }
func (d *overDriver) Size() int64 { return d.below().Node().Size() }
func (d *overDriver) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.below().ReadAt(r, v, off, f)
}
func (d *overDriver) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.below().WriteAt(r, v, off, f)
}
func (d *overDriver) Flush(r *blk.Req) error { return nil }
func (d *overDriver) Close() error {
	if d.closed != nil {
		d.closed()
	}
	return nil
}

type nullSink struct{}

func (nullSink) Emit(events.Event) {}

func newTestGraph(t testing.TB) *Graph {
	t.Helper()
	g := New(nullSink{})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := g.Close(ctx); err != nil {
			t.Error("Close:", err)
		}
	})
	return g
}

// child is a child to attach to a new node.
type child struct {
	name string
	role perm.Role
	n    *Node
}

// add opens a node in three steps as blockdev does.
func add(t testing.TB, g *Graph, o Options, drv func(*Node) Driver, kids ...child) *Node {
	t.Helper()
	n, err := tryAdd(g, o, drv, kids...)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func tryAdd(g *Graph, o Options, drv func(*Node) Driver, kids ...child) (*Node, error) {
	tx := g.Begin(context.Background())
	defer tx.Abort()
	n, err := tx.NewNode(&o)
	if err != nil {
		return nil, err
	}
	for _, k := range kids {
		if _, err := tx.Attach(n, k.name, k.role, k.n); err != nil {
			return nil, err
		}
	}
	if err := tx.Commit(); err != nil {
		return nil, err
	}
	n.SetDriver(drv(n))
	tx = g.Begin(context.Background())
	defer tx.Abort()
	err = errors.Join(tx.Publish(n), tx.Own(n))
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		g.Discard(n)
		return nil, err
	}
	return n, nil
}

func mem(size int) func(*Node) Driver {
	return func(n *Node) Driver { return &memDriver{data: make([]byte, size), name: n.name} }
}

func memOf(d *memDriver) func(*Node) Driver { return func(*Node) Driver { return d } }

func over(n *Node) Driver { return &overDriver{n: n} }

func addMem(t testing.TB, g *Graph, name string) *Node {
	t.Helper()
	return add(t, g, Options{Name: name, DriverName: "mem", Kind: Protocol}, mem(4096))
}

func addFormat(t testing.TB, g *Graph, name string, file, backing *Node) *Node {
	t.Helper()
	kids := []child{{"file", perm.Image, file}}
	if backing != nil {
		kids = append(kids, child{"backing", perm.COW, backing})
	}
	return add(t, g, Options{Name: name, DriverName: "fmt", Kind: Format}, over, kids...)
}

func addRoot(t testing.TB, g *Graph, n *Node, c perm.Claim) *Root {
	t.Helper()
	r, err := tryRoot(g, n, c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func tryRoot(g *Graph, n *Node, c perm.Claim) (*Root, error) {
	tx := g.Begin(context.Background())
	defer tx.Abort()
	r, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: c, Kind: KindBackend}, n)
	if err != nil {
		return nil, err
	}
	return r, tx.Commit()
}

func wantErr(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || err.Error() != text {
		t.Errorf("got error %q, want %q", fmt.Sprint(err), text)
	}
}

func del(g *Graph, name string) error {
	tx := g.Begin(context.Background())
	defer tx.Abort()
	if err := tx.Delete(name); err != nil {
		return err
	}
	return tx.Commit()
}

func names(g *Graph) string {
	var s []string
	for _, n := range g.Nodes() {
		s = append(s, n.Name())
	}
	return strings.Join(s, " ")
}
