package graph

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"qblockd/graph/perm"
)

func TestNames(t *testing.T) {
	g := newTestGraph(t)
	addMem(t, g, "a")
	if err := g.ReserveName("dev", "device id"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"a":                                "Duplicate nodes with node-name='a'",
		"dev":                              "node-name=dev is conflicting with a device id",
		"1a":                               "Invalid node-name: '1a'",
		"a b":                              "Invalid node-name: 'a b'",
		"a23456789012345678901234567890xy": "Node name too long",
	} {
		_, err := tryAdd(g, Options{Name: name}, mem(1))
		wantErr(t, err, want)
	}
	wantErr(t, g.ReserveName("a", "device id"), "Device name 'a' conflicts with an existing node name")
	g.ReleaseName("dev")
	addMem(t, g, "dev")
	n := addMem(t, g, "")
	if len(n.Name()) != len("#block000") || !strings.HasPrefix(n.Name(), "#block") || g.Node(n.Name()) != n {
		t.Errorf("generated name %q", n.Name())
	}
	addMem(t, g, "a234567890123456789012345678901")

	// A failed Tx gives the name back.
	tx := g.Begin(context.Background())
	if _, err := tx.NewNode(&Options{Name: "b"}); err != nil {
		t.Fatal(err)
	}
	if g.Node("b") != nil {
		t.Error("hidden node found")
	}
	_, err := tryAdd(g, Options{Name: "b"}, mem(1))
	wantErr(t, err, "Duplicate nodes with node-name='b'")
	tx.Abort()
	addMem(t, g, "b")
}

