package nbd_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	server "qblockd/blockdev/export/nbd"
	"qblockd/blockdev/format/raw"
	"qblockd/blockdev/protocol/nbd"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// TestSuite runs the suite of all drivers with our own server, over a file in memory.
func TestSuite(t *testing.T) {
	outer := t // the servers outlive the nodes
	drivertest.Run(t, drivertest.Config{
		Fixed: true, Steps: 150,
		Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			return open(t, g, serve(outer, size, ro), ro)
		},
	})
}

func open(t *testing.T, g *graph.Graph, path string, ro bool) *graph.Node {
	t.Helper()
	x := "x"
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "nbd", Kind: graph.Protocol, DriverName: "nbd", ReadOnly: ro},
		Open: nbd.Def.With(&types.BlockdevOptionsNbd{
			Export: &x, Server: types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}},
		}),
	})
}

// serve serves a file in memory as the export "x" until the test ends.
func serve(t *testing.T, size int64, ro bool) (path string) {
	t.Helper()
	return serveBy(t, size, ro, server.Options{})
}

func serveBy(t *testing.T, size int64, ro bool, o server.Options) (path string) {
	t.Helper()
	g := drivertest.NewGraph(t)
	n := drivertest.AddNode(t, g, "file", drivertest.NewMemFile(size))
	claim := drivertest.Writer
	if ro {
		claim = drivertest.Reader
	}
	root := drivertest.AddRoot(t, g, n, claim)
	path = filepath.Join(t.TempDir(), "s")
	l, _, err := sockets.ListenUnix(sockets.UnixAddr{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	s := server.Serve(l, o)
	t.Cleanup(func() {
		s.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		s.Wait(ctx)
	})
	if _, err := s.Add(server.Spec{Name: "x", Size: n.Size(), ReadOnly: ro, Device: device{root}}); err != nil {
		t.Fatal(err)
	}
	return path
}

// device shows a root to the server.
type device struct{ *graph.Root }

func (d device) Prefetch(*blk.Req, int64, int64) error { return nil }
func (d device) Limits() blk.Limits                    { return d.Edge().Caps().Limits }
func (d device) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return d.StatusAbove(r, nil, false, off, n)
}

// An export that is read-only makes a node read-only that may be.
func TestReadOnlyExport(t *testing.T) {
	path := serve(t, 1<<20, true)
	g := drivertest.NewGraph(t)
	o := &types.BlockdevOptionsNbd{
		Export: new("x"), Server: types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}},
	}
	spec := drivertest.Spec{Options: graph.Options{Name: "nbd", Kind: graph.Protocol}, Open: nbd.Def.With(o)}
	if _, err := drivertest.Build(g, spec); err == nil || err.Error() != "Could not open image: Permission denied" {
		t.Error(err)
	}
	spec.Options.AutoReadOnly = true
	n := drivertest.MustBuild(t, g, spec)
	if !n.ReadOnly() {
		t.Error("the node can be written to")
	}
	_, err := nbd.Def.Reopen(n.Driver(), o, &graph.Options{})
	if err == nil || err.Error() != "Can't reopen read-only NBD mount as read/write" {
		t.Error(err)
	}
}

// What an image names is asked about first, and descriptors are for the command line.
func TestAdmission(t *testing.T) {
	path := serve(t, 512, false)
	dir := filepath.Dir(path)
	opening := func(o driver.Opening, a types.SocketAddress) error {
		g := drivertest.NewGraph(t)
		_, err := drivertest.Build(g, drivertest.Spec{
			Options: graph.Options{Name: "nbd", Kind: graph.Protocol, ReadOnly: true},
			Open: func(x *driver.Opening) (graph.Driver, error) {
				x.Admit = o.Admit
				return nbd.Def.Open(x, &types.BlockdevOptionsNbd{Export: new("x"), Server: a})
			},
		})
		return err
	}
	var asked driver.FoundFile
	admit := driver.Opening{Admit: func(f *driver.FoundFile) error { asked = *f; return nil }}
	unix := types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: dir + "/./s"}}
	if err := opening(admit, unix); err != nil || !asked.Socket || asked.Path != path {
		t.Errorf("%v, asked about %+v", err, asked)
	}
	fd := types.SocketAddress{Type: "fd", U: &types.String{Str: "0"}}
	if err := opening(admit, fd); err == nil || err.Error() != "An image may not name a descriptor of the daemon" {
		t.Error(err)
	}
	if err := opening(driver.Opening{}, fd); err == nil || err.Error() != "only QEMU supports file descriptor passing" {
		t.Error(err)
	}
}
