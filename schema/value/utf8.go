package value

import "math/bits"

// Strings of the wire are modified UTF-8, as in QEMU: UTF-8 in which U+0000 is
// the two bytes C0 80. A Go string that came from a parser therefore never holds a zero
// byte, and a name with a NUL in it can never be cut short by the kernel.

const invalidRune = -1

// minRune is the smallest code point that needs a sequence of the given length (from 2).
var minRune = [...]int{0x80, 0x800, 0x10000, 0x200000, 0x4000000}

// validRune tells whether cp is a Unicode character: no surrogate, no noncharacter.
func validRune(cp int) bool {
	nonCharacter := cp >= 0xFDD0 && cp <= 0xFDEF || cp&0xFFFE == 0xFFFE
	return cp <= 0x10FFFF && !nonCharacter && !(cp >= 0xD800 && cp <= 0xDFFF)
}

// decodeRune reads the sequence at the start of s (not empty). It returns the code point, or
// invalidRune, and the number of bytes that belong to the sequence: a broken sequence ends
// before the first byte that does not continue it. Sequences of up to six bytes are
// recognized as a whole so that each counts as one fault.
func decodeRune[T string | []byte](s T) (cp, n int) {
	c := s[0]
	switch {
	case c < 0x80:
		return int(c), 1
	case c >= 0xFE, c&0x40 == 0:
		return invalidRune, 1
	}
	length := bits.LeadingZeros8(^c)
	cp = int(c & (0x7F >> length))
	for n = 1; n < length; n++ {
		if n >= len(s) || s[n]&0xC0 != 0x80 {
			return invalidRune, n
		}
		cp = cp<<6 | int(s[n]&0x3F)
	}
	if !validRune(cp) || cp < minRune[length-2] && !(cp == 0 && length == 2) {
		cp = invalidRune
	}
	return cp, length
}

// appendRune appends a valid code point in modified UTF-8.
func appendRune(b []byte, cp int) []byte {
	switch {
	case cp > 0 && cp <= 0x7F:
		return append(b, byte(cp))
	case cp <= 0x7FF:
		return append(b, 0xC0|byte(cp>>6), 0x80|byte(cp&0x3F))
	case cp <= 0xFFFF:
		return append(b, 0xE0|byte(cp>>12), 0x80|byte(cp>>6&0x3F), 0x80|byte(cp&0x3F))
	}
	return append(b, 0xF0|byte(cp>>18), 0x80|byte(cp>>12&0x3F), 0x80|byte(cp>>6&0x3F), 0x80|byte(cp&0x3F))
}
