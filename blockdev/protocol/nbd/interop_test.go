package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/protocol/nbd"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// outside starts a server of another make and is where it listens; where it is missing the test is
// skipped.
func outside(t *testing.T, args ...string) (path string) {
	t.Helper()
	return outsideAt(t, filepath.Join(t.TempDir(), "s"), args...)
}

// outsideAt is outside with a socket of that name, which stands for SOCKET in args.
func outsideAt(t *testing.T, path string, args ...string) string {
	t.Helper()
	exe, err := exec.LookPath(args[0])
	if err != nil {
		t.Skipf("SKIPPED: %s is not installed", args[0])
	}
	args = slices.Clone(args)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "SOCKET", path)
	}
	cmd := exec.Command(exe, args[1:]...)
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for end := time.Now().Add(time.Minute); ; {
		if _, err := os.Stat(path); err == nil {
			return path
		}
		if time.Now().After(end) {
			t.Fatalf("%v does not start", args)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func connect(t *testing.T, g *graph.Graph, path, export string, context *string) *graph.Node {
	t.Helper()
	timeout := uint32(20)
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "nbd", Kind: graph.Protocol, DriverName: "nbd"},
		Open: nbd.Def.With(&types.BlockdevOptionsNbd{
			Export: &export, XDirtyBitmap: context, OpenTimeout: &timeout,
			Server: types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}},
		}),
	})
}

// Errors of a server come through, and the connection goes on.
func TestPeerErrors(t *testing.T) {
	path := outside(t, "nbdkit", "-f", "-U", "SOCKET", "--filter=error", "memory", "4M",
		"error-pread=ENOMEM", "error-pwrite=ENOSPC", "error-pread-rate=100%", "error-pwrite-rate=100%")
	g := drivertest.NewGraph(t)
	root := drivertest.AddRoot(t, g, connect(t, g, path, "", nil), drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	v := blk.Buf(make([]byte, 4096))
	for range 3 {
		if err := root.ReadAt(r, v, 0, 0); !errors.Is(err, syscall.ENOMEM) {
			t.Error(err)
		}
		if err := root.WriteAt(r, v, 0, 0); !errors.Is(err, syscall.ENOSPC) {
			t.Error(err)
		}
	}
	if err := root.Flush(r); err != nil {
		t.Error(err)
	}
}

// A server without options has one export. What nbdkit says that it can do in this style it cannot.
func TestOldStylePeer(t *testing.T) {
	path := outside(t, "nbdkit", "-f", "-o", "-r", "-U", "SOCKET", "pattern", "4M")
	n := drivertest.MustBuild(t, drivertest.NewGraph(t), drivertest.Spec{
		Options: graph.Options{Name: "nbd", Kind: graph.Protocol, ReadOnly: true},
		Open: nbd.Def.With(&types.BlockdevOptionsNbd{
			OpenTimeout: new(uint32(20)), // it does not listen yet when its socket is there
			Server:      types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}},
		}),
	})
	b := make([]byte, 16)
	err := n.Driver().ReadAt(&blk.Req{}, blk.Buf(b), 4096, 0)
	if err != nil || n.Size() != 4<<20 || b[14] != 16 || b[15] != 8 {
		t.Errorf("%v, size %d, %x", err, n.Size(), b)
	}
}

// A size that is no multiple of sectors is shown rounded up, and reads as zeroes there.
func TestOddSize(t *testing.T) {
	path := outside(t, "nbdkit", "-f", "-U", "SOCKET", "memory", "1000")
	g := drivertest.NewGraph(t)
	root := drivertest.AddRoot(t, g, connect(t, g, path, "", nil), drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	b := bytes.Repeat([]byte{1}, 1000)
	if err := root.WriteAt(r, blk.Buf(b), 0, 0); err != nil || root.Size() != 1024 {
		t.Errorf("%v, size %d", err, root.Size())
	}
	got := bytes.Repeat([]byte{9}, 1024)
	if err := root.ReadAt(r, blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, append(b, make([]byte, 24)...)) {
		t.Errorf("%v, %x", err, got[990:])
	}
	if err := root.WriteAt(r, blk.Buf(b[:512]), 512, 0); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
	if err := root.Zero(r, 512, 512, 0); err != nil {
		t.Error(err)
	}
}

// The dirty bitmap of an image on qemu-nbd is shown as block status: what is dirty is no data.
func TestDirtyBitmap(t *testing.T) {
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("SKIPPED: qemu-img is not installed")
	}
	file := filepath.Join(t.TempDir(), "q")
	for _, args := range [][]string{
		{"create", "-q", "-f", "qcow2", file, "4M"}, {"bitmap", "--add", file, "b"},
	} {
		if out, err := exec.Command(img, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s", out)
		}
	}
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 1M 64k", file).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: qemu-io: %s", out)
	}
	path := outside(t, "qemu-nbd", "-t", "-r", "-f", "qcow2", "-B", "b", "-k", "SOCKET", file)
	context := "qemu:dirty-bitmap:b"
	g := drivertest.NewGraph(t)
	n := drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "nbd", Kind: graph.Protocol, ReadOnly: true},
		Open: nbd.Def.With(&types.BlockdevOptionsNbd{
			XDirtyBitmap: &context, OpenTimeout: new(uint32(20)),
			Server: types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}},
		}),
	})
	x, err := n.IO().Status(&blk.Req{}, 1<<20, 1<<20)
	if err != nil || x.Data || x.N != 64<<10 {
		t.Errorf("%+v, %v", x, err)
	}
	if x, err = n.IO().Status(&blk.Req{}, 0, 4<<20); err != nil || !x.Data || x.N != 1<<20 {
		t.Errorf("%+v, %v", x, err)
	}
}

// With extended headers QEMU 10 takes zeroing, discarding and questions about more than 4 GiB.
func TestExtendedPeer(t *testing.T) {
	const size = 64 << 30
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, bytes.Repeat([]byte{1}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	path := outside(t, "qemu-nbd10", "-t", "-f", "raw", "-x", "x", "-k", "SOCKET", "--discard=unmap", file)
	g := drivertest.NewGraph(t)
	n := connect(t, g, path, "x", nil)
	if l := n.Driver().Caps().Limits; l.MaxZero != 0 || l.MaxDiscard != 0 {
		t.Fatalf("no extended headers: %+v", l)
	}
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	const hole = size - 1<<20
	if x, err := n.IO().Status(r, 1<<20, hole); err != nil || x.Data || !x.Zero || x.N <= 4<<30 {
		t.Errorf("the status is %+v, %v", x, err)
	}
	if err := root.Zero(r, 4096, size-4096, blk.MayUnmap); err != nil {
		t.Error(err)
	}
	if err := root.Discard(r, 8192, size-8192); err != nil {
		t.Error(err)
	}
	b := make([]byte, 8192)
	if err := root.ReadAt(r, blk.Buf(b), 0, 0); err != nil ||
		!bytes.Equal(b, append(bytes.Repeat([]byte{1}, 4096), make([]byte, 4096)...)) {
		t.Errorf("%v, %x", err, b[4090:4100])
	}
	if err := root.WriteAt(r, blk.Buf(b), size-8192, blk.FUA); err != nil {
		t.Error(err)
	}
}
