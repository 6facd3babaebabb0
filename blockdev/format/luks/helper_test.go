package luks

import (
	"context"
	"testing"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// secret is an object secret.
type secret string

func (s secret) Secret() (*crypto.Key, bool, error) {
	k, err := crypto.CopyKey([]byte(s))
	return k, true, err
}

// objects are those of a test: secrets, and what is none.
type objects map[string]any

// Object implements driver.Objects.
func (o objects) Object(id string) any { return o[id] }

var known = objects{"one": secret("one"), "two": secret("two"), "other": 7, "binary": secret("\xff"), "nul": secret("a\x00b")}

func ptr[T any](x T) *T { return &x }

// options are those of an image that is made in no time.
func options(size int64) *types.BlockdevCreateOptionsLUKS {
	return &types.BlockdevCreateOptionsLUKS{KeySecret: ptr("one"), IterTime: ptr(int64(0)), Size: uint64(size)}
}

// claims of a root that does anything.
var anything = perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.All}

// make makes an image in a file.
func makeIn(t testing.TB, file graph.Driver, o *types.BlockdevCreateOptionsLUKS) error {
	t.Helper()
	g := graph.New(&drivertest.Sink{})
	defer g.Close(context.Background())
	n := drivertest.AddNode(t, g, "file", file)
	tx := g.Begin(context.Background())
	defer tx.Abort()
	root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: anything}, n)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer g.CloseRoot(context.Background(), root)
	return create(context.Background(), &driver.Creation{Objects: known, Started: func() {}}, root, root, o)
}

// newImage makes an image in memory.
func newImage(t testing.TB, o *types.BlockdevCreateOptionsLUKS) *drivertest.MemFile {
	t.Helper()
	m := drivertest.NewMemFile(0)
	if err := makeIn(t, m, o); err != nil {
		t.Fatal(err)
	}
	return m
}

// openIn opens an image in a graph.
func openIn(t testing.TB, g *graph.Graph, file graph.Driver, key *string, readOnly bool) (*graph.Node, error) {
	t.Helper()
	f := drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "file", Kind: graph.Protocol, ReadOnly: readOnly}, Open: drivertest.Opened(file)})
	u := &types.BlockdevOptionsLUKS{KeySecret: key}
	return drivertest.Build(g, drivertest.Spec{
		Options:  graph.Options{Name: "disk", DriverName: "luks", Kind: graph.Format, ReadOnly: readOnly},
		Children: []drivertest.Child{{Name: "file", Role: role, Node: f}},
		Open: func(x *driver.Opening) (graph.Driver, error) {
			x.Objects = known
			return Def.Open(x, u)
		},
	})
}

// rooted opens an image and begins a unit of work.
func rooted(t testing.TB, file graph.Driver) (*graph.Root, *blk.Req) {
	t.Helper()
	g := drivertest.NewGraph(t)
	n, err := openIn(t, g, file, ptr("one"), false)
	if err != nil {
		t.Fatal(err)
	}
	root := drivertest.AddRoot(t, g, n, anything)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.End(r) })
	return root, r
}