func TestDeleteRules(t *testing.T) {
	g := newTestGraph(t)
	base := addMem(t, g, "base")
	top := add(t, g, Options{Name: "top", Kind: Format}, over, child{"file", perm.Filtered | perm.Primary, base})
	wantErr(t, del(g, "base"), "Block device base is in use")
	wantErr(t, del(g, "none"), "Failed to find node with node-name='none'")
	r := addRoot(t, g, top, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
	wantErr(t, del(g, "top"), "Node top is in use")
	if err := g.CloseRoot(context.Background(), r); err != nil {
		t.Fatal(err)
	}
	unblock := top.Block(AllOps&^OpStream, errors.New("block device is in use by block job: stream"))
	wantErr(t, del(g, "top"), "Node 'top' is busy: block device is in use by block job: stream")
	if top.Blocked(OpStream) != nil {
		t.Error("stream is blocked")
	}
	unblock()
	unblock()
	file := addMem(t, g, "file")
	ovl := addFormat(t, g, "ovl", file, top)
	wantErr(t, del(g, "top"), "Node 'top' is busy: node is used as backing hd of 'ovl'")
	if top.Blocked(OpCommitTarget) != nil || top.Blocked(OpResize) == nil {
		t.Error("wrong operations blocked by an overlay")
	}
	if got, want := names(g), "ovl file top base"; got != want {
		t.Errorf("nodes %q, want %q", got, want)
	}
	if ovl.Backing().Node() != top || Now.BackingChainNext(ovl) != top || ovl.File().Node() != file {
		t.Error("wrong children")
	}
	for _, name := range []string{"ovl", "top", "base", "file"} {
		if err := del(g, name); err != nil {
			t.Error(err)
		}
	}
	if names(g) != "" || len(g.names) != 0 {
		t.Errorf("left: %q", names(g))
	}
}

// TestImplicitChildren: children made for a node go with it, innermost last, and cannot be deleted
// alone.
func TestImplicitChildren(t *testing.T) {
	g := newTestGraph(t)
	var order []string
	tx := g.Begin(context.Background())
	file, err := tx.NewNode(&Options{Name: "inner"})
	if err != nil {
		t.Fatal(err)
	}
	file.SetDriver(&memDriver{data: make([]byte, 10), name: "inner", order: &order})
	n, err := tx.NewNode(&Options{Name: "outer", Kind: Format})
	if err != nil {
		t.Fatal(err)
	}
	n.SetDriver(&overDriver{n: n, closed: func() { order = append(order, "outer") }})
	if _, err := tx.Attach(n, "file", perm.Image, file); err != nil {
		t.Fatal(err)
	}
	if tx.Child(n, "file") == nil || n.File() != nil {
		t.Error("the Tx does not read its own writes, or others do")
	}
	if err := errors.Join(tx.Publish(n), tx.Own(n), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	wantErr(t, del(g, "inner"), "Node inner is not owned by the monitor")
	if names(g) != "outer inner" {
		t.Errorf("nodes %q", names(g))
	}
	if err := del(g, "outer"); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(order, " "); got != "outer inner" {
		t.Errorf("closed in order %q", got)
	}
}

func TestConflictLeavesGraphUntouched(t *testing.T) {
	g := newTestGraph(t)
	d := &memDriver{data: make([]byte, 10)}
	f := add(t, g, Options{Name: "f"}, memOf(d))
	addFormat(t, g, "q1", f, nil)
	before := g.Topology()
	perms := len(d.perms)
	_, err := tryAdd(g, Options{Name: "q2", Kind: Format}, over, child{"file", perm.Image, f})
	wantErr(t, err, "Permission conflict on node 'f': permissions 'write, resize' are both required by node 'q1' (uses node 'f' as 'file' child) and unshared by node 'q2' (uses node 'f' as 'file' child).")
	_, err = tryRoot(g, f, perm.Claim{Need: perm.Write, Share: perm.All})
	wantErr(t, err, "Permission conflict on node 'f': permissions 'write' are both required by an unnamed block device (uses node 'f' as 'root' child) and unshared by node 'q1' (uses node 'f' as 'file' child).")
	after := g.Topology()
	if len(after.Nodes) != len(before.Nodes) || len(after.Edges) != len(before.Edges) ||
		len(after.Roots) != 0 || len(d.perms) != perms {
		t.Errorf("the graph changed: %v -> %v", before, after)
	}
	if g.Node("q2") != nil || len(g.names) != 2 {
		t.Error("the name is still taken")
	}
	addMem(t, g, "q2")
}

func TestPrepareFailureUndoes(t *testing.T) {
	g := newTestGraph(t)
	a, b := &memDriver{data: make([]byte, 10)}, &memDriver{data: make([]byte, 10)}
	na := add(t, g, Options{Name: "a"}, memOf(a))
	nb := add(t, g, Options{Name: "b"}, memOf(b))
	b.onPerm = func(context.Context, perm.Claim) error { return errors.New(`Failed to get "write" lock`) }
	tx := g.Begin(context.Background())
	claim := perm.Claim{Need: perm.Write, Share: perm.ConsistentRead}
	ra, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: claim}, na)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: claim}, nb); err != nil {
		t.Fatal(err)
	}
	p := &participant{}
	tx.JoinFirst(p)
	wantErr(t, tx.Commit(), `Failed to get "write" lock`)
	if !p.aborted || p.committed {
		t.Error("the participant was not aborted")
	}
	if n := len(a.perms); n > 0 && a.perms[n-1] != "abort" {
		t.Errorf("a's driver saw %v", a.perms)
	}
	if na.Claim() != perm.Unused || ra.TryBegin() != nil || len(g.Roots()) != 0 {
		t.Error("something was installed")
	}
	b.onPerm = nil

	// The recorder is the last that may fail.
	tx = g.Begin(context.Background())
	job := NewRecord(Key{Kind: StateJob, Name: "j"}, "its arguments")
	if _, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: claim, StayAtNode: true, Of: job}, nb); err != nil {
		t.Fatal(err)
	}
	g.SetRecorder(func(l []Change) error { return fmt.Errorf("no room for %v", l) })
	wantErr(t, tx.Commit(), "no room for [{job j its arguments}]")
	g.SetRecorder(nil)
	if got := strings.Join(b.perms, " "); got != "prepare abort" {
		t.Errorf("b's driver saw %q", got)
	}
	wantErr(t, tx.Commit(), errTxOver.Error())
}

// A command whose client goes while rights are given up is undone: nothing stays locked that nobody
// claims.
func TestLoweringForNobody(t *testing.T) {
	g := newTestGraph(t)
	d := &memDriver{data: make([]byte, 10)}
	n := add(t, g, Options{Name: "n"}, memOf(d))
	tx := g.Begin(context.Background())
	root, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: perm.Claim{Need: perm.Write, Share: perm.All}}, n)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	claimed := n.Claim()
	ctx, cancel := context.WithCancel(context.Background())
	d.onPerm = func(ctx context.Context, _ perm.Claim) error { cancel(); return ctx.Err() }
	if err := g.CloseRoot(ctx, root); !errors.Is(err, context.Canceled) {
		t.Errorf("for a client that has gone: %v", err)
	}
	if n.Claim() != claimed || len(g.Roots()) != 1 {
		t.Errorf("claim %v of %v, %d roots", n.Claim(), claimed, len(g.Roots()))
	}
	// What cannot be given up for another reason is not kept in the graph.
	d.onPerm = func(context.Context, perm.Claim) error { return errors.New("Failed to unlock byte 100") }
	if err := g.CloseRoot(context.Background(), root); err != nil {
		t.Error(err)
	}
}

type participant struct{ prepared, committed, aborted bool }

