package nbd

import (
	"context"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// fileDevice is a Device over a file, with a gate and knobs for the tests.
type fileDevice struct {
	f      *os.File
	size   int64
	noMap  bool
	direct bool // as if the file were opened with O_DIRECT
	limit  blk.Limits

	wouldBlock atomic.Bool                  // NoWait is never possible
	fault      func(op string) error        // nil: none
	depths     func(off int64) (int64, int) // bytes up to the next change, depth
	flushes    atomic.Int64
	lastFlags  atomic.Uint32
	leases     atomic.Int64

	dataStart, dataEnd atomic.Int64 // a run of data, as far as known

	mu     sync.Mutex
	closed chan struct{} // not nil: the gate is closed until it is closed
	reqs   sync.Pool
	inside atomic.Int64
}

func newFileDevice(t testing.TB, size int64) *fileDevice {
	t.Helper()
	f, err := os.CreateTemp(tmpfs(t), "nbd-test")
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(f.Name())
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	d := &fileDevice{f: f, size: size}
	d.reqs.New = func() any { return &blk.Req{Ctx: context.Background()} }
	return d
}

// tmpfs is a folder in memory, if there is one.
func tmpfs(t testing.TB) string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return t.TempDir()
}

func (d *fileDevice) closeGate() (open func()) {
	ch := make(chan struct{})
	d.mu.Lock()
	d.closed = ch
	d.mu.Unlock()
	return func() {
		d.mu.Lock()
		d.closed = nil
		d.mu.Unlock()
		close(ch)
	}
}

func (d *fileDevice) TryBegin() *blk.Req {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed != nil {
		return nil
	}
	d.inside.Add(1)
	return d.reqs.Get().(*blk.Req)
}

func (d *fileDevice) Begin(ctx context.Context) (*blk.Req, error) {
	for {
		if r := d.TryBegin(); r != nil {
			return r, nil
		}
		d.mu.Lock()
		ch := d.closed
		d.mu.Unlock()
		if ch == nil {
			continue
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (d *fileDevice) End(r *blk.Req) {
	if r.NoWait {
		panic("a request was ended with NoWait set")
	}
	d.inside.Add(-1)
	d.reqs.Put(r)
}

func (d *fileDevice) enter(r *blk.Req, op string) error {
	if r.NoWait && d.wouldBlock.Load() {
		return blk.ErrWouldBlock
	}
	if d.fault != nil {
		return d.fault(op)
	}
	return nil
}

func (d *fileDevice) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := d.enter(r, "read"); err != nil {
		return err
	}
	b, _ := v.Single()
	for len(b) > 0 {
		n, err := syscall.Pread(int(d.f.Fd()), b, off)
		if err != nil {
			return err
		}
		if n == 0 {
			return syscall.EIO
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

func (d *fileDevice) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := d.enter(r, "write"); err != nil {
		return err
	}
	d.lastFlags.Store(uint32(f))
	b, _ := v.Single()
	_, err := syscall.Pwrite(int(d.f.Fd()), b, off)
	return err
}

func (d *fileDevice) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	if err := d.enter(r, "zero"); err != nil {
		return err
	}
	d.lastFlags.Store(uint32(f))
	if f&blk.NoFallback != 0 {
		return blk.ErrNotSupported
	}
	if n == 0 {
		return nil
	}
	d.dataEnd.Store(0)
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d *fileDevice) Discard(r *blk.Req, off, n int64) error {
	if err := d.enter(r, "discard"); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	d.dataEnd.Store(0)
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d *fileDevice) Flush(r *blk.Req) error {
	if err := d.enter(r, "flush"); err != nil {
		return err
	}
	d.flushes.Add(1)
	return nil
}

func (d *fileDevice) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	if err := d.enter(r, "status"); err != nil {
		return blk.Extent{}, err
	}
	if e := d.dataEnd.Load(); off >= d.dataStart.Load() && off < e {
		return blk.Extent{N: min(n, e-off), Data: true, Allocated: true, Depth: 1}, nil
	}
	if d.depths != nil {
		k, depth := d.depths(off)
		return blk.Extent{N: min(k, n), Depth: depth, Data: depth > 0, Zero: depth == 0, Allocated: depth > 0}, nil
	}
	const seekData, seekHole = 3, 4
	at, err := syscall.Seek(int(d.f.Fd()), off, seekData)
	if err == syscall.ENXIO || err == nil && at >= off+n {
		return blk.Extent{N: n, Zero: true, Allocated: true, Depth: 1}, nil
	}
	if err != nil {
		return blk.Extent{}, err
	}
	if at > off {
		return blk.Extent{N: at - off, Zero: true, Allocated: true, Depth: 1}, nil
	}
	if at, err = syscall.Seek(int(d.f.Fd()), off, seekHole); err != nil {
		return blk.Extent{}, err
	}
	// A memory file system looks at each page to find the end: remember it.
	d.dataEnd.Store(0)
	d.dataStart.Store(off)
	d.dataEnd.Store(at)
	return blk.Extent{N: min(n, at-off), Data: true, Allocated: true, Depth: 1}, nil
}

func (d *fileDevice) Prefetch(r *blk.Req, off, n int64) error { return d.enter(r, "prefetch") }

// countedLease counts the leases that are held.
type countedLease struct{ d *fileDevice }

func (l countedLease) Release() { l.d.leases.Add(-1) }

func (d *fileDevice) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	if d.noMap {
		return nil
	}
	x, err := d.Status(r, off, n)
	if err != nil {
		return err
	}
	h := blk.HostRange{FD: int(d.f.Fd()), Off: off, N: x.N, Direct: d.direct}
	if x.Zero {
		h.FD = -1
	}
	m.Add(h)
	d.leases.Add(1)
	m.Hold(countedLease{d})
	return nil
}

func (d *fileDevice) Mapped(int64, time.Duration) {}

func (d *fileDevice) Limits() blk.Limits { return d.limit }
