package virtio

import (
	"encoding/binary"
	"errors"
	"sync/atomic"
	"unsafe"
)

// What driver and device share is little endian, and so must the host be: words are accessed
// atomically as they are.

// checkEndian refuses hosts of the other order.
func checkEndian() error {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return errors.New("virtqueues need a host that is little endian")
	}
	return nil
}

// addr is the address of b's first byte in this process.
func addr(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// word32 is the word at off in b, which starts at a multiple of 4, as off is one.
func word32(b []byte, off int) *uint32 { return (*uint32)(unsafe.Pointer(&b[off : off+4][0])) }

func load32(b []byte, off int) uint32 { return atomic.LoadUint32(word32(b, off)) }

func store32(b []byte, off int, v uint32) {
	stepped()
	atomic.StoreUint32(word32(b, off), v)
}

// word64 is the word of 64 bits at off in b, both multiples of 8.
func word64(b []byte, off int) *uint64 { return (*uint64)(unsafe.Pointer(&b[off : off+8][0])) }

func load64(b []byte, off int) uint64 { return atomic.LoadUint64(word64(b, off)) }

func store64(b []byte, off int, v uint64) {
	stepped()
	atomic.StoreUint64(word64(b, off), v)
}

// load16 reads the half of a word that is at off, a multiple of 2.
func load16(b []byte, off int) uint16 {
	return uint16(load32(b, off&^3) >> (8 * uint(off&2)))
}

// casTries bounds how often store16 meets somebody who writes to the other half.
const casTries = 1000

// errContended: the driver keeps writing to where only the device writes.
var errContended = errors.New("the driver writes to the device's half of a word")

// store16 writes the half of a word that is at off, a multiple of 2; the other half is not ours.
func store16(b []byte, off int, v uint16) error {
	w, shift := word32(b, off&^3), 8*uint(off&2)
	for range casTries {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return nil
		}
	}
	return errContended
}
