package crypto

import (
	"math/bits"
	"slices"
	"sync"
	"syscall"
	"unsafe"
)

// Key is memory for a key, for what is made of one, or for a password: it is not swapped out and
// not in core dumps, where the host allows that, and is overwritten when it is closed. It holds no
// pointers. A nil Key has no bytes.
type Key struct {
	mem  []byte
	slab *slab // that mem is a cell of; nil: mem is a mapping of its own
}

// madvDontDump is MADV_DONTDUMP.
const madvDontDump = 16

const (
	// minCell and maxCell bound what shares a mapping, in bytes.
	minCell, maxCell = 64, 8 << 10
	slabSize         = 64 << 10
	classes          = 8 // powers of two from minCell to maxCell
)

// slab is a mapping for keys of about one size, in cells of a power of two. What a process may
// lock, and how many mappings it may have, is little: a page for each key would be too much.
type slab struct {
	mem   []byte
	class int
	free  []int // cells
}

// slabs are those that have room, by class.
var slabs struct {
	sync.Mutex
	open [classes][]*slab // +checklocks:Mutex
}

func (s *slab) cell() int  { return minCell << s.class }
func (s *slab) cells() int { return len(s.mem) / s.cell() }

// mapped is memory of the kernel's, which is 0.
func mapped(n int) ([]byte, error) {
	mem, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return nil, err
	}
	// Both make things better where they work; neither is promised.
	_ = syscall.Mlock(mem)
	_ = syscall.Madvise(mem, madvDontDump)
	return mem, nil
}

// NewKey makes memory of n bytes, which are 0.
func NewKey(n int) (*Key, error) {
	if n == 0 {
		return &Key{}, nil
	}
	if n > maxCell {
		mem, err := mapped(n)
		if err != nil {
			return nil, err
		}
		return &Key{mem: mem}, nil
	}
	class := bits.Len(uint(max(n, minCell)-1)) - bits.Len(minCell-1)
	slabs.Lock()
	defer slabs.Unlock()
	open := slabs.open[class]
	if len(open) == 0 {
		mem, err := mapped(slabSize)
		if err != nil {
			return nil, err
		}
		s := &slab{mem: mem, class: class}
		for i := range s.cells() {
			s.free = append(s.free, i)
		}
		open = append(open, s)
	}
	s := open[len(open)-1]
	at := s.free[len(s.free)-1] * s.cell()
	if s.free = s.free[:len(s.free)-1]; len(s.free) == 0 {
		open = open[:len(open)-1]
	}
	slabs.open[class] = open
	return &Key{mem: s.mem[at : at+n : at+s.cell()], slab: s}, nil
}

// give takes a cell back, which has been overwritten. Of slabs that nobody uses one is kept.
func (s *slab) give(cell []byte) {
	at := int(uintptr(unsafe.Pointer(unsafe.SliceData(cell))) - uintptr(unsafe.Pointer(unsafe.SliceData(s.mem))))
	slabs.Lock()
	defer slabs.Unlock()
	s.free = append(s.free, at/s.cell())
	open := slabs.open[s.class]
	if len(s.free) == 1 {
		open = append(open, s)
	}
	if len(s.free) == s.cells() && len(open) > 1 {
		open = slices.DeleteFunc(open, func(x *slab) bool { return x == s })
		_ = syscall.Munmap(s.mem) // it is what Mmap returned
	}
	slabs.open[s.class] = open
}

// CopyKey makes memory that has a copy of b.
func CopyKey(b []byte) (*Key, error) {
	k, err := NewKey(len(b))
	if err != nil {
		return nil, err
	}
	copy(k.mem, b)
	return k, nil
}

// Bytes is the memory. Nobody uses it after Close.
func (k *Key) Bytes() []byte {
	if k == nil {
		return nil
	}
	return k.mem
}

// Shorten makes Bytes end after n of them. The others are overwritten.
func (k *Key) Shorten(n int) {
	if n < len(k.mem) {
		Wipe(k.mem[n:])
		k.mem = k.mem[:n]
	}
}

// Close overwrites the memory and gives it back.
func (k *Key) Close() {
	if k == nil || k.mem == nil {
		return
	}
	all := k.mem[:cap(k.mem)]
	Wipe(all)
	if k.slab != nil {
		k.slab.give(all)
	} else {
		_ = syscall.Munmap(all) // it is what Mmap returned
	}
	k.mem, k.slab = nil, nil
}

// Wipe overwrites what is not to be found in memory later.
//
//go:noinline
func Wipe(b []byte) { clear(b) }

// inKey makes a T in memory of its own. T holds no pointers.
func inKey[T any]() (*T, *Key, error) {
	var t T
	k, err := NewKey(int(unsafe.Sizeof(t)))
	if err != nil {
		return nil, nil, err
	}
	return (*T)(unsafe.Pointer(unsafe.SliceData(k.mem))), k, nil
}
