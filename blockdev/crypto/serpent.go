package crypto

import (
	"encoding/binary"
	"math/bits"
)

// serpent is the block cipher Serpent of Anderson, Biham and Knudsen: 32 rounds, each an S-box that
// works on bit i of four words for all i at once, and a linear transformation.
type serpent [33][4]uint32

// expand makes the key schedule of a key of 16, 24 or 32 bytes.
func (s *serpent) expand(key []byte) {
	var w [140]uint32
	var padded [32]byte
	if copy(padded[:], key) < len(padded) {
		padded[len(key)] = 1
	}
	for i := range 8 {
		w[i] = binary.LittleEndian.Uint32(padded[4*i:])
	}
	const phi = 0x9e3779b9 // of the golden ratio
	for i := 8; i < len(w); i++ {
		w[i] = bits.RotateLeft32(w[i-8]^w[i-5]^w[i-3]^w[i-1]^phi^uint32(i-8), 11)
	}
	for i := range s {
		k := &s[i]
		k[0], k[1], k[2], k[3] = sboxes[(3-i)&7](w[8+4*i], w[9+4*i], w[10+4*i], w[11+4*i])
	}
	clear(w[:])
	clear(padded[:])
}

// BlockSize implements cipher.Block.
func (s *serpent) BlockSize() int { return 16 }

// Encrypt implements cipher.Block.
func (s *serpent) Encrypt(dst, src []byte) {
	le := binary.LittleEndian
	a, b, c, d := le.Uint32(src), le.Uint32(src[4:]), le.Uint32(src[8:]), le.Uint32(src[12:16])
	for i := 0; i < 32; i += 8 {
		a, b, c, d = mix(sbox0(s.add(i, a, b, c, d)))
		a, b, c, d = mix(sbox1(s.add(i+1, a, b, c, d)))
		a, b, c, d = mix(sbox2(s.add(i+2, a, b, c, d)))
		a, b, c, d = mix(sbox3(s.add(i+3, a, b, c, d)))
		a, b, c, d = mix(sbox4(s.add(i+4, a, b, c, d)))
		a, b, c, d = mix(sbox5(s.add(i+5, a, b, c, d)))
		a, b, c, d = mix(sbox6(s.add(i+6, a, b, c, d)))
		a, b, c, d = sbox7(s.add(i+7, a, b, c, d))
		if i < 24 { // the last round has a key in place of the transformation
			a, b, c, d = mix(a, b, c, d)
		}
	}
	a, b, c, d = s.add(32, a, b, c, d)
	put4(dst, a, b, c, d)
}

// Decrypt implements cipher.Block.
func (s *serpent) Decrypt(dst, src []byte) {
	le := binary.LittleEndian
	a, b, c, d := s.add(32, le.Uint32(src), le.Uint32(src[4:]), le.Uint32(src[8:]), le.Uint32(src[12:16]))
	for i := 24; i >= 0; i -= 8 {
		if i < 24 {
			a, b, c, d = unmix(a, b, c, d)
		}
		a, b, c, d = unsbox7(a, b, c, d)
		a, b, c, d = unsbox6(unmix(s.add(i+7, a, b, c, d)))
		a, b, c, d = unsbox5(unmix(s.add(i+6, a, b, c, d)))
		a, b, c, d = unsbox4(unmix(s.add(i+5, a, b, c, d)))
		a, b, c, d = unsbox3(unmix(s.add(i+4, a, b, c, d)))
		a, b, c, d = unsbox2(unmix(s.add(i+3, a, b, c, d)))
		a, b, c, d = unsbox1(unmix(s.add(i+2, a, b, c, d)))
		a, b, c, d = unsbox0(unmix(s.add(i+1, a, b, c, d)))
		a, b, c, d = s.add(i, a, b, c, d)
	}
	put4(dst, a, b, c, d)
}

func put4(dst []byte, a, b, c, d uint32) {
	le := binary.LittleEndian
	le.PutUint32(dst[12:16], d)
	le.PutUint32(dst[8:], c)
	le.PutUint32(dst[4:], b)
	le.PutUint32(dst, a)
}

// add adds the key of a round.
func (s *serpent) add(round int, a, b, c, d uint32) (uint32, uint32, uint32, uint32) {
	k := &s[round]
	return a ^ k[0], b ^ k[1], c ^ k[2], d ^ k[3]
}

// mix is the linear transformation.
func mix(a, b, c, d uint32) (uint32, uint32, uint32, uint32) {
	a, c = bits.RotateLeft32(a, 13), bits.RotateLeft32(c, 3)
	b = bits.RotateLeft32(b^a^c, 1)
	d = bits.RotateLeft32(d^c^a<<3, 7)
	a = bits.RotateLeft32(a^b^d, 5)
	c = bits.RotateLeft32(c^d^b<<7, 22)
	return a, b, c, d
}

// unmix is the inverse of mix.
func unmix(a, b, c, d uint32) (uint32, uint32, uint32, uint32) {
	c = bits.RotateLeft32(c, -22) ^ d ^ b<<7
	a = bits.RotateLeft32(a, -5) ^ b ^ d
	d = bits.RotateLeft32(d, -7) ^ c ^ a<<3
	b = bits.RotateLeft32(b, -1) ^ a ^ c
	return bits.RotateLeft32(a, -13), b, bits.RotateLeft32(c, -3), d
}
