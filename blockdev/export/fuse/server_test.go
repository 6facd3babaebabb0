package fuse

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/export"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// TestMain requires that no goroutine outlives the tests.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kernel is the other end of a connection that is no /dev/fuse: each message is a request or a
// reply.
type kernel struct {
	t    testing.TB
	fd   int
	node *graph.Node
	file *drivertest.Fault
	srv  *server
	buf  []byte
	last uint64 // unique number of the last request
}

// fakeType is the export type with a fake kernel.
type fakeType struct {
	*Type
	k *kernel
}

func (f fakeType) Check(*graph.Node, *types.BlockExportOptions) ([]*graph.Node, error) {
	return nil, nil
}

// Serve implements export.Type.
func (f fakeType) Serve(x *export.Export, _ *graph.Hold) (export.Server, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f.k.fd = pair[0]
	s := &server{
		export: x, root: x.Root, writable: x.Writable(), shared: true, dev: pair[1], log: f.log, ends: 2,
		growable: types.Or(x.Options.U.(*types.BlockExportOptionsFuse).Growable, false), done: make(chan struct{}),
		unmount: func() error { return unix.Shutdown(pair[0], unix.SHUT_RDWR) },
	}
	s.start()
	f.k.srv = s
	return s, nil
}

// bounded is a file that does not become longer than a GiB: to zero it takes as long as it is.
type bounded struct{ *drivertest.Fault }

// Resize implements graph.Resizer.
func (b bounded) Resize(ctx context.Context, size int64, p blk.Prealloc) error {
	if size > 1<<30 {
		return syscall.EFBIG
	}
	return b.Fault.Resize(ctx, size, p)
}

const fakeSize = 128 << 10 // a reply with all of it fits in a message

// newKernel serves a file of fakeSize that is full of ones.
func newKernel(t testing.TB, o *types.BlockExportOptions) *kernel {
	g := drivertest.NewGraph(t)
	mem := drivertest.NewMemFile(fakeSize)
	mem.Poke(0, bytes.Repeat([]byte{1}, fakeSize))
	k := &kernel{t: t, file: drivertest.NewFault(mem), buf: make([]byte, 1<<20)}
	k.node = drivertest.AddNode(t, g, "n", bounded{k.file})
	table := export.New(g, export.Options{})
	typ := fakeType{&Type{log: slog.New(slog.DiscardHandler), paths: map[string]struct{}{}}, k}
	table.Register(types.BlockExportTypeFuse, typ)
	o.Type, o.ID, o.NodeName = types.BlockExportTypeFuse, "e", "n"
	if err := table.Add(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		table.Close(context.Background())
		<-k.srv.Done() // Close does not wait for long, and the socket is shut down by then
		unix.Close(k.fd)
	})
	return k
}

func fuseOptions(writable, growable bool) *types.BlockExportOptions {
	return &types.BlockExportOptions{Writable: &writable, U: &types.BlockExportOptionsFuse{Growable: &growable}}
}

// send sends a request and returns its number.
func (k *kernel) send(op opcode, arg []byte) uint64 {
	k.last++
	if _, err := unix.Write(k.fd, head(op, k.last, arg)); err != nil {
		k.t.Fatal(err)
	}
	return k.last
}

// reply waits for a reply: whose it is, its errno, and what else it has.
func (k *kernel) reply() (unique uint64, errno syscall.Errno, b []byte) {
	n, err := unix.Read(k.fd, k.buf)
	for err == unix.EINTR {
		n, err = unix.Read(k.fd, k.buf)
	}
	if err != nil || n < outHeaderSize || int(le.Uint32(k.buf)) != n {
		k.t.Fatalf("reply of %d bytes: %v %x", n, err, k.buf[:min(max(n, 0), 64)])
	}
	return le.Uint64(k.buf[8:]), syscall.Errno(-int32(le.Uint32(k.buf[4:]))), k.buf[outHeaderSize:n]
}

// ask sends a request and waits for its reply. What comes before may tell that the size changed.
func (k *kernel) ask(op opcode, arg []byte) (syscall.Errno, []byte) {
	unique := k.send(op, arg)
	got, errno, b := k.reply()
	for got == 0 {
		got, errno, b = k.reply()
	}
	if got != unique {
		k.t.Fatalf("a reply to %d, not to %d", got, unique)
	}
	return errno, b
}

// rw is the argument of a read or write.
func rw(off uint64, n int, data []byte) []byte {
	b := make([]byte, rwArgSize, rwArgSize+len(data))
	le.PutUint64(b[8:], off)
	le.PutUint32(b[16:], uint32(n))
	return append(b, data...)
}

