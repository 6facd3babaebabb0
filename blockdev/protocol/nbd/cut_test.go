package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	server "qblockd/blockdev/export/nbd"
	"qblockd/blockdev/protocol/nbd"
	"qblockd/blockdev/tlscreds"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// cutter passes connections on to a server and cuts each after some bytes.
type cutter struct {
	l    net.Listener
	path string // of the server
	most int64  // bytes, before a cut
	cuts atomic.Int64
	work sync.WaitGroup
}

func newCutter(t *testing.T, server string, most int64) *cutter {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "cut"))
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{l: l, path: server, most: most}
	c.work.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			c.work.Go(func() { c.pass(client) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		c.work.Wait()
	})
	return c
}

func (c *cutter) pass(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("unix", c.path)
	if err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.CopyN(server, client, c.most/4+rand.Int64N(c.most*3/4))
		client.Close()
		server.Close()
		c.cuts.Add(1)
	})
	_, _ = io.Copy(client, server)
	client.Close()
	both.Wait()
}

// TestCut: with connections that are lost again and again and drains in between, each write that
// was acknowledged is there, and none fails but for a drain.
func TestCut(t *testing.T) {
	t.Run("plain", func(t *testing.T) { testCut(t, nil, nil, types.BlockdevOptionsNbd{}) })
	t.Run("several", func(t *testing.T) {
		testCut(t, nil, nil, types.BlockdevOptionsNbd{XQblockdConnections: new(uint32(4))})
	})
	t.Run("TLS", func(t *testing.T) { // each connection has its own handshake
		_, o := withTLS(t)
		tls, err := tlscreds.NewServer(o, new("server"), nil)
		if err != nil {
			t.Fatal(err)
		}
		testCut(t, o, tls, types.BlockdevOptionsNbd{TlsCreds: new("client"), TlsHostname: new("localhost")})
	})
}

func testCut(t *testing.T, o objects, tls *tlscreds.Server, opts types.BlockdevOptionsNbd) {
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(t.Output(), nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	const writers, each, block = 8, 60, 8192
	c := newCutter(t, serveBy(t, writers*each*block, false, server.Options{TLS: tls}), 400_000)
	g := drivertest.NewGraph(t)
	opts.Export, opts.ReconnectDelay = new("x"), new(uint32(60))
	opts.Server = types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: c.l.Addr().String()}}
	n := drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "nbd", Kind: graph.Protocol, DriverName: "nbd"},
		Open: func(x *driver.Opening) (graph.Driver, error) {
			x.Objects = o
			return nbd.Def.Open(x, &opts)
		},
	})
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	content := func(i int) []byte { return bytes.Repeat([]byte{byte(i%255 + 1)}, block) }
	var drains atomic.Int64
	d := n.Driver().(graph.Drainer)
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := w; i < writers*each; i += writers {
				if i%100 == 50 {
					drains.Add(1)
					d.DrainBegin()
					d.DrainEnd()
				}
				for {
					before := drains.Load()
					err := write(root, content(i), int64(i)*block)
					if err == nil {
						break
					}
					if !errors.Is(err, syscall.EIO) || before == 0 && drains.Load() == 0 {
						t.Errorf("write %d: %v", i, err)
						return
					}
				}
			}
		})
	}
	all.Wait()
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	b := make([]byte, block)
	for i := range writers * each {
		if err := root.ReadAt(r, blk.Buf(b), int64(i)*block, 0); err != nil || !bytes.Equal(b, content(i)) {
			t.Fatalf("block %d: %v, %d", i, err, b[0])
		}
	}
	if n := c.cuts.Load(); n < 5 {
		t.Errorf("the connection was cut %d times only", n)
	}
}

func write(root *graph.Root, b []byte, off int64) error {
	return inUnit(root, func(r *blk.Req) error { return root.WriteAt(r, blk.Buf(b), off, 0) })
}

// TestCutCopies: with connections that are lost in the middle of ranges that the kernel sends, each
// range that was acknowledged is there.
func TestCutCopies(t *testing.T) {
	for _, connections := range []uint32{1, 4} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) { testCutCopies(t, connections) })
	}
}

func testCutCopies(t *testing.T, connections uint32) {
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(t.Output(), nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	const copiers, each, block = 4, 40, 96 << 10
	f, err := os.Create(filepath.Join(t.TempDir(), "source"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content := make([]byte, copiers*each*block)
	rand.NewChaCha8([32]byte{1}).Read(content)
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	c := newCutter(t, serve(t, copiers*each*block, false), 4*copiers*block)
	n := drivertest.MustBuild(t, drivertest.NewGraph(t), drivertest.Spec{
		Options: graph.Options{Name: "nbd", Kind: graph.Protocol, DriverName: "nbd"},
		Open: nbd.Def.With(&types.BlockdevOptionsNbd{
			Server: unixAddress(c.l.Addr().String()), Export: new("x"), ReconnectDelay: new(uint32(60)),
			XQblockdConnections: &connections,
		}),
	})
	root := drivertest.AddRoot(t, n.Graph(), n, drivertest.Writer)
	var all sync.WaitGroup
	for w := range copiers {
		all.Go(func() {
			for i := w; i < copiers*each; i += copiers {
				at := int64(i) * block
				err := inUnit(root, func(r *blk.Req) error {
					return root.CopyFrom(r, at, []blk.HostRange{{FD: int(f.Fd()), Off: at, N: block}}, 0)
				})
				if err != nil {
					t.Errorf("copy %d: %v", i, err)
				}
			}
		})
	}
	all.Wait()
	got := make([]byte, len(content))
	if err := inUnit(root, func(r *blk.Req) error {
		for off := int64(0); off < int64(len(got)); off += block { // less than what a connection lasts for
			if err := root.ReadAt(r, blk.Buf(got[off:off+block]), off, 0); err != nil {
				return err
			}
		}
		return nil
	}); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the copy differs: %v", err)
	}
	if n := c.cuts.Load(); n < 5 {
		t.Errorf("the connection was cut %d times only", n)
	}
}

func inUnit(root *graph.Root, f func(r *blk.Req) error) error {
	r, err := root.Begin(context.Background())
	if err != nil {
		return err
	}
	defer root.End(r)
	return f(r)
}
