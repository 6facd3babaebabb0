package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	server "qblockd/blockdev/export/nbd"
	"qblockd/blockdev/tlscreds"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// peer is a server of another make with a disk. Its arguments have SOCKET where it is to listen and
// FILE for a raw image of that size.
type peer struct {
	name, export string
	size         int
	args         []string
	fails        bool // some requests do
}

const (
	whole = 4 << 20
	odd   = 3<<20 + 777 // no multiple of anything
)

// kit is nbdkit with a disk in memory.
func kit(name string, size int, more ...string) peer {
	args := append([]string{"nbdkit", "-f", "-U", "SOCKET", "memory", fmt.Sprint(size)}, more...)
	return peer{name: "nbdkit/" + name, size: size, args: args}
}

// qsd is a storage daemon with more options of its NBD server.
func qsd(exe string, size int, tls ...string) peer {
	args := []string{exe, "--blockdev", "file,node-name=n,discard=unmap,filename=FILE"}
	listen := "addr.type=unix,addr.path=SOCKET"
	if tls != nil {
		args, listen = append(args, "--object", tls[0]), listen+",tls-creds=t"
	}
	args = append(args, "--nbd-server", listen, "--export", "nbd,id=e,node-name=n,name=x,writable=on")
	return peer{name: exe, export: "x", size: size, args: args}
}

func plainPeers() []peer {
	min4k := []string{"--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=64k",
		"blocksize-maximum=128k", "blocksize-error-policy=error"}
	peers := []peer{
		kit("memory", whole), kit("odd size", odd),
		kit("simple replies", odd, "--no-sr"),
		kit("blocks", whole, min4k...), kit("blocks, slow", whole, append(min4k, "--filter=delay", "rdelay=1ms", "wdelay=1ms")...),
		kit("blocks of 512", 3<<20+512, "--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-error-policy=error"),
		kit("delay", odd, "--filter=delay", "rdelay=1ms", "wdelay=1ms", "delay-trim=2ms", "delay-extents=2ms"),
		kit("no zero", odd, "--filter=nozero"), kit("zero by hand", odd, "--filter=nozero", "zeromode=plugin"),
		kit("no extents", odd, "--filter=noextents"), kit("FUA", odd, "--filter=fua", "fuamode=emulate"),
		kit("one after the other", odd, "--filter=noparallel", "serialize=all-requests"),
		kit("one connection", odd, "--filter=multi-conn", "multi-conn-mode=disable"),
		kit("not fixed newstyle", odd, "--mask-handshake=0"), kit("with padding", odd, "--mask-handshake=1"),
		kit("cow", odd, "--filter=cow"),
		kit("one client", whole, "--filter=limit", "limit=1"),
		kit("swapped", whole, "--filter=swab", "swab-bits=16"), kit("rate", whole, "--filter=rate", "rate=800M"),
		{name: "nbdkit/file", export: "any", size: odd, args: []string{"nbdkit", "-f", "-U", "SOCKET", "file", "FILE"}},
		{name: "nbdkit/partition", size: odd + 512 - odd%512, args: []string{"nbdkit", "-f", "-U", "SOCKET",
			"--filter=partition", "partitioning", "FILE", "partition=1"}},
		kit("truncate", odd+99, "--filter=truncate", fmt.Sprint("truncate=", odd)),
		kit("offset", odd, "--filter=offset", "offset=511"),
		{name: "qemu-nbd", export: "x", size: odd, args: []string{"qemu-nbd", "-t", "-f", "raw", "-x", "x", "-k", "SOCKET",
			"--discard=unmap", "FILE"}},
		{name: "qemu-nbd10", export: "x", size: odd, args: []string{"qemu-nbd10", "-t", "-f", "raw", "-x", "x",
			"-k", "SOCKET", "--discard=unmap", "FILE"}},
		{name: "nbd-server", export: "x", size: odd, args: []string{"nbd-server"}},
		qsd("qemu-storage-daemon", odd), qsd("qsd10", odd),
	}
	failing := kit("errors", odd, "--filter=error", "error=EIO", "error-rate=20%")
	failing.fails = true
	for i := range peers {
		switch p := &peers[i]; p.name {
		case "nbdkit/truncate":
			p.size = odd
		case "nbdkit/offset":
			p.size = odd - 511
		}
	}
	return append(peers, failing)
}