// TestRequests are requests that no kernel of today sends, and what must come of them.
func TestRequests(t *testing.T) {
	k := newKernel(t, fuseOptions(true, false))
	for _, c := range []struct {
		what string
		op   opcode
		arg  []byte
		want syscall.Errno
	}{
		{"an unknown request", 9999, nil, syscall.ENOSYS},
		{"a name", opLookup, []byte("x\x00"), syscall.ENOENT},
		{"a read without argument", opRead, nil, syscall.EIO},
		{"a read at a negative offset", opRead, rw(1<<63, 1, nil), syscall.EINVAL},
		{"a read behind the end", opRead, rw(1<<62, 4096, nil), 0},
		{"a read of more than may be", opRead, rw(0, 1<<31, nil), 0},
		{"a write with less data than it says", opWrite, rw(0, 9, []byte("x")), syscall.EIO},
		{"a write behind the end", opWrite, rw(fakeSize, 1, []byte("x")), syscall.EIO},
		{"an init of long ago", opInit, make([]byte, 16), syscall.EPROTO},
		{"a cut init", opInit, make([]byte, 5), syscall.EPROTO},
		{"a seek for something else", opLseek, make([]byte, 24), syscall.EINVAL},
		{"the end", opDestroy, nil, 0},
	} {
		if errno, _ := k.ask(c.op, c.arg); errno != c.want {
			t.Errorf("%s: %v, not %v", c.what, errno, c.want)
		}
	}
	for _, b := range [][]byte{{1}, make([]byte, 100), head(opRead, 3, nil)[:39]} {
		if _, err := unix.Write(k.fd, b); err != nil {
			t.Fatal(err)
		}
	}
	k.send(opForget, make([]byte, 8))
	k.send(opInterrupt, make([]byte, 8))
	if errno, b := k.ask(opRead, rw(fakeSize-3, 10, nil)); errno != 0 || !bytes.Equal(b, []byte{1, 1, 1}) {
		t.Error("after nonsense a read gives ", errno, b)
	}
}

// TestErrnos: what goes wrong below arrives as what it is.
func TestErrnos(t *testing.T) {
	k := newKernel(t, fuseOptions(true, false))
	for _, err := range []syscall.Errno{syscall.EIO, syscall.ENOSPC, syscall.EDQUOT} {
		k.file.Inject(drivertest.Rule{Err: err})
		if errno, _ := k.ask(opWrite, rw(0, 1, []byte("x"))); errno != err {
			t.Errorf("%v, not %v", errno, err)
		}
		k.file.Clear()
	}
}

// TestGateClosed: while the node is drained requests wait and attributes are answered; all are
// served afterwards, also more than there can be readers.
func TestGateClosed(t *testing.T) {
	k := newKernel(t, fuseOptions(true, false))
	undrain, err := k.node.Graph().Drain(t.Context(), k.node)
	if err != nil {
		t.Fatal(err)
	}
	const some = maxReaders / 2
	waiting := map[uint64]bool{}
	for range some {
		waiting[k.send(opRead, rw(0, 512, nil))] = true
	}
	if errno, b := k.ask(opGetattr, make([]byte, 16)); errno != 0 || binary.NativeEndian.Uint64(b[24:]) != fakeSize {
		t.Error("attributes while the gate is closed: ", errno, b)
	}
	for range 2 * maxReaders {
		waiting[k.send(opRead, rw(0, 512, nil))] = true
	}
	undrain()
	for len(waiting) > 0 {
		unique, errno, b := k.reply()
		if !waiting[unique] || errno != 0 || len(b) != 512 {
			t.Fatalf("a reply to %d: %v, %d bytes", unique, errno, len(b))
		}
		delete(waiting, unique)
	}
	if n := k.srv.running.Load(); n > maxReaders+1 {
		t.Errorf("%d goroutines", n)
	}
}

// TestShutdownWhileWaiting: an export goes while its requests wait at the gate.
func TestShutdownWhileWaiting(t *testing.T) {
	k := newKernel(t, fuseOptions(true, false))
	undrain, err := k.node.Graph().Drain(t.Context(), k.node)
	if err != nil {
		t.Fatal(err)
	}
	defer undrain()
	for range 10 {
		k.send(opWrite, rw(0, 1, []byte("x")))
	}
	k.srv.Shutdown()
	k.srv.Shutdown()
	<-k.srv.Done()
}

