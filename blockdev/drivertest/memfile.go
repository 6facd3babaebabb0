package drivertest

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"qblockd/graph"
	"qblockd/graph/blk"
)

const pageSize = 4096

type page [pageSize]byte

// MemOptions make a MemFile behave like more difficult storage. The zero value is the
// most obliging kind: byte-granular, growing, everything native.
type MemOptions struct {
	Limits blk.Limits
	// WriteFlags and ZeroFlags are native; NewMemFile has all.
	WriteFlags, ZeroFlags blk.Flags
	// Fixed: writes beyond the end fail with ENOSPC and Resize is not supported.
	Fixed bool
	// NoZero, NoDiscard: these are not supported.
	NoZero, NoDiscard bool
	// Slow: a request that must not wait always would have to.
	Slow bool
}

// MemFile is a protocol driver whose medium is memory. It is sparse: a page that was never
// written, or was zeroed or discarded, is a hole. It grows by writes beyond its end. It panics when
// the graph breaks the contract (alignment, limits). The content outlives Close: the same
// MemFile can be opened again.
type MemFile struct {
	opts MemOptions

	mu    sync.RWMutex
	pages map[int64]*page // by off / pageSize; no page: zeroes
	size  atomic.Int64    // written under mu

	rec *recorder // the CrashFile's part, guarded by mu; nil: none

	// Counters of driver calls, for tests of the layers above.
	Reads, Writes, Zeros, Discards, Flushes, Resizes, Statuses atomic.Int64
}

// NewMemFile is a file of size zero bytes.
func NewMemFile(size int64) *MemFile {
	return NewMemFileOptions(size, MemOptions{
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		ZeroFlags:  blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
	})
}

// NewMemFileOptions is a file of size zero bytes with the given peculiarities.
func NewMemFileOptions(size int64, o MemOptions) *MemFile {
	m := &MemFile{opts: o, pages: map[int64]*page{}}
	m.size.Store(size)
	return m
}

// MemFileOf is a file with that content.
func MemFileOf(content []byte) *MemFile {
	m := NewMemFile(0)
	m.put(0, content)
	m.size.Store(int64(len(content)))
	return m
}

// Bytes is a copy of the whole content.
func (m *MemFile) Bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	b := make([]byte, m.size.Load())
	m.get(0, b)
	return b
}

// Same tells whether two files of any size have the same content.
func (m *MemFile) Same(o *MemFile) bool {
	a, b := m.Clone(), o.Clone()
	for i := range b.pages {
		if a.pages[i] == nil {
			a.pages[i] = &page{}
		}
	}
	for i, p := range a.pages {
		if q := b.pages[i]; q == nil && *p != (page{}) || q != nil && *p != *q {
			return false
		}
	}
	return a.Size() == b.Size()
}

// Clone is an independent file of the same content and options.
func (m *MemFile) Clone() *MemFile {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.cloneLocked()
}

func (m *MemFile) cloneLocked() *MemFile {
	c := NewMemFileOptions(m.size.Load(), m.opts)
	for i, p := range m.pages {
		c.pages[i] = new(*p)
	}
	return c
}

// Poke changes content behind the graph's back.
func (m *MemFile) Poke(off int64, b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(off, b)
	m.size.Store(max(m.size.Load(), off+int64(len(b))))
}

// get reads; holes and what lies beyond the end are zeroes. m.mu is held.
func (m *MemFile) get(off int64, b []byte) {
	for len(b) > 0 {
		in := off % pageSize
		k := min(pageSize-in, int64(len(b)))
		if p := m.pages[off/pageSize]; p != nil {
			copy(b[:k], p[in:])
		} else {
			clear(b[:k])
		}
		b, off = b[k:], off+k
	}
}

// put writes. m.mu is held.
func (m *MemFile) put(off int64, b []byte) {
	for len(b) > 0 {
		in := off % pageSize
		k := min(pageSize-in, int64(len(b)))
		p := m.pages[off/pageSize]
		if p == nil {
			p = new(page)
			m.pages[off/pageSize] = p
		}
		copy(p[in:], b[:k])
		b, off = b[k:], off+k
	}
}

// punch makes zeroes, holes where whole pages are covered. m.mu is held.
func (m *MemFile) punch(off, n int64) {
	if whole := n / pageSize; whole > int64(len(m.pages)) {
		// Of a huge range only what is there.
		for i := range m.pages {
			if at := i * pageSize; at >= off && at+pageSize <= off+n {
				delete(m.pages, i)
			}
		}
		head := min(blk.AlignUp(off, pageSize)-off, n)
		m.punch(off, head)
		off, n = blk.AlignDown(off+n, pageSize), (off+n)%pageSize
	}
	for n > 0 {
		in := off % pageSize
		k := min(pageSize-in, n)
		if p := m.pages[off/pageSize]; p != nil {
			if k == pageSize {
				delete(m.pages, off/pageSize)
			} else {
				clear(p[in : in+k])
			}
		}
		off, n = off+k, n-k
	}
}

// setSize grows or cuts. m.mu is held.
func (m *MemFile) setSize(size int64) {
	old := m.size.Load()
	if size < old {
		for i, p := range m.pages {
			switch at := i * pageSize; {
			case at >= size:
				delete(m.pages, i)
			case at+pageSize > size:
				clear(p[size-at:])
			}
		}
	}
	m.size.Store(size)
}

