package crypto

import (
	"syscall"
	"unsafe"
)

// Key is memory for a key, for what is made of one, or for a password: it is not swapped out and
// not in core dumps, where the host allows that, and is overwritten when it is closed. It holds no
// pointers. A nil Key has no bytes.
type Key struct{ mem []byte }

// madvDontDump is MADV_DONTDUMP.
const madvDontDump = 16

// NewKey makes memory of n bytes, which are 0.
func NewKey(n int) (*Key, error) {
	if n == 0 {
		return &Key{}, nil
	}
	mem, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return nil, err
	}
	// Both make things better where they work; neither is promised.
	_ = syscall.Mlock(mem)
	_ = syscall.Madvise(mem, madvDontDump)
	return &Key{mem}, nil
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
	Wipe(k.mem)
	_ = syscall.Munmap(k.mem[:cap(k.mem)]) // it is what Mmap returned
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
