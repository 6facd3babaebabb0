package file_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/protocol/file"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// node makes a node of driver file.
func node(t *testing.T, g *graph.Graph, name, path string, change func(*graph.Options)) *graph.Node {
	t.Helper()
	o := graph.Options{Name: name, DriverName: "file", Kind: graph.Protocol}
	if change != nil {
		change(&o)
	}
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options: o, Open: file.Def.With(&types.BlockdevOptionsFile{Filename: path}),
	})
}

// attach attaches a root for as long as the returned function is not called.
func attach(g *graph.Graph, n *graph.Node, c perm.Claim) (*graph.Root, func() error, error) {
	ctx := context.Background()
	tx := g.Begin(ctx)
	defer tx.Abort()
	r, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: c}, n)
	if err == nil {
		err = tx.Commit()
	}
	return r, func() error { return g.CloseRoot(ctx, r) }, err
}

// alone is the claim of a writer who shares reading only.
var alone = perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.ConsistentRead}

// mustAttach is attach that ends the test on error.
func mustAttach(t *testing.T, g *graph.Graph, n *graph.Node, c perm.Claim) (*graph.Root, func() error) {
	t.Helper()
	r, closeRoot, err := attach(g, n, c)
	if err != nil {
		t.Fatal(err)
	}
	return r, closeRoot
}

// mustRefuse: another writer is refused.
func mustRefuse(t *testing.T, g *graph.Graph, n *graph.Node) {
	t.Helper()
	_, _, err := attach(g, n, drivertest.Writer)
	if err == nil || err.Error() != `Failed to get "write" lock` {
		t.Errorf("another writer: %v", err)
	}
}

// Two nodes of one file: the one who writes alone keeps the other from writing, not from reading,
// and hands that over when it is gone.
func TestInTheGraph(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "image")
	o := &types.BlockdevCreateOptionsFile{Filename: path, Size: 1 << 20}
	if err := file.Create(ctx, o, nil); err != nil {
		t.Fatal(err)
	}
	g := drivertest.NewGraph(t)
	a := node(t, g, "a", path, nil)
	b := node(t, g, "b", path, func(o *graph.Options) { o.AutoReadOnly = true })

	r, closeA := mustAttach(t, g, a, alone)
	mustRefuse(t, g, b)
	if _, closeB, err := attach(g, b, drivertest.Reader); err != nil {
		t.Errorf("reader: %v", err)
	} else if err := closeB(); err != nil {
		t.Error(err)
	}
	want := bytes.Repeat([]byte{7}, 3000)
	useAll(t, r, want)
	if err := r.Resize(ctx, 2<<20, true, blk.PreallocOff); err != nil || a.Size() != 2<<20 {
		t.Errorf("resize: %v", err)
	}
	if err := closeA(); err != nil {
		t.Fatal(err)
	}

	// The locks went with the root: the other node may write now, and only now opens for it.
	w, closeB := mustAttach(t, g, b, alone)
	mustRefuse(t, g, a)
	q, err := w.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteAt(q, blk.Buf(want), 0, 0); err != nil {
		t.Errorf("auto-read-only: %v", err)
	}
	w.End(q)
	if err := closeB(); err != nil {
		t.Error(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(raw[:2000], want[:2000]) || raw[2050] != 7 || raw[3500] != 7 || raw[4001] != 0 {
		t.Errorf("the file is wrong: %v", err)
	}
}

// useAll writes p to 1001, reads it, zeroes a part of it and asks for the status.
func useAll(t *testing.T, r *graph.Root, p []byte) {
	t.Helper()
	q, err := r.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer r.End(q)
	if err := r.WriteAt(q, blk.Buf(p), 1001, blk.FUA); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(p))
	if err := r.ReadAt(q, blk.Buf(got), 1001, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("read back: %v", err)
	}
	if err := r.Zero(q, 2000, 100, blk.MayUnmap); err != nil {
		t.Error(err)
	}
	if e, err := r.Status(q, 512<<10, 512<<10); err != nil || !e.Zero {
		t.Errorf("status: %+v, %v", e, err)
	}
}

func TestRefusedOptions(t *testing.T) {
	g := drivertest.NewGraph(t)
	native := types.BlockdevAioOptionsNative
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, o := range map[string]*types.BlockdevOptionsFile{
		"The 'file' block driver requires a file name":                                        {},
		"aio=native was specified, but it requires cache.direct=on, which was not specified.": {Filename: path, Aio: &native},
		"Could not open '" + path + ".none': No such file or directory":                       {Filename: path + ".none"},
	} {
		err := file.Def.Check(o)
		if err == nil {
			_, err = drivertest.Build(g, drivertest.Spec{
				Options: graph.Options{Name: "n", DriverName: "file", Kind: graph.Protocol}, Open: file.Def.With(o),
			})
		}
		if err == nil || err.Error() != want {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}