func tlsPeers(dir string) []peer {
	creds := "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir=" + dir
	must, may := kit("TLS", odd, "--tls=require", "--tls-verify-peer", "--tls-certificates="+dir),
		kit("TLS, may be", odd, "--tls=on", "--tls-certificates="+dir)
	return []peer{
		must, may, qsd("qemu-storage-daemon", odd, creds), qsd("qsd10", odd, creds),
		{name: "qemu-nbd", export: "x", size: odd, args: []string{"qemu-nbd", "-t", "-f", "raw", "-x", "x", "-k", "SOCKET",
			"--object", creds, "--tls-creds", "t", "FILE"}},
	}
}

// start starts the peer and is where it listens.
func (p *peer) start(t *testing.T) types.SocketAddress {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, make([]byte, p.size), 0o600); err != nil {
		t.Fatal(err)
	}
	if p.args[0] == "nbd-server" {
		return startNBDServer(t, dir, file)
	}
	args := slices.Clone(p.args)
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "FILE", file)
	}
	return unixAddress(outsideAt(t, filepath.Join(dir, "s"), args...))
}

func unixAddress(path string) types.SocketAddress {
	return types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}}
}

// startNBDServer starts nbd-server, which runs in the background, and of which some versions fail
// on unix sockets.
func startNBDServer(t *testing.T, dir, file string) types.SocketAddress {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	config, pidFile := filepath.Join(dir, "config"), filepath.Join(dir, "pid")
	text := "[generic]\nlistenaddr = 127.0.0.1\nport = " + port + "\nallowlist = false\n" +
		"[x]\nexportname = " + file + "\nflush = true\nfua = true\ntrim = true\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	outsideAt(t, pidFile, "nbd-server", "-C", config, "-p", pidFile)
	t.Cleanup(func() {
		text, err := os.ReadFile(pidFile)
		if pid, bad := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && bad == nil {
			_ = syscall.Kill(pid, syscall.SIGTERM)
		}
	})
	return types.SocketAddress{Type: "inet", U: &types.InetSocketAddress{Host: "127.0.0.1", Port: port}}
}

// TestPeers does random requests on servers of other makes, with all that they refuse, and compares
// with a byte slice.
func TestPeers(t *testing.T) {
	for _, p := range plainPeers() {
		t.Run(p.name, func(t *testing.T) { comparePeer(t, p, nil, types.BlockdevOptionsNbd{}) })
	}
	t.Run("qblockd", func(t *testing.T) { compareOwn(t, nil, nil, types.BlockdevOptionsNbd{}) })
}

// TestPeersSeveral is TestPeers with several connections to servers that take them.
func TestPeersSeveral(t *testing.T) {
	opts := types.BlockdevOptionsNbd{XQblockdConnections: new(uint32(4))}
	some := []string{"nbdkit/delay", "nbdkit/one connection", "nbdkit/one client", "nbdkit/errors", "qemu-nbd", "qsd10"}
	for _, p := range plainPeers() {
		if !slices.Contains(some, p.name) {
			continue
		}
		t.Run(p.name, func(t *testing.T) { comparePeer(t, p, nil, opts) })
	}
	t.Run("qblockd", func(t *testing.T) { compareOwn(t, nil, nil, opts) })
}

// TestTLSPeers is TestPeers over TLS.
func TestTLSPeers(t *testing.T) {
	dir, o := withTLS(t)
	opts := types.BlockdevOptionsNbd{TlsCreds: new("client"), TlsHostname: new("localhost")}
	for _, p := range tlsPeers(dir) {
		t.Run(p.name, func(t *testing.T) { comparePeer(t, p, o, opts) })
	}
	t.Run("qblockd", func(t *testing.T) {
		tls, err := tlscreds.NewServer(o, new("server"), nil)
		if err != nil {
			t.Fatal(err)
		}
		compareOwn(t, tls, o, opts)
	})
}

func comparePeer(t *testing.T, p peer, o driver.Objects, opts types.BlockdevOptionsNbd) {
	opts.Export = &p.export
	compareAt(t, p.start(t), p.size, p.fails, o, opts)
}

func compareOwn(t *testing.T, tls *tlscreds.Server, o driver.Objects, opts types.BlockdevOptionsNbd) {
	opts.Export = new("x")
	compareAt(t, unixAddress(serveBy(t, odd, false, server.Options{TLS: tls})), odd, false, o, opts)
}

