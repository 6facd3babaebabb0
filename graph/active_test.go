package graph

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// activeChain is disk -> file and disk -> base -> basefile.
func activeChain(t *testing.T) (g *Graph, disk, base *Node, files map[string]*memDriver) {
	g = newTestGraph(t)
	files = map[string]*memDriver{"file": {data: make([]byte, 4096)}, "basefile": {data: make([]byte, 4096)}}
	n := map[string]*Node{}
	for name, d := range files {
		n[name] = add(t, g, Options{Name: name}, memOf(d))
	}
	base = addFormat(t, g, "base", n["basefile"], nil)
	return g, addFormat(t, g, "disk", n["file"], base), base, files
}

func activity(g *Graph) string {
	s := ""
	for _, name := range []string{"disk", "file", "base", "basefile"} {
		if g.Node(name).Inactive() {
			s += name + " "
		}
	}
	return s
}

func tryWrite(t *testing.T, r *Root) error {
	t.Helper()
	q, err := r.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer r.End(q)
	return r.WriteAt(q, blk.Buf(make([]byte, 512)), 0, 0)
}

func TestInactiveChain(t *testing.T) {
	g, disk, base, _ := activeChain(t)
	ctx := context.Background()
	var root *Root
	err := g.Do(ctx, func(tx *Tx) (err error) {
		root, err = tx.AttachRoot(RootSpec{EdgeName: "root", AllowInactive: true,
			Claim: perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All}}, disk)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := Deactivate(ctx, disk); err != nil || activity(g) != "disk file base basefile " {
		t.Fatal(err, activity(g))
	}
	for _, name := range []string{"file", "basefile"} {
		if c := g.Node(name).Claim(); c.Need&perm.Changes != 0 || c.Share&perm.Write == 0 {
			t.Errorf("%s is claimed: %v", name, c)
		}
	}
	if err := tryWrite(t, root); !errors.Is(err, syscall.EPERM) {
		t.Errorf("a write to an inactive node: %v", err)
	}
	// What it will want later counts later.
	err = g.Do(ctx, func(tx *Tx) error {
		return tx.SetClaim(root.Edge(), perm.Claim{Need: perm.Write, Share: perm.All &^ perm.Resize})
	})
	if err != nil || root.Edge().Claim() != perm.Unused {
		t.Fatal(err, root.Edge().Claim())
	}
	_, err = tryAdd(g, Options{Name: "top"}, over, child{"file", perm.Image, disk})
	wantErr(t, err, "Inactive 'disk' can't be a file child of active 'top'")
	_, err = tryRoot(g, disk, perm.Claim{Need: perm.Write | perm.Resize, Share: perm.All})
	wantErr(t, err, "Permission 'write, resize' unavailable on inactive node")

	if err := Activate(ctx, base); err != nil || activity(g) != "disk file " {
		t.Fatal(err, activity(g))
	}
	if err := Activate(ctx, disk); err != nil || activity(g) != "" {
		t.Fatal(err, activity(g))
	}
	if c := root.Edge().Claim(); c != (perm.Claim{Need: perm.Write, Share: perm.All &^ perm.Resize}) {
		t.Errorf("the root claims %v", c)
	}
	if err := tryWrite(t, root); err != nil {
		t.Error(err)
	}
	wantErr(t, Deactivate(ctx, base), "Node has active parent node")
	if err := g.CloseRoot(ctx, root); err != nil {
		t.Fatal(err)
	}
}

// A change that fails half-way is undone.
func TestInactiveChainFails(t *testing.T) {
	g, disk, base, files := activeChain(t)
	ctx := context.Background()
	writer := addRoot(t, g, base, perm.Claim{Need: perm.Write, Share: perm.All})
	wantErr(t, Deactivate(ctx, disk), "Failed to inactivate node: Operation not permitted")
	if s := activity(g); s != "" {
		t.Errorf("inactive after a failure: %s", s)
	}
	if err := g.CloseRoot(ctx, writer); err != nil {
		t.Fatal(err)
	}
	var job *Root
	err := g.Do(ctx, func(tx *Tx) (err error) {
		job, err = tx.AttachRoot(RootSpec{EdgeName: "main node", Claim: perm.Unused, Job: true}, base)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, Deactivate(ctx, disk), "Failed to inactivate node: Operation not permitted")
	if err := errors.Join(g.CloseRoot(ctx, job), Deactivate(ctx, disk)); err != nil {
		t.Fatal(err)
	}

	// Somebody else has the lock of the topmost file.
	files["file"].onPerm = func(_ context.Context, c perm.Claim) error {
		if c.Need&perm.Write != 0 {
			return errors.New("locked")
		}
		return nil
	}
	wantErr(t, Activate(ctx, disk), "locked")
	if s := activity(g); s != "disk file base basefile " {
		t.Errorf("inactive after a failure: %s", s)
	}
	files["file"].onPerm = nil
	if err := Activate(ctx, disk); err != nil || activity(g) != "" {
		t.Fatal(err, activity(g))
	}
}

// rereader counts how often it reads everything again.
type rereader struct {
	memDriver
	read int
}

func (d *rereader) Activate(*blk.Req) error { d.read++; return nil }

// What is active below an inactive node is read again with it, unless it is in use here.
func TestActiveBelowInactive(t *testing.T) {
	g := newTestGraph(t)
	ctx := context.Background()
	d := &rereader{memDriver: memDriver{data: make([]byte, 4096)}}
	file := add(t, g, Options{Name: "file"}, func(*Node) Driver { return d })
	disk := addFormat(t, g, "disk", file, nil)
	activateFile := func() {
		t.Helper()
		if err := errors.Join(Deactivate(ctx, disk), Activate(ctx, file)); err != nil {
			t.Fatal(err)
		}
		d.read = 0
	}

	activateFile()
	if err := Activate(ctx, file); err != nil || d.read != 0 {
		t.Errorf("an active node is read again: %v", err)
	}
	if err := Activate(ctx, disk); err != nil || d.read != 1 || file.Inactive() || disk.Inactive() {
		t.Errorf("read %d times, want once: %v", d.read, err)
	}

	activateFile()
	var job *Root
	err := g.Do(ctx, func(tx *Tx) (err error) {
		job, err = tx.AttachRoot(RootSpec{EdgeName: "main node", Claim: perm.Unused, Job: true}, file)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := Activate(ctx, disk); err != nil || d.read != 0 || disk.Inactive() {
		t.Errorf("read %d times while a job uses it: %v", d.read, err)
	}
	if err := g.CloseRoot(ctx, job); err != nil {
		t.Fatal(err)
	}

	// It stays active if the node above fails to come back.
	activateFile()
	d.onPerm = func(_ context.Context, c perm.Claim) error {
		if c.Need&perm.Write != 0 {
			return errors.New("locked")
		}
		return nil
	}
	wantErr(t, Activate(ctx, disk), "locked")
	if file.Inactive() || !disk.Inactive() {
		t.Error("not as it was after a failure")
	}
}
