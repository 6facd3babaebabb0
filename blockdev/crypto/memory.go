package crypto

import (
	"syscall"
	"unsafe"
)

// Key is memory for a key, or for what is made of one: it is not swapped out and not in core dumps,
// where the host allows that, and is overwritten when it is closed. It holds no pointers.
type Key struct{ mem []byte }

// madvDontDump is MADV_DONTDUMP.
const madvDontDump = 16

// NewKey makes memory of n bytes, which are 0.
func NewKey(n int) (*Key, error) {
	mem, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return nil, err
	}
	// Both make things better where they work; neither is promised.
	_ = syscall.Mlock(mem)
	_ = syscall.Madvise(mem, madvDontDump)
	return &Key{mem}, nil
}

// Bytes is the memory. Nobody uses it after Close.
func (k *Key) Bytes() []byte { return k.mem }

// Close overwrites the memory and gives it back.
func (k *Key) Close() {
	if k == nil || k.mem == nil {
		return
	}
	Wipe(k.mem)
	_ = syscall.Munmap(k.mem) // it is what Mmap returned
	k.mem = nil
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
