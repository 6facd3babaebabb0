package drivertest

import (
	"context"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// HostFile is a plain driver on a temporary file: the simplest one that maps and copies host
// ranges.
type HostFile struct {
	f    *os.File
	size atomic.Int64
	// Leases is the number of mappings not yet released.
	Leases atomic.Int64
}

// NewHostFile makes a file of size zero bytes, removed when the test ends. Close closes it for
// good.
func NewHostFile(t testing.TB, size int64) *HostFile {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "hostfile")
	if err != nil {
		t.Fatal(err)
	}
	h := &HostFile{f: f}
	if err := h.Resize(context.Background(), size, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	return h
}

// Caps implements graph.Driver.
func (h *HostFile) Caps() graph.Caps { return graph.Caps{WriteFlags: blk.WriteUnchanged} }

// Size implements graph.Driver.
func (h *HostFile) Size() int64 { return h.size.Load() }

// Close implements graph.Driver.
func (h *HostFile) Close() error { return h.f.Close() }

// ReadAt implements graph.Driver.
func (h *HostFile) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) (err error) {
	v.Each(func(b []byte) {
		if err == nil {
			_, err = h.f.ReadAt(b, off)
			off += int64(len(b))
		}
	})
	return err
}

// WriteAt implements graph.Writer.
func (h *HostFile) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) (err error) {
	v.Each(func(b []byte) {
		if err == nil {
			_, err = h.f.WriteAt(b, off)
			off += int64(len(b))
		}
	})
	h.grew(off)
	return err
}

func (h *HostFile) grew(end int64) {
	for s := h.size.Load(); end > s && !h.size.CompareAndSwap(s, end); {
		s = h.size.Load()
	}
}

// Flush implements graph.Flusher.
func (h *HostFile) Flush(r *blk.Req) error { return h.f.Sync() }

// Resize implements graph.Resizer.
func (h *HostFile) Resize(ctx context.Context, size int64, p blk.Prealloc) error {
	if err := h.f.Truncate(size); err != nil {
		return err
	}
	h.size.Store(size)
	return nil
}

// Map implements graph.Mapper.
func (h *HostFile) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	h.Leases.Add(1)
	m.Hold(hostLease{h})
	m.Add(blk.HostRange{FD: int(h.f.Fd()), Off: off, N: n})
	return nil
}

type hostLease struct{ h *HostFile }

// Release implements blk.Lease.
func (l hostLease) Release() { l.h.Leases.Add(-1) }

// CopyFrom implements graph.CopyRanger.
func (h *HostFile) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	for _, s := range src {
		b := make([]byte, s.N)
		if n, err := syscall.Pread(s.FD, b, s.Off); err != nil || n < len(b) {
			return syscall.EIO
		}
		if _, err := h.f.WriteAt(b, off); err != nil {
			return err
		}
		off += s.N
	}
	h.grew(off)
	return nil
}