func (p *participant) Prepare(context.Context) error { p.prepared = true; return nil }
func (p *participant) Commit()                       { p.committed = true }
func (p *participant) Abort()                        { p.aborted = true }

// TestStuckPrepare: a Tx that hangs in a lock holds up those on the same node, and nobody else.
func TestStuckPrepare(t *testing.T) {
	g := newTestGraph(t)
	stuck := &memDriver{data: make([]byte, 10)}
	entered, release := make(chan struct{}), make(chan struct{})
	stuck.onPerm = func(ctx context.Context, c perm.Claim) error {
		if c.Need&perm.Write == 0 {
			return nil
		}
		close(entered)
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	n := add(t, g, Options{Name: "stuck"}, memOf(stuck))
	addMem(t, g, "other")
	first := make(chan error, 1)
	go func() {
		_, err := tryRoot(g, n, perm.Claim{Need: perm.Write, Share: perm.All})
		first <- err
	}()
	<-entered
	// Others work.
	addMem(t, g, "third")
	if err := del(g, "other"); err != nil {
		t.Fatal(err)
	}
	if names(g) != "third stuck" || n.Claim() != perm.Unused {
		t.Errorf("nodes %q", names(g))
	}
	// The same node has to wait, as long as the context lasts.
	ctx, cancel := context.WithCancel(context.Background())
	second := make(chan error, 1)
	go func() {
		tx := g.Begin(ctx)
		defer tx.Abort()
		if _, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: perm.Unused}, n); err != nil {
			second <- err
			return
		}
		second <- tx.Commit()
	}()
	for !g.waitersFor(n) {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Errorf("second: %v", err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if n.Claim().Need != perm.Write {
		t.Error("the first was not installed")
	}
	detachAll(t, g)
}

// waitersFor tells whether somebody waits for n's reservation.
func (g *Graph) waitersFor(n *Node) bool {
	g.resv.mu.Lock()
	defer g.resv.mu.Unlock()
	return len(g.resv.queues[n]) > 1
}

func detachAll(t *testing.T, g *Graph) {
	t.Helper()
	for _, r := range g.Roots() {
		if err := g.CloseRoot(context.Background(), r); err != nil {
			t.Error(err)
		}
	}
}

func TestCycle(t *testing.T) {
	g := newTestGraph(t)
	f1, f2 := addMem(t, g, "f1"), addMem(t, g, "f2")
	a := addFormat(t, g, "a", f1, nil)
	b := addFormat(t, g, "b", f2, a)
	tx := g.Begin(context.Background())
	defer tx.Abort()
	_, err := tx.Attach(a, "backing", perm.COW, b)
	wantErr(t, err, "Making 'b' a backing child of 'a' would create a cycle")
	wantErr(t, tx.Commit(), "Making 'b' a backing child of 'a' would create a cycle")
	tx = g.Begin(context.Background())
	wantErr(t, tx.Replace(a.File(), b), "Making 'b' a file child of 'a' would create a cycle")
	tx.Abort()
	tx = g.Begin(context.Background())
	defer tx.Abort()
	if err := tx.Detach(b.Backing()); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Attach(a, "backing", perm.COW, b); err != nil {
		t.Fatal("after the detach in the same Tx:", err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if a.Backing() == nil || a.Backing().Node() != b || b.Backing() != nil {
		t.Error("not turned round")
	}
}

// TestCycleTogether: two transactions on disjoint nodes that would close a cycle together.
func TestCycleTogether(t *testing.T) {
	g := newTestGraph(t)
	mk := func(name string, below *Node) *Node {
		return addFormat(t, g, name, addMem(t, g, name+"f"), below)
	}
	// a1 -> a2 and b1 -> b2 exist; one wants a2 -> b1, the other b2 -> a1.
	a2 := mk("a2", nil)
	a1 := mk("a1", a2)
	b2 := mk("b2", nil)
	b1 := mk("b1", b2)
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	g.SetRecorder(func([]Change) error { once.Do(func() { close(entered); <-release }); return nil })
	first := make(chan error, 1)
	go func() {
		tx := g.Begin(context.Background())
		defer tx.Abort()
		if _, err := tx.Attach(a2, "backing", perm.COW, b1); err != nil {
			first <- err
			return
		}
		first <- tx.Commit()
	}()
	<-entered
	second := make(chan error, 1)
	go func() {
		tx := g.Begin(context.Background())
		defer tx.Abort()
		if _, err := tx.Attach(b2, "backing", perm.COW, a1); err != nil {
			second <- err
			return
		}
		second <- tx.Commit()
	}()
	for {
		g.mu.RLock()
		waits := g.pendingLess.c != nil
		g.mu.RUnlock()
		if waits {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	wantErr(t, <-second, "Making 'a1' a backing child of 'b2' would create a cycle")
}
