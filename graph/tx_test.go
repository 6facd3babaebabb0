package graph

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// permerDriver is a raw-like driver: default claims, but no more writing than its parents need.
type permerDriver struct{ overDriver }

func (d *permerDriver) EdgeClaim(child string, r perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	c := perm.Default(r, up, !readOnly, false)
	const w = perm.Write | perm.Resize
	c.Need = c.Need&^w | up.Need&w
	return c
}

// TestClaims: what the edges of a chain carry as its top is used, made read-only and reopened.
func TestClaims(t *testing.T) {
	const cr, w, wu, rs = perm.ConsistentRead, perm.Write, perm.WriteUnchanged, perm.Resize
	g := newTestGraph(t)
	f, bf := addMem(t, g, "f"), addMem(t, g, "bf")
	b := add(t, g, Options{Name: "b", Kind: Format, ReadOnly: true}, over, child{"file", perm.Image, bf})
	top := addFormat(t, g, "top", f, b)
	check := func(e *Edge, need, share perm.Perm) {
		t.Helper()
		if e.Claim() != (perm.Claim{Need: need, Share: share}) {
			t.Errorf("'%s' of %s: need '%v' share '%v'", e.ChildName(), e.Parent().Describe(), e.Claim().Need, e.Claim().Share)
		}
	}
	check(top.File(), cr|w|rs, cr|wu)
	check(top.Backing(), 0, perm.All)
	check(b.File(), cr, cr|wu)
	r := addRoot(t, g, top, perm.Claim{Need: cr | w, Share: perm.All &^ rs})
	check(top.Backing(), cr, perm.All)

	tx := g.Begin(context.Background())
	defer tx.Abort()
	if err := tx.SetReadOnly(top, true); err != nil {
		t.Fatal(err)
	}
	wantErr(t, tx.Commit(), "Read-only block node 'top' cannot support read-write users")
	if top.ReadOnly() {
		t.Error("it became read-only")
	}
	tx = g.Begin(context.Background())
	defer tx.Abort()
	reads := perm.Claim{Need: cr, Share: cr}
	if err := errors.Join(tx.SetClaim(r.Edge(), reads), tx.SetReadOnly(top, true), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	check(top.File(), cr, cr)
	check(top.Backing(), cr, cr|wu)
	if _, err := tryRoot(g, top, perm.Claim{Need: w, Share: perm.All}); err == nil {
		t.Error("a writer on a read-only node")
	}

	// A driver's own rule, and force-share below it.
	shared := add(t, g, Options{Name: "shared", ForceShare: true, ReadOnly: true}, mem(10))
	raw := add(t, g, Options{Name: "raw", Kind: Format}, func(n *Node) Driver { return &permerDriver{overDriver{n: n}} },
		child{"file", perm.Data | perm.Primary, shared})
	check(raw.File(), 0, perm.All)
	_, err := tryRoot(g, raw, perm.Claim{Need: w, Share: perm.All})
	wantErr(t, err, "Block node is read-only")
	detachAll(t, g)
}

// TestBarWriters: who may write stays, nobody else comes, and readers are not concerned.
func TestBarWriters(t *testing.T) {
	g := newTestGraph(t)
	writeAll := perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All}
	n := addMem(t, g, "n")
	over := addFormat(t, g, "over", n, nil)
	writer := addRoot(t, g, over, writeAll)
	why := errors.New("it was to be read-only")
	try := func(f func(tx *Tx) error) error {
		tx := g.Begin(context.Background())
		defer tx.Abort()
		return errors.Join(f(tx), tx.Commit())
	}
	bar := func(tx *Tx) error { return tx.BarWriters(over, why) }
	wantErr(t, try(bar), why.Error())
	if err := errors.Join(g.CloseRoot(context.Background(), writer), try(bar)); err != nil {
		t.Fatal(err)
	}
	if over.ReadOnly() || n.Claim().Need&perm.Write == 0 {
		t.Error("what it has in memory cannot be written")
	}
	addRoot(t, g, over, readAll)
	_, err := tryRoot(g, over, writeAll)
	wantErr(t, err, why.Error())
	for _, ro := range []bool{true, false} {
		if err := try(func(tx *Tx) error { return tx.SetReadOnly(over, ro) }); err != nil {
			t.Error(err)
		}
	}
	addRoot(t, g, over, writeAll)
}