func (m *MemFile) check(what string, off, n, most int64) {
	if a := m.opts.Limits.RequestAlign; a > 1 && !blk.IsAligned(off, n, a) {
		panic(fmt.Sprintf("drivertest: %s of [%d, +%d) is not aligned to %d", what, off, n, a))
	}
	if most > 0 && n > most {
		panic(fmt.Sprintf("drivertest: %s of %d bytes exceeds the limit %d", what, n, most))
	}
	if off < 0 || n <= 0 {
		panic(fmt.Sprintf("drivertest: %s of [%d, +%d)", what, off, n))
	}
}

// Caps implements graph.Driver.
func (m *MemFile) Caps() graph.Caps {
	return graph.Caps{Limits: m.opts.Limits, WriteFlags: m.opts.WriteFlags, ZeroFlags: m.opts.ZeroFlags, ZeroInit: true}
}

// Size implements graph.Driver.
func (m *MemFile) Size() int64 { return m.size.Load() }

// Close implements graph.Driver.
func (m *MemFile) Close() error { return nil }

// ReadAt implements graph.Driver.
func (m *MemFile) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	m.check("read", off, v.Len(), m.opts.Limits.MaxTransfer)
	m.checkMem(v)
	if r.NoWait && m.opts.Slow {
		return blk.ErrWouldBlock
	}
	m.Reads.Add(1)
	m.mu.RLock()
	v.Each(func(b []byte) { m.get(off, b); off += int64(len(b)) })
	m.mu.RUnlock()
	return nil
}

func (m *MemFile) checkMem(v blk.Vec) {
	if a := m.opts.Limits.MemAlign; a > 1 && !v.Aligned(a, m.opts.Limits.RequestAlign) {
		panic(fmt.Sprintf("drivertest: buffers are not aligned to %d", a))
	}
}

// grow makes room for a write up to end. m.mu is held.
func (m *MemFile) grow(end int64) error {
	if end <= m.size.Load() {
		return nil
	}
	if m.opts.Fixed {
		return errNoSpace
	}
	m.size.Store(end)
	return nil
}

// WriteAt implements graph.Writer.
func (m *MemFile) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	m.check("write", off, n, m.opts.Limits.MaxTransfer)
	m.checkMem(v)
	if f&^m.opts.WriteFlags != 0 {
		panic(fmt.Sprintf("drivertest: write with foreign flags %#x", f))
	}
	if r.NoWait && m.opts.Slow {
		return blk.ErrWouldBlock
	}
	m.Writes.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.grow(off + n); err != nil {
		return err
	}
	m.rec.before(m, off, n)
	at := off
	v.Each(func(b []byte) { m.put(at, b); at += int64(len(b)) })
	m.rec.wrote(m, off, n, true, f&blk.FUA != 0)
	return nil
}

// Zero implements graph.Zeroer.
func (m *MemFile) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	m.check("zero", off, n, m.opts.Limits.MaxZero)
	if f&^m.opts.ZeroFlags != 0 {
		panic(fmt.Sprintf("drivertest: zero with foreign flags %#x", f))
	}
	if m.opts.NoZero {
		return blk.ErrNotSupported
	}
	if r.NoWait && m.opts.Slow {
		return blk.ErrWouldBlock
	}
	m.Zeros.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.grow(off + n); err != nil {
		return err
	}
	m.rec.before(m, off, n)
	m.punch(off, n)
	m.rec.wrote(m, off, n, false, f&blk.FUA != 0)
	return nil
}

// Discard implements graph.Discarder: the range reads as zeroes afterwards.
func (m *MemFile) Discard(r *blk.Req, off, n int64) error {
	m.check("discard", off, n, m.opts.Limits.MaxDiscard)
	if m.opts.NoDiscard {
		return blk.ErrNotSupported
	}
	m.Discards.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	if n = min(n, m.size.Load()-off); n > 0 {
		m.rec.before(m, off, n)
		m.punch(off, n)
		m.rec.wrote(m, off, n, false, false)
	}
	return nil
}

// Flush implements graph.Flusher.
func (m *MemFile) Flush(r *blk.Req) error {
	if r.NoWait && m.opts.Slow {
		return blk.ErrWouldBlock
	}
	m.Flushes.Add(1)
	m.mu.Lock()
	m.rec.flushed(m)
	m.mu.Unlock()
	return nil
}

// Resize implements graph.Resizer.
func (m *MemFile) Resize(ctx context.Context, size int64, p blk.Prealloc) error {
	if m.opts.Fixed || p != blk.PreallocOff && p != "" {
		return blk.ErrNotSupported
	}
	m.Resizes.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.size.Load()
	if size < old {
		m.rec.before(m, size, old-size)
	}
	m.setSize(size)
	m.rec.resized(m, old, size)
	return nil
}

// Status implements graph.BlockStatuser.
func (m *MemFile) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	m.Statuses.Add(1)
	m.mu.RLock()
	defer m.mu.RUnlock()
	data := m.pages[off/pageSize] != nil
	end := blk.AlignDown(off, pageSize) + pageSize
	if !data && n/pageSize > int64(len(m.pages)) {
		// Of a huge range only what is there.
		end = off + n
		for i := range m.pages {
			if at := i * pageSize; at > off {
				end = min(end, at)
			}
		}
		return blk.Extent{N: end - off, Zero: true, OffValid: true, MapOff: off}, nil
	}
	for end < off+n && (m.pages[end/pageSize] != nil) == data {
		end += pageSize
	}
	return blk.Extent{N: min(end-off, n), Data: data, Zero: !data, OffValid: true, MapOff: off}, nil
}

// ActualSize implements graph.Sizer.
func (m *MemFile) ActualSize() (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.pages)) * pageSize, nil
}
