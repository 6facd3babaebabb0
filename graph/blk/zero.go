package blk

import "bytes"

// zeroMem is never written. It lives in the zero-initialised part of the program: pages of
// it that are only read cost no memory.
var zeroMem [ZeroMax + bufAlign]byte

// ZeroMax is the most that Zeroes gives, in bytes.
const ZeroMax = 1 << 20

// Zeroes is a page-aligned buffer of n zero bytes, n at most ZeroMax, for writing. It is
// shared: nobody may change it.
func Zeroes(n int) []byte {
	skip := alignSkip(zeroMem[:], bufAlign)
	return zeroMem[skip : skip+n : skip+n]
}

// IsZero tells whether b holds nothing but zeroes. It reads as little as it can of what
// does not, and at memory speed what does.
func IsZero(b []byte) bool {
	n := len(b)
	if n == 0 {
		return true
	}
	// Data that is not zero mostly shows it at one of these places.
	if b[0]|b[n/2]|b[n-1] != 0 {
		return false
	}
	// b[0] is zero and each byte equals the next one. The runtime's comparison is vectorised
	// and stops at the first difference.
	return bytes.Equal(b[:n-1], b[1:])
}

// IsZero tells whether v holds nothing but zeroes.
func (v Vec) IsZero() bool {
	if !IsZero(v.first) {
		return false
	}
	for _, b := range v.more {
		if !IsZero(b) {
			return false
		}
	}
	return true
}