// TestGrows: a file that grows does so with a write beyond its end, and only then.
func TestGrows(t *testing.T) {
	k := newKernel(t, fuseOptions(true, true))
	if errno, _ := k.ask(opWrite, rw(fakeSize+8192, 4, []byte("abcd"))); errno != 0 || k.node.Size() < fakeSize+8196 {
		t.Error(errno, k.node.Size())
	}
	if errno, b := k.ask(opRead, rw(fakeSize+8190, 6, nil)); errno != 0 || string(b) != "\x00\x00abcd" {
		t.Errorf("%v %q", errno, b)
	}
	if errno, _ := k.ask(opWrite, rw(1<<63-8, 4, []byte("abcd"))); errno == 0 {
		t.Error("a file can be as long as no file can be")
	}
}

// TestSideBySide: many requests at a time, read and written, each in its own place.
func TestSideBySide(t *testing.T) {
	k := newKernel(t, fuseOptions(true, false))
	var all sync.WaitGroup
	const count, n = 2000, 512
	all.Go(func() {
		for i := range count {
			k.send(opWrite, rw(uint64(i)*n%fakeSize, n, bytes.Repeat([]byte{7}, n)))
		}
	})
	for range count {
		if _, errno, b := k.reply(); errno != 0 || le.Uint32(b) != n {
			t.Fatal(errno, b)
		}
	}
	all.Wait()
	want := bytes.Repeat([]byte{7}, fakeSize/2)
	if errno, b := k.ask(opRead, rw(0, fakeSize/2, nil)); errno != 0 || !bytes.Equal(b, want) {
		t.Error("what was written is not there: ", errno, len(b))
	}
}

// TestClaim: only what grows needs the right to resize for good.
func TestClaim(t *testing.T) {
	for _, growable := range []bool{false, true} {
		k := newKernel(t, fuseOptions(true, growable))
		if got := k.srv.root.Edge().Claim().Need&perm.Resize != 0; got != growable {
			t.Errorf("growable %v: resize %v", growable, got)
		}
	}
}

// FuzzRequests: whatever comes as requests, each gets one reply or none, and the disk stays within
// its bounds.
func FuzzRequests(f *testing.F) {
	for op, arg := range map[opcode][]byte{
		opRead: rw(4096, 4096, nil), opWrite: rw(512, 3, []byte("abc")), opFallocate: make([]byte, 32),
		opLseek: make([]byte, 24), opSetattr: make([]byte, 88), opInit: make([]byte, 64), opOpen: make([]byte, 8),
	} {
		f.Add(uint32(op), arg, uint32(opFsync), []byte{}, true)
	}
	f.Fuzz(func(t *testing.T, op1 uint32, arg1 []byte, op2 uint32, arg2 []byte, growable bool) {
		if len(arg1)+len(arg2) > 64<<10 {
			t.Skip()
		}
		k := newKernel(t, fuseOptions(true, growable))
		waiting := map[uint64]bool{}
		send := func(op uint32, arg []byte) {
			unique := k.send(opcode(op), arg)
			switch opcode(op) {
			case opForget, opBatchForget, opInterrupt:
			default:
				waiting[unique] = true
			}
		}
		send(op1, arg1)
		send(op2, arg2)
		send(uint32(opGetattr), make([]byte, 16))
		for len(waiting) > 0 {
			unique, errno, b := k.reply()
			if unique == 0 {
				continue // a notice
			}
			if !waiting[unique] || errno > 4095 || errno != 0 && len(b) > 0 {
				t.Fatalf("a reply to %d: %d, %d bytes", unique, errno, len(b))
			}
			delete(waiting, unique)
		}
		if size := k.node.Size(); size < 0 || size > blk.MaxSize {
			t.Fatal("size ", size)
		}
	})
}

// TestAllocations: nothing is allocated for a request.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	k := newKernel(t, fuseOptions(true, false))
	for op, arg := range map[opcode][]byte{
		opRead: rw(4096, 4096, nil), opWrite: rw(4096, 4096, make([]byte, 4096)), opFlush: make([]byte, 24),
		opGetattr: make([]byte, 16),
	} {
		msg := head(op, 1, arg)
		once := func() {
			if _, err := unix.Write(k.fd, msg); err != nil {
				t.Fatal(err)
			}
			k.reply()
		}
		for range 100 {
			once()
		}
		if n := testing.AllocsPerRun(1000, once); n > 0 {
			t.Errorf("request %d: %.1f allocations", op, n)
		}
	}
}
