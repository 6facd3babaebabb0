package graph

import (
	"context"
	"testing"

	"qblockd/graph/perm"
)

// greedyFilter writes to its child and lets nobody else do so.
type greedyFilter struct{ *overDriver }

func (greedyFilter) EdgeClaim(string, perm.Role, perm.Claim, bool) perm.Claim {
	return perm.Claim{Need: perm.Write, Share: perm.All &^ perm.Write}
}

// A filter that needs a node for itself alone can be put between the node and a parent that does so
// too: the parent has moved by then.
func TestGreedyFilter(t *testing.T) {
	g := newTestGraph(t)
	n := addMem(t, g, "n")
	root := addRoot(t, g, n, perm.Claim{Need: perm.Write, Share: perm.All &^ perm.Write})
	tx := g.Begin(context.Background())
	defer tx.Abort()
	f, err := tx.NewNode(&Options{Name: "f", DriverName: "greedy", Kind: Filter})
	if err != nil {
		t.Fatal(err)
	}
	f.SetDriver(greedyFilter{&overDriver{n: f}})
	if _, err := tx.InsertFilter(f, "file", n); err != nil {
		t.Fatal(err)
	}
	tx.Publish(f)
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if root.Node() != f || len(n.Parents()) != 1 {
		t.Errorf("the parent is at %s, the node has %d parents", root.Node().Name(), len(n.Parents()))
	}
}

// Claims run down two ways to one node and are checked when both have arrived: a parent that moves
// its exclusive claim from one way to the other has no conflict with itself.
func TestExclusiveClaimChangesItsWay(t *testing.T) {
	g := newTestGraph(t)
	base := addMem(t, g, "base")
	pass := func(n *Node) Driver { return &overDriver{n: n} }
	a := add(t, g, Options{Name: "a", Kind: Filter}, pass, child{"file", perm.Filtered | perm.Primary, base})
	b := add(t, g, Options{Name: "b", Kind: Filter}, pass, child{"file", perm.Filtered | perm.Primary, base})
	root := addRoot(t, g, a, perm.Claim{Need: perm.Write, Share: perm.All &^ perm.Write})
	if _, err := tryRoot(g, b, perm.Claim{Need: perm.Write, Share: perm.All}); err == nil {
		t.Error("two ways to write to a node that one of them has for itself")
	}
	tx := g.Begin(context.Background())
	defer tx.Abort()
	if err := tx.Replace(root.Edge(), b); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if c := a.FilteredChild().Claim(); c.Need&perm.Write != 0 || c.Share != perm.All {
		t.Errorf("the way that was left still claims %v", c)
	}
	if c := b.FilteredChild().Claim(); c.Need&perm.Write == 0 || c.Share&perm.Write != 0 {
		t.Errorf("the new way claims %v", c)
	}
}
