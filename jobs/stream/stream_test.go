package stream_test

import (
	"bytes"
	"context"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/jobtest"
	"qblockd/jobs/stream"
	"qblockd/schema/types"
)

const cluster = 64 << 10

// layer makes a qcow2 node of that many clusters over backing.
func layer(t *testing.T, g *graph.Graph, name string, clusters int, backing *graph.Node) *graph.Node {
	t.Helper()
	return jobtest.Layer(t, g, name, drivertest.NewMemFile(0), int64(clusters)*cluster, backing)
}

func write(t *testing.T, n *graph.Node, content byte) {
	t.Helper()
	writeAt(t, n, 0, bytes.Repeat([]byte{content}, int(n.Size())))
}

func writeAt(t *testing.T, n *graph.Node, off int64, p []byte) {
	t.Helper()
	jobtest.Visit(t, n, func(guest *graph.Root) error { return jobtest.Write(guest, off, p) })
}

// TestShortLayers streams over layers that are shorter than what is above and below them: a guest
// sees the same before and after, and the job ends.
func TestShortLayers(t *testing.T) {
	for _, c := range []struct {
		name           string
		base, mid, top int // clusters
		keepBase       bool
	}{
		{"short mid, long base stays", 6, 2, 8, true},
		{"short mid, long base goes", 6, 2, 8, false},
		{"short base stays", 2, 4, 8, true},
		{"short base goes", 2, 4, 8, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, sink := drivertest.NewGraphSink(t)
			base := layer(t, g, "base", c.base, nil)
			write(t, base, 1)
			mid := layer(t, g, "mid", c.mid, base)
			top := layer(t, g, "top", c.top, mid)
			root := drivertest.AddRoot(t, g, top, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
			read := func() []byte {
				p := make([]byte, c.top*cluster)
				if err := jobtest.Read(root, 0, p); err != nil {
					t.Fatal(err)
				}
				return p
			}
			before := read()
			m := jobs.NewManager(sink, nil)
			var stays *string
			if c.keepBase {
				stays = new("base")
			}
			release, err := start(g, m, stays)
			if err != nil {
				t.Fatal(err)
			}
			release()
			j := m.Get("j")
			<-j.Finished()
			if j.Err() != nil {
				t.Fatal(j.Err())
			}
			if !bytes.Equal(read(), before) {
				t.Error("the content has changed")
			}
			if err := j.Dismiss(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRawOverAChain streams from a raw node whose file has a backing file: what that holds is
// copied, too.
func TestRawOverAChain(t *testing.T) {
	g, sink := drivertest.NewGraphSink(t)
	deep := layer(t, g, "deep", 4, nil)
	write(t, deep, 7)
	file := layer(t, g, "file", 4, deep)
	below := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "below", Kind: graph.Format, DriverName: "raw"},
		Children: []drivertest.Child{drivertest.FilteredFile(file)}, Open: raw.Def.With(&types.BlockdevOptionsRaw{})})
	top := layer(t, g, "top", 4, below)
	root := drivertest.AddRoot(t, g, top, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
	m := jobs.NewManager(sink, nil)
	release, err := start(g, m, nil)
	if err != nil {
		t.Fatal(err)
	}
	release()
	j := m.Get("j")
	<-j.Finished()
	if j.Err() != nil || top.Backing() != nil {
		t.Fatal(j.Err())
	}
	p := make([]byte, 4*cluster)
	if err := jobtest.Read(root, 0, p); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, len(p))) {
		t.Errorf("%v, or what lay deepest is lost", err)
	}
	if err := j.Dismiss(); err != nil {
		t.Error(err)
	}
}

// start starts a job that streams from base, or everything, to the node top.
func start(g *graph.Graph, m *jobs.Manager, base *string) (release func(), err error) {
	a := types.BlockStreamArgs{JobID: new("j"), Device: "top", BaseNode: base, AutoDismiss: new(false)}
	j, err := stream.FromArgs(blockdev.New(g, blockdev.Config{Drivers: drivers.All}), &a)
	if err != nil {
		return nil, err
	}
	return blockjob.Start(context.Background(), g, m, j)
}

// TestHugeLayers streams a chain of 64 TiB with little in it, part of which lies beyond the end of
// a layer: that takes steps for what is there, and writes no more.
func TestHugeLayers(t *testing.T) {
	const clusters = 1 << 30
	for _, keepBase := range []bool{true, false} {
		g, sink := drivertest.NewGraphSink(t)
		base := layer(t, g, "base", clusters, nil)
		put := func(n *graph.Node, at int64, content byte) {
			writeAt(t, n, at*cluster, bytes.Repeat([]byte{content}, cluster))
		}
		places := []int64{0, 5, 1000, 1 << 25, clusters - 1}
		for _, at := range places {
			put(base, at, 1)
		}
		mid := layer(t, g, "mid", 1<<20, base)
		put(mid, 5, 2)
		put(mid, 1<<20-1, 2)
		top := layer(t, g, "top", clusters, mid)
		m := jobs.NewManager(sink, nil)
		var stays *string
		if keepBase {
			stays = new("base")
		}
		release, err := start(g, m, stays)
		if err != nil {
			t.Fatal(err)
		}
		release()
		j := m.Get("j")
		<-j.Finished()
		if j.Err() != nil {
			t.Fatal(j.Err())
		}
		root := drivertest.AddRoot(t, g, top, drivertest.Reader)
		for at, want := range map[int64]byte{
			0: 1, 5: 2, 1000: 1, 1<<20 - 1: 2, 1 << 20: 0, 1 << 25: 0, 1<<25 + 1: 0, clusters - 1: 0,
		} {
			p := make([]byte, cluster)
			if err := jobtest.Read(root, at*cluster, p); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{want}, cluster)) {
				t.Errorf("cluster %d: %v, %d, want %d", at, err, p[0], want)
			}
		}
		if n, err := g.Node("top-file").Driver().(*drivertest.MemFile).ActualSize(); err != nil || n > 8<<20 {
			t.Errorf("the top takes %d bytes", n)
		}
	}
}
