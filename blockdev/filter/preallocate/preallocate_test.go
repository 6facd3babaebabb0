package preallocate

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

func TestSuite(t *testing.T) {
	for name, o := range map[string]*types.BlockdevOptionsPreallocate{
		"default": {},
		"small":   {PreallocAlign: new(int64(512)), PreallocSize: new(int64(0))},
		"none":    {PreallocAlign: new(int64(0)), PreallocSize: new(int64(1000))},
	} {
		t.Run(name, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					return preallocated(t, g, drivertest.NewMemFile(size), o, ro)
				},
			})
		})
	}
}

func preallocated(
	t *testing.T, g *graph.Graph, f graph.Driver, o *types.BlockdevOptionsPreallocate, ro bool,
) *graph.Node {
	file := drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "mem", Kind: graph.Protocol, ReadOnly: ro}, Open: drivertest.Opened(f)})
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "p", DriverName: "preallocate", Kind: graph.Filter, ReadOnly: ro},
		Children: []drivertest.Child{drivertest.FilteredFile(file)},
		Open:     Def.With(o),
	})
}

// TestGrowth: the file grows in steps, nobody sees it, what was not needed is given back.
func TestGrowth(t *testing.T) {
	const mib = 1 << 20
	ctx := context.Background()
	g := drivertest.NewGraph(t)
	f := drivertest.NewMemFile(0)
	n := preallocated(t, g, f, &types.BlockdevOptionsPreallocate{PreallocSize: new(int64(4 * mib))}, false)
	tx := g.Begin(ctx)
	defer tx.Abort()
	claim := perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.All}
	root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: claim}, n)
	if err = errors.Join(err, tx.Commit()); err != nil {
		t.Fatal(err)
	}
	write := func(off, n int64, v byte) {
		t.Helper()
		r, err := root.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer root.End(r)
		if err := root.WriteAt(r, blk.Buf(bytes.Repeat([]byte{v}, int(n))), off, blk.Grow); err != nil {
			t.Fatal(err)
		}
	}
	sizes := func(data, file int64) {
		t.Helper()
		if n.Driver().Size() != data || f.Size() != file {
			t.Errorf("data end at %d, the file at %d; want %d and %d", n.Driver().Size(), f.Size(), data, file)
		}
	}
	write(0, 1000, 1)
	sizes(1000, 5*mib)
	write(mib, mib, 2)
	sizes(2*mib, 5*mib)
	write(5*mib-512, 512, 3)
	sizes(5*mib, 5*mib)
	write(5*mib, 512, 4)
	sizes(5*mib+512, 10*mib)
	if err := root.Resize(ctx, 3*mib, false, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	sizes(3*mib, 3*mib)
	write(3*mib, 4096, 5)
	sizes(3*mib+4096, 8*mib)
	if err := g.CloseRoot(ctx, root); err != nil {
		t.Fatal(err)
	}
	sizes(3*mib+4096, 3*mib+4096)
	want := make([]byte, 3*mib+4096)
	copy(want, bytes.Repeat([]byte{1}, 1000))
	copy(want[mib:], bytes.Repeat([]byte{2}, mib))
	copy(want[3*mib:], bytes.Repeat([]byte{5}, 4096))
	if !bytes.Equal(f.Bytes(), want) {
		t.Error("the content is another one")
	}
}

// TestNoResize: who may not resize does not preallocate.
func TestNoResize(t *testing.T) {
	g := drivertest.NewGraph(t)
	f := drivertest.NewMemFile(1 << 20)
	root := drivertest.AddRoot(t, g, preallocated(t, g, f, &types.BlockdevOptionsPreallocate{}, false), drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	if err := root.WriteAt(r, blk.Buf(make([]byte, 4096)), 1<<20-4096, 0); err != nil {
		t.Fatal(err)
	}
	if f.Size() != 1<<20 {
		t.Errorf("the file has %d bytes", f.Size())
	}
}

// stingy is a file that often cannot be made longer ahead of the data.
type stingy struct {
	*drivertest.MemFile
	calls atomic.Int64
}

func (s *stingy) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	if s.calls.Add(1)%3 != 0 {
		return syscall.ENOSPC
	}
	return s.MemFile.Zero(r, off, n, f)
}

// TestParallelGrowth: many write behind the end at the same time, growth fails now and then, and
// nothing is lost.
func TestParallelGrowth(t *testing.T) {
	const writers, each, block = 8, 64, 4096
	g := drivertest.NewGraph(t)
	f := &stingy{MemFile: drivertest.NewMemFile(0)}
	n := preallocated(t, g, f, &types.BlockdevOptionsPreallocate{
		PreallocSize: new(int64(3 * block)), PreallocAlign: new(int64(block)),
	}, false)
	t.Cleanup(func() { // all roots are gone
		b := f.Bytes()
		if len(b) != writers*each*block {
			t.Errorf("the file has %d bytes", len(b))
		}
		for i := range b {
			if b[i] != byte(1+i/block%writers) {
				t.Fatalf("byte %d is %d", i, b[i])
			}
		}
	})
	root := drivertest.AddRoot(t, g, n, perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.All})
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				r, err := root.Begin(context.Background())
				if err == nil {
					err = root.WriteAt(r, blk.Buf(bytes.Repeat([]byte{byte(1 + w)}, block)), int64(i*writers+w)*block, blk.Grow)
					root.End(r)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}
