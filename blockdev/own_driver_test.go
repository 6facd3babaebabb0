package blockdev

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// pattern is a driver of the test's own: what docs/architecture.md, "How to add a driver", asks for
// and nothing else. A node of it reads as its own offsets, in bytes. The schema does not know it,
// so it has the options of another driver.
var pattern = driver.Of(driver.Def[*types.BlockdevOptionsNull]{
	Name: "pattern", Kind: graph.Protocol,
	Open: func(_ *driver.Opening, u *types.BlockdevOptionsNull) (graph.Driver, error) {
		return &patterned{*u.Size}, nil
	},
	Check: func(u *types.BlockdevOptionsNull) error {
		if u.Size == nil {
			return fmt.Errorf("A pattern has a size")
		}
		return nil
	},
	Reopen: func(d graph.Driver, u *types.BlockdevOptionsNull, _ *graph.Options) (graph.Participant, error) {
		return graph.OnCommit(func() { d.(*patterned).size = *u.Size }), nil
	},
	ChangeOnly: []string{"size"},
	Prefix:     "pattern",
	FromName: func(name string) (*types.BlockdevOptionsNull, error) {
		n, err := strconv.ParseInt(strings.TrimPrefix(name, "pattern:"), 10, 64)
		return &types.BlockdevOptionsNull{Size: &n}, err
	},
	Filename: func(u *types.BlockdevOptionsNull, _ func(string) driver.Names) string {
		return "pattern:" + strconv.FormatInt(*u.Size, 10)
	},
	Strong: func(u *types.BlockdevOptionsNull, add func(string, value.Value)) { add("size", *u.Size) },
})

type patterned struct{ size int64 }

func (p *patterned) Caps() graph.Caps { return graph.Caps{} }
func (p *patterned) Size() int64      { return p.size }
func (p *patterned) Close() error     { return nil }
func (p *patterned) ReadAt(_ *blk.Req, v blk.Vec, off int64, _ blk.Flags) error {
	for _, b := range v.AppendTo(nil) {
		for i := range b {
			b[i], off = byte(off), off+1
		}
	}
	return nil
}

// counting is a format of the test's own. An image of it begins with the bytes 0, 1, 2.
var counting = driver.Of(driver.Def[*types.BlockdevOptionsGenericFormat]{
	Name: "counting", Kind: graph.Format,
	Open: func(x *driver.Opening, _ *types.BlockdevOptionsGenericFormat) (graph.Driver, error) {
		return &counted{x.Node.File()}, nil
	},
	Children: func(u *types.BlockdevOptionsGenericFormat) []driver.Child { return driver.Filtered(&u.File) },
	FromFile: func(f types.BlockdevRef) *types.BlockdevOptionsGenericFormat {
		return &types.BlockdevOptionsGenericFormat{File: f}
	},
	Probe: func(head []byte) int {
		if slices.Equal(head[:3], []byte{0, 1, 2}) {
			return 50
		}
		return 0
	},
})

type counted struct{ file *graph.Edge }

func (c *counted) Caps() graph.Caps { return graph.Caps{} }
func (c *counted) Size() int64      { return c.file.Size() }
func (c *counted) Close() error     { return nil }
func (c *counted) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return c.file.ReadAt(r, v, off, f)
}

// What such a driver shows keeps the contract of package graph.
func TestOwnDriverSuite(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		ReadOnly: true, Fixed: true,
		Content: func(b []byte, off int64) { (&patterned{}).ReadAt(nil, blk.Buf(b), off, 0) },
		Layers:  []drivertest.Layer{{Name: "counting", Def: counting, Options: &types.BlockdevOptionsGenericFormat{}}},
		Open: func(t *testing.T, g *graph.Graph, size int64, readOnly bool) *graph.Node {
			return drivertest.MustBuild(t, g, drivertest.Spec{
				Options: graph.Options{Name: "pattern", Kind: graph.Protocol, ReadOnly: readOnly},
				Open:    pattern.With(&types.BlockdevOptionsNull{Size: &size}),
			})
		},
	})
}

// A driver is opened, named, found by a name, probed and reopened by what it says of itself.
func TestOwnDriver(t *testing.T) {
	ctx := context.Background()
	m := newManager(t, Config{Drivers: append(slices.Clone(drivers.All), pattern, counting)})
	name, size, ro := "p", int64(1024), true
	o := &types.BlockdevOptions{Driver: "pattern", NodeName: &name, ReadOnly: &ro, U: &types.BlockdevOptionsNull{}}
	if err := m.Add(ctx, o); err == nil || err.Error() != "A pattern has a size" {
		t.Errorf("without a size: %v", err)
	}
	o.U = &types.BlockdevOptionsNull{Size: &size}
	if err := m.Add(ctx, o); err != nil {
		t.Fatal(err)
	}
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'r', 'file': 'p', 'read-only': true}`)
	if name := m.Filename(m.Graph().Node("r")); name != "pattern:1024" {
		t.Errorf("the file name is %s", name)
	}

	larger, other := int64(2048), *o
	other.U = &types.BlockdevOptionsNull{Size: &larger}
	if err := m.Reopen([]*types.BlockdevOptions{&other}).Run(ctx); err != nil {
		t.Error(err)
	}
	if n := m.Graph().Node("p"); n.Size() != larger || m.Filename(n) != "pattern:2048" {
		t.Errorf("reopened: %d bytes, %s", n.Size(), m.Filename(n))
	}
	zeroes, wrong := true, other
	wrong.U = &types.BlockdevOptionsNull{Size: &larger, ReadZeroes: &zeroes}
	if err := m.Reopen([]*types.BlockdevOptions{&wrong}).Run(ctx); err == nil || err.Error() != "Cannot change the option 'read-zeroes'" {
		t.Errorf("reopened with an option that cannot change: %v", err)
	}

	x, err := m.OpenImage(ctx, OpenImage{Filename: "pattern:512", ReadOnly: true, Mode: new(types.NewImageModeExisting)})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Discard()
	if n := x.Node(); n.DriverName() != "counting" || m.Filename(n) != "pattern:512" {
		t.Errorf("a name has led to %s, %s", n.DriverName(), m.Filename(n))
	}
	mustReadPattern(t, m.Graph(), x.Node())

	_, err = m.OpenImage(ctx, OpenImage{Filename: "pattern:512", Format: new("raw"), For: m.Graph().Node("p")})
	if err == nil || err.Error() != "Protocol driver 'pattern' does not support image creation" {
		t.Errorf("an image is made on it: %v", err)
	}
	if err := overlay(t, m, t.TempDir(), "pattern:512", "raw"); err == nil ||
		!strings.HasSuffix(err.Error(), "An image may not name a node of the driver 'pattern'") {
		t.Errorf("an image names it: %v", err)
	}
}

func mustReadPattern(t *testing.T, g *graph.Graph, n *graph.Node) {
	t.Helper()
	claim := perm.Claim{Need: perm.ConsistentRead, Share: perm.All}
	root, err := g.AddRoot(t.Context(), graph.RootSpec{EdgeName: "root", Claim: claim}, n)
	if err != nil {
		t.Fatal(err)
	}
	defer g.CloseRoot(context.Background(), root)
	r, err := root.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	b := make([]byte, 2)
	if err := root.ReadAt(r, blk.Buf(b), 7, 0); err != nil || b[0] != 7 || b[1] != 8 {
		t.Errorf("it reads %v: %v", b, err)
	}
}
