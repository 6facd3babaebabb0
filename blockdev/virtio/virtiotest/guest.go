// Package virtiotest is the other side of package virtio for tests: a guest's memory in a memfd,
// and drivers for split and packed queues, written a second time as simply as that can be.
package virtiotest

import (
	"fmt"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/virtio"
)

// Guest is memory that a front end shares with a device.
type Guest struct {
	FD   int
	Mem  []byte
	Base uint64 // physical address of Mem[0]
	User uint64 // address of Mem[0] in the front end's process
	used uint64 // bytes given out
}

// NewGuest makes size bytes of memory, a multiple of pages. It is gone with the test.
func NewGuest(t testing.TB, size int) *Guest {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	return &Guest{FD: fd, Mem: Map(t, fd, size), Base: 0x4000_0000, User: 0x7fff_1000_0000}
}

// Map maps the first size bytes of fd until the test ends.
func Map(t testing.TB, fd, size int) []byte {
	t.Helper()
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	return mem
}

// Regions cuts the memory into n regions of whole pages that touch.
func (g *Guest) Regions(m *virtio.Mapping, n int) (rs []virtio.Region) {
	const page = 4096
	pages := len(g.Mem) / page
	for i := range n {
		from, to := uint64(pages*i/n*page), uint64(pages*(i+1)/n*page)
		rs = append(rs, virtio.Region{Guest: g.Base + from, User: g.User + from, Size: to - from, Offset: from, Mapping: m})
	}
	return rs
}

// Memory is a device's view of it: a mapping of its own, in n regions, until the test ends.
func (g *Guest) Memory(t testing.TB, n int) *virtio.Memory {
	t.Helper()
	m := virtio.NewMapping(Map(t, g.FD, len(g.Mem)), func([]byte) {})
	mem, err := virtio.NewMemory(g.Regions(m, n))
	if err != nil {
		t.Fatal(err)
	}
	m.Release()
	t.Cleanup(mem.Release)
	return mem
}

// Alloc gives out n bytes at a multiple of align and returns their physical address.
func (g *Guest) Alloc(n, align int) uint64 {
	at := (g.used + uint64(align) - 1) &^ (uint64(align) - 1)
	if at+uint64(n) > uint64(len(g.Mem)) {
		panic(fmt.Sprintf("virtiotest: no %d bytes left of %d", n, len(g.Mem)))
	}
	g.used = at + uint64(n)
	return g.Base + at
}

// At is the memory at a physical address.
func (g *Guest) At(addr uint64, n int) []byte { return g.Mem[addr-g.Base:][:n:n] }

// UserOf is the front end's address of a physical one.
func (g *Guest) UserOf(addr uint64) uint64 { return addr - g.Base + g.User }

func (g *Guest) word(addr uint64) *uint32 {
	return (*uint32)(unsafe.Pointer(&g.Mem[addr-g.Base]))
}

// Load16 and Store16 access a field of a ring; the store is a barrier.
func (g *Guest) Load16(addr uint64) uint16 {
	return uint16(atomic.LoadUint32(g.word(addr&^3)) >> (8 * (addr & 2)))
}

func (g *Guest) Store16(addr uint64, v uint16) {
	w, shift := g.word(addr&^3), 8*(addr&2)
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}
