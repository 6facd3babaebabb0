package graph

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"qblockd/graph/perm"
)

// dump is the graph as text: nodes with their states, edges with claims.
func dump(g *Graph) string {
	var b strings.Builder
	t := g.Topology()
	for _, n := range t.Nodes {
		n.g.mu.RLock()
		fmt.Fprintf(&b, "%s ro=%v owned=%v quiesce=%d applied=%v\n", n.name, n.ReadOnly(), n.owned, n.quiesce, n.applied)
		n.g.mu.RUnlock()
	}
	for _, e := range t.Edges {
		fmt.Fprintf(&b, "%s -%s-> %s %v frozen=%v\n",
			e.Edge.Parent().Describe(), e.Edge.ChildName(), e.Node.name, e.Claim, e.Edge.Frozen())
	}
	g.mu.RLock()
	fmt.Fprintf(&b, "%d names, %d pending, %d reserved\n", len(g.names), len(g.pending), len(g.resv.queues))
	g.mu.RUnlock()
	return b.String()
}

// faults fails the n-th of the steps that ask it.
type faults struct {
	at, seen int
	step     string
}

var errInjected = errors.New("injected")

func (f *faults) next(step string) error {
	f.seen++
	if f.seen == f.at {
		f.step = step
		return errInjected
	}
	return nil
}

type faultyParticipant struct {
	participant
	f    *faults
	name string
}

func (p *faultyParticipant) Prepare(context.Context) error {
	p.prepared = true
	return p.f.next(p.name)
}

// TestIthFailure fails every step of a rich Tx that can fail, one after the other: each time the
// error surfaces and the graph is as before, until the Tx passes.
func TestIthFailure(t *testing.T) {
	g := newTestGraph(t)
	var f *faults
	drv := func(n *Node) Driver {
		return &memDriver{data: make([]byte, 512), onPerm: func(context.Context, perm.Claim) error {
			if f == nil {
				return nil
			}
			return f.next("perm " + n.name)
		}}
	}
	a := add(t, g, Options{Name: "a"}, drv)
	b := add(t, g, Options{Name: "b"}, drv)
	c := add(t, g, Options{Name: "c"}, drv)
	fa := addFormat(t, g, "fa", a, nil)
	ov := addFormat(t, g, "ov", b, nil)
	r := addRoot(t, g, fa, readAll)
	before := dump(g)
	g.SetRecorder(func([]Change) error { return f.next("record") })
	for at := 1; ; at++ {
		f = &faults{at: at}
		p1, p2 := &faultyParticipant{f: f, name: "first"}, &faultyParticipant{f: f, name: "last"}
		err := manyChanges(g, f, r, ov, fa, c, p1, p2)
		if err == nil {
			if f.seen < 6 {
				t.Errorf("only %d steps can fail", f.seen)
			}
			break
		}
		if !errors.Is(err, errInjected) {
			t.Fatalf("step %d: %v", at, err)
		}
		if after := dump(g); after != before {
			t.Fatalf("step %d (%s) failed and changed\n%s\ninto\n%s", at, f.step, before, after)
		}
		for _, p := range []*faultyParticipant{p1, p2} {
			if p.committed || p.prepared != p.aborted {
				t.Errorf("step %d (%s): participant %s: %+v", at, f.step, p.name, p.participant)
			}
		}
	}
	f = nil
	g.SetRecorder(nil)
	if r.Node() != ov || Now.BackingChainNext(ov) != fa || !fa.ReadOnly() || g.Node("new") == nil {
		t.Errorf("not installed:\n%s", dump(g))
	}
	detachAll(t, g)
}

// manyChanges is a transaction that changes a bit of everything: above c, between ov and fa, at r.
func manyChanges(g *Graph, f *faults, r *Root, ov, fa, c *Node, p1, p2 Participant) error {
	tx := g.Begin(context.Background())
	defer tx.Abort()
	n, err := tx.NewNode(&Options{Name: "new", Kind: Filter})
	if err != nil {
		return err
	}
	n.SetDriver(over(n))
	if _, err := tx.Attach(n, "file", perm.Filtered|perm.Primary, c); err != nil {
		return err
	}
	if _, err := tx.InsertFilter(ov, "backing", fa); err != nil {
		return err
	}
	w := perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.ConsistentRead}
	if err := tx.SetClaim(r.Edge(), w); err != nil {
		return err
	}
	if _, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: w}, n); err != nil {
		return err
	}
	if err := errors.Join(tx.Publish(n), tx.Own(n), tx.SetReadOnly(fa, true)); err != nil {
		return err
	}
	if _, err := tx.FreezeChain(ov, nil); err != nil {
		return err
	}
	tx.Check(func() error { return f.next("check") })
	tx.JoinFirst(p1)
	tx.Join(p2)
	return tx.Commit()
}

// TestCloseOrder: parents are closed before their children; a node that hangs in Close is reported
// and what is below it is flushed all the same.
func TestCloseOrder(t *testing.T) {
	g := New(nullSink{})
	var order []string
	mk := func(name string, d *memDriver, kids ...child) *Node {
		d.name, d.order, d.data = name, &order, make([]byte, 512)
		return add(t, g, Options{Name: name, Kind: Filter}, memOf(d), kids...)
	}
	file := mk("file", &memDriver{})
	mid := mk("mid", &memDriver{}, child{"file", perm.Filtered | perm.Primary, file})
	mk("top", &memDriver{}, child{"file", perm.Filtered | perm.Primary, mid})
	hung := make(chan struct{})
	defer close(hung)
	below := mk("below", &memDriver{})
	add(t, g, Options{Name: "hangs", Kind: Filter}, func(n *Node) Driver {
		return &overDriver{n: n, closed: func() { <-hung }}
	}, child{"file", perm.Filtered | perm.Primary, below})
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	err := g.Close(ctx)
	var ce *CloseError
	if !errors.As(err, &ce) || !strings.Contains(err.Error(), "hangs") || strings.Contains(err.Error(), "mid") {
		t.Errorf("Close: %v", err)
	}
	if got := strings.Join(order, " "); got != "top mid file" {
		t.Errorf("closed in order %q", got)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("Close took %v", d)
	}
	if _, err := tryAdd(g, Options{Name: "late"}, mem(1)); err == nil {
		t.Error("a node was added after Close")
	}
}
