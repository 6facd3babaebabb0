package graph

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"qblockd/graph/perm"
)

// held takes a Hold of nodes found by name.
func held(t *testing.T, g *Graph, names ...string) *Hold {
	t.Helper()
	h, err := g.Hold(context.Background(), byName(g, names...))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

var errUnknown = errors.New("unknown node")

func byName(g *Graph, names ...string) func() ([]*Node, error) {
	return func() (l []*Node, _ error) {
		for _, name := range names {
			n := g.Node(name)
			if n == nil {
				return nil, errUnknown
			}
			l = append(l, n)
		}
		return l, nil
	}
}

// Who wants a node that is held waits, for the nodes below it that hold its data, too; others do
// not. What was found before the wait is looked for again after it. Waiting ends with the context.
func TestHold(t *testing.T) {
	g := newTestGraph(t)
	closed := false
	drv := func(n *Node) Driver { return &overDriver{n: n, closed: func() { closed = true }} }
	add(t, g, Options{Name: "disk"}, drv, child{"file", perm.Data | perm.Primary, addMem(t, g, "file")})
	addMem(t, g, "other")
	first := held(t, g, "disk")
	held(t, g, "other").Release()
	gaveUp := errors.New("gave up")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(gaveUp)
	for _, name := range []string{"disk", "file"} {
		if _, err := g.Hold(ctx, byName(g, name, "other")); err != gaveUp {
			t.Errorf("Hold of %s, which is held: %v", name, err)
		}
	}
	held(t, g, "other").Release() // nobody waits for the others while he waits for one

	looked := make(chan int, 2)
	got := make(chan error)
	go func() {
		n := 0
		h, err := g.Hold(context.Background(), func() ([]*Node, error) {
			n++
			looked <- n
			return byName(g, "disk")()
		})
		h.Release()
		got <- err
	}()
	<-looked
	tx := g.Begin(context.Background())
	tx.Delete("disk")
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if g.Node("disk") != nil || closed {
		t.Error("a held node that nobody refers to any more is closed, or can be found")
	}
	select {
	case err := <-got:
		t.Fatalf("Hold of a node that is held: %v", err)
	default:
	}
	first.Release()
	if !closed {
		t.Error("it is not closed after the Hold has ended")
	}
	if err := <-got; err != errUnknown && <-looked != 2 {
		t.Errorf("Hold of a node that has gone while it was waited for: %v", err)
	}
	first.Release() // does nothing
}

// A node that the holder's own transaction makes is held as soon as others can find it. One that
// came from elsewhere after the Hold is not found by Held.
func TestHoldOfNewNodes(t *testing.T) {
	g := newTestGraph(t)
	addMem(t, g, "a")
	h := held(t, g, "a")
	addMem(t, g, "late")
	tx := g.Begin(context.Background())
	tx.Under(h)
	if tx.Held("a") == nil || tx.Held("late") != nil || !tx.Missed() {
		t.Error("Held")
	}
	n, err := tx.NewNode(&Options{Name: "new"})
	if err != nil {
		t.Fatal(err)
	}
	n.SetDriver(mem(512)(n))
	tx.Own(n)
	tx.Publish(n)
	if tx.Held("new") != n {
		t.Error("the Tx does not find what it makes")
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := g.Hold(ctx, byName(g, "new")); !errors.Is(err, context.Canceled) {
		t.Errorf("the new node is held: %v", err)
	}
	h.Release()
	held(t, g, "new").Release()
}

// The end of the graph waits for who holds nodes, as long as its context lasts, and ends the wait
// of the others.
func TestHoldAtTheEnd(t *testing.T) {
	g := newTestGraph(t)
	addMem(t, g, "a")
	h := held(t, g, "a")
	waiting, waited := make(chan struct{}, 1), make(chan error)
	go func() {
		_, err := g.Hold(context.Background(), func() ([]*Node, error) {
			select {
			case waiting <- struct{}{}:
			default:
			}
			return byName(g, "a")()
		})
		waited <- err
	}()
	<-waiting
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	var c *CloseError
	if err := g.Close(ctx); !errors.As(err, &c) || len(c.Stuck) != 1 || c.Stuck[0] != "a" {
		t.Errorf("Close with a node held: %v", err)
	}
	if err := <-waited; err != errClosing {
		t.Errorf("waiting at the end: %v", err)
	}
	h.Release()
	if err := g.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// Dependents stop at nodes that the monitor owns: neither they nor what lies below them is closed.
func TestDependents(t *testing.T) {
	g := newTestGraph(t)
	drv := func(n *Node) Driver { return &overDriver{n: n} }
	disown := func(n *Node) *Node {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.setOwnedLocked(n, false)
		return n
	}
	image := func(name string, kids ...child) *Node {
		file := addMem(t, g, name+"-file")
		n := add(t, g, Options{Name: name}, drv, append(kids, child{"file", perm.Data | perm.Primary, file})...)
		disown(file)
		return n
	}
	base := image("base")
	middle := disown(image("middle", child{"backing", perm.COW, base}))
	top := image("top", child{"backing", perm.COW, middle})
	var names []string
	for _, n := range top.Dependents() {
		names = append(names, n.Name())
	}
	slices.Sort(names)
	if want := []string{"middle", "middle-file", "top", "top-file"}; !slices.Equal(names, want) {
		t.Errorf("closed with top: %v, want %v", names, want)
	}
	for _, n := range []*Node{middle, top.File().Node(), middle.File().Node(), base.File().Node()} {
		g.mu.Lock()
		g.setOwnedLocked(n, true)
		g.mu.Unlock()
	}
}