// TestSnapshotGroup: two overlays of one chain in one Tx; the second sees the first.
func TestSnapshotGroup(t *testing.T) {
	g := newTestGraph(t)
	base := addMem(t, g, "base")
	r := addRoot(t, g, base, readAll)
	o1, o2 := addFormat(t, g, "o1", addMem(t, g, "f1"), nil), addFormat(t, g, "o2", addMem(t, g, "f2"), nil)
	tx := g.Begin(context.Background())
	defer tx.Abort()
	if _, err := tx.InsertFilter(o1, "backing", base); err != nil {
		t.Fatal(err)
	}
	if tx.Target(r.Edge()) != o1 || r.Node() != base {
		t.Error("the Tx does not read its own writes, or others do")
	}
	addMem(t, g, "meanwhile") // the actions are replayed
	if _, err := tx.InsertFilter(o2, "backing", o1); err != nil {
		t.Fatal(err)
	}
	if e := tx.FilterOrCOWChild(o2); e == nil || tx.Target(e) != o1 {
		t.Error("wrong chain in the Tx")
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if r.Node() != o2 || Now.BackingChainNext(o2) != o1 || Now.BackingChainNext(o1) != base ||
		Now.BackingChainNext(base) != nil {
		t.Error("wrong chain")
	}
	detachAll(t, g)
}

func TestThaw(t *testing.T) {
	g := newTestGraph(t)
	base := addMem(t, g, "base")
	mid := addFormat(t, g, "mid", addMem(t, g, "f1"), base)
	top := addFormat(t, g, "top", addMem(t, g, "f2"), mid)
	unfreeze, err := g.FreezeChain(top, nil)
	if err != nil {
		t.Fatal(err)
	}
	tx := g.Begin(context.Background())
	if err := errors.Join(tx.Thaw(top, mid), tx.Replace(top.Backing(), base)); err != nil {
		t.Fatal(err)
	}
	wantErr(t, tx.Detach(mid.Backing()), "Cannot change frozen 'backing' link from 'mid' to 'base'")
	tx.Abort()
	if !top.Backing().Frozen() {
		t.Error("Abort thaws")
	}
	tx = g.Begin(context.Background())
	if err := errors.Join(tx.Thaw(top, nil), tx.Replace(top.Backing(), base), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	again, err := g.FreezeChain(top, nil)
	if err != nil {
		t.Fatal(err)
	}
	unfreeze() // must not end the other freeze
	if !top.Backing().Frozen() || mid.Backing().Frozen() {
		t.Error("wrong edges frozen")
	}
	again()
	if top.Backing().Frozen() {
		t.Error("still frozen")
	}
}

// TestReplaceSkips: edges that would close a cycle and roots that stay are left alone.
func TestReplaceSkips(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	top := addFormat(t, g, "top", addMem(t, g, "f"), n)
	user := addRoot(t, g, n, readAll)
	tx := g.Begin(context.Background())
	job, err := tx.AttachRoot(RootSpec{EdgeName: "main node", Claim: perm.Unused, StayAtNode: true, Kind: KindJob}, n)
	if err := errors.Join(err, tx.Commit()); err != nil {
		t.Fatal(err)
	}
	tx = g.Begin(context.Background())
	defer tx.Abort()
	if err := errors.Join(tx.ReplaceNode(n, top), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	if user.Node() != top || job.Node() != n || top.Backing().Node() != n {
		t.Error("wrong edges moved")
	}
	detachAll(t, g)
}

// TestStress: many clients build, replace, drain and delete at random on few nodes; in the end the
// books are even.
func TestStress(t *testing.T) {
	g := newTestGraph(t)
	var bases []*Node
	for _, name := range []string{"a", "b", "c"} {
		bases = append(bases, addMem(t, g, name))
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg, load sync.WaitGroup
	for _, b := range bases {
		r := addRoot(t, g, b, readAll)
		load.Go(func() {
			buf := make([]byte, 16)
			for ctx.Err() == nil {
				q, err := r.Begin(ctx)
				if err != nil {
					return
				}
				if err := r.ReadAt(q, blk.Buf(buf), 0, 0); err != nil {
					t.Error(err)
				}
				r.End(q)
			}
		})
	}
	for w := range 6 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			for range 60 {
				stressStep(t, g, rnd, bases)
			}
		})
	}
	wg.Wait()
	cancel()
	load.Wait()
	detachAll(t, g)
	// Nothing may be left but what the monitor owns or has parents.
	g.mu.Lock()
	all := slices.Collect(func(yield func(*Node) bool) {
		for _, h := range g.names {
			if !yield(h.node) {
				return
			}
		}
	})
	for _, n := range all {
		if n.pins != 0 || n.quiesce != 0 || n.state != nodePublished || !n.owned && n.parents.empty() {
			t.Errorf("%s: pins %d, quiesce %d, state %d", n.name, n.pins, n.quiesce, n.state)
		}
		if n.rare != nil && n.rare.drainer.drains != 0 {
			t.Errorf("%s is still held", n.name)
		}
	}
	if len(g.resv.queues) != 0 || len(g.pending) != 0 {
		t.Errorf("left: %d reservations, %d pending links", len(g.resv.queues), len(g.pending))
	}
	g.mu.Unlock()
}

// stressStep is one action of a client; refusals are part of the game.
func stressStep(t *testing.T, g *Graph, rnd *rand.Rand, bases []*Node) {
	ctx := context.Background()
	base := bases[rnd.IntN(len(bases))]
	switch rnd.IntN(6) {
	case 0, 1: // a filter between a base and all its users
		tx := g.Begin(ctx)
		defer tx.Abort()
		f, err := tx.NewNode(&Options{Kind: Filter})
		if err != nil {
			t.Error(err)
			return
		}
		f.SetDriver(over(f))
		if _, err = tx.InsertFilter(f, "file", base); err != nil {
			t.Error("insert:", err)
			return
		}
		if err := errors.Join(tx.Publish(f), tx.Own(f)); err != nil {
			t.Error("publish:", err)
			return
		}
		if err := tx.Commit(); err != nil {
			t.Error("commit:", err)
		}
	case 2, 3: // one off again
		nodes := g.Nodes()
		n := nodes[rnd.IntN(len(nodes))]
		if n.Kind() != Filter {
			return
		}
		tx := g.Begin(ctx)
		defer tx.Abort()
		if err := tx.RemoveFilter(n); err != nil {
			return
		}
		if err := tx.Delete(n.Name()); err != nil {
			return
		}
		_ = tx.Commit()
	case 4:
		undrain, err := g.Drain(ctx, base, bases[rnd.IntN(len(bases))])
		if err != nil {
			t.Error(err)
			return
		}
		g.Topology()
		undrain()
	case 5: // turn an edge of a filter to another node, cycles included
		nodes := g.Nodes()
		n, to := nodes[rnd.IntN(len(nodes))], nodes[rnd.IntN(len(nodes))]
		if e := n.File(); e != nil {
			tx := g.Begin(ctx)
			defer tx.Abort()
			if tx.Replace(e, to) == nil {
				_ = tx.Commit()
			}
		}
		if n.Kind() == Filter {
			_ = del(g, n.Name())
		}
	}
}

// TestBumpComesLast: whoever has seen that a node shows something new finds what that is.
func TestBumpComesLast(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	tx := g.Begin(context.Background())
	defer tx.Abort()
	if err := tx.SetReadOnly(n, true); err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	gen := n.InfoGeneration()
	for i, f := range tx.draft.prims {
		if f(&installer{g: g}); n.InfoGeneration() > gen && !n.ReadOnly() {
			t.Errorf("change %d of %d announces what is not there yet", i+1, len(tx.draft.prims))
		}
	}
	if n.InfoGeneration() == gen || !n.ReadOnly() || !n.Options().ReadOnly {
		t.Error("nothing has changed")
	}
}