func compareAt(
	t *testing.T, addr types.SocketAddress, size int, fails bool, o driver.Objects, opts types.BlockdevOptionsNbd,
) {
	g := drivertest.NewGraph(t)
	opts.OpenTimeout, opts.Server = new(uint32(20)), addr
	n, err := build(t, g, o, &opts)
	if err != nil {
		t.Fatal(err)
	}
	if want := blk.AlignUp(int64(size), blk.SectorSize); n.Size() != want {
		t.Fatalf("size %d, want %d", n.Size(), want)
	}
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const users = 4 // each has a part of the disk
	model := make([]byte, size)
	var all sync.WaitGroup
	for i := range users {
		u := &user{t: t, root: root, rng: rand.New(rand.NewPCG(seed, uint64(i))), fails: fails}
		u.base, u.model = i*size/users, model[i*size/users:(i+1)*size/users]
		all.Go(u.use)
	}
	all.Wait()
	check := &user{t: t, root: root, model: model, fails: fails}
	check.do(0, func(r *blk.Req) error { return check.look(r, 0, len(model)) })
}

// user uses a part of a disk, and knows what is there.
type user struct {
	t     *testing.T
	root  *graph.Root
	rng   *rand.Rand
	base  int
	model []byte
	fails bool
}

func (u *user) use() {
	for i := range 60 {
		if u.t.Failed() {
			return
		}
		off := u.rng.IntN(len(u.model) - 1)
		n := 1 + u.rng.IntN(min(len(u.model)-off, 300<<10))
		if u.rng.IntN(2) == 0 {
			n = min(n, 1+u.rng.IntN(2000))
		}
		kind := u.rng.IntN(7)
		flag, b := blk.Flags(u.rng.IntN(2)), u.noise(n)
		u.do(i, func(r *blk.Req) error { return u.request(r, kind, off, b, flag) })
	}
}

// noise is n bytes that are different each time.
func (u *user) noise(n int) []byte {
	b := make([]byte, n+8)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], u.rng.Uint64())
	}
	return b[:n]
}

// do makes a request, again and again if it may fail.
func (u *user) do(i int, f func(r *blk.Req) error) {
	r, err := u.root.Begin(context.Background())
	if err != nil {
		u.t.Error(err)
		return
	}
	defer u.root.End(r)
	for range 100 {
		if err = f(r); !u.fails || !errors.Is(err, syscall.EIO) {
			break
		}
	}
	if err != nil {
		u.t.Errorf("step %d: %v", i, err)
	}
}

func (u *user) request(r *blk.Req, kind, off int, b []byte, flag blk.Flags) error {
	at, n := int64(u.base+off), int64(len(b))
	part := u.model[off : off+len(b)]
	switch kind {
	case 0, 1:
		copy(part, b)
		return u.root.WriteAt(r, blk.Buf(b), at, blk.FUA*flag)
	case 2:
		clear(part)
		return u.root.Zero(r, at, n, blk.MayUnmap*flag)
	case 3:
		if err := u.root.Discard(r, at, n); err != nil {
			return err
		}
		now := make([]byte, n)
		if err := u.root.ReadAt(r, blk.Buf(now), at, 0); err != nil {
			return err
		}
		for i, c := range now {
			if c != part[i] && c != 0 {
				return fmt.Errorf("discarded [%d, +%d) has %#x at %d, where there was %#x", at, n, c, i, part[i])
			}
		}
		copy(part, now)
		return nil
	case 4:
		return u.root.Flush(r)
	case 5:
		x, err := u.root.Status(r, at, n)
		if err == nil && (x.N <= 0 || x.N > n || x.Zero && !blk.IsZero(part[:x.N])) {
			return fmt.Errorf("the status of [%d, +%d) is %+v", at, n, x)
		}
		return err
	}
	return u.look(r, off, len(b))
}

// look compares a range with what should be there.
func (u *user) look(r *blk.Req, off, n int) error {
	b := make([]byte, n)
	if err := u.root.ReadAt(r, blk.Buf(b), int64(u.base+off), 0); err != nil {
		return err
	}
	if want := u.model[off : off+n]; !bytes.Equal(b, want) {
		i := 0
		for b[i] == want[i] {
			i++
		}
		return fmt.Errorf("[%d, +%d) has %#x at %d instead of %#x", u.base+off, n, b[i], u.base+off+i, want[i])
	}
	return nil
}
