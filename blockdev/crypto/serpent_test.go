package crypto

import (
	"bytes"
	"encoding/hex"
	"testing"
)

// sboxTables are the S-boxes as the definition of the cipher has them.
var sboxTables = [8][16]byte{
	{3, 8, 15, 1, 10, 6, 5, 11, 14, 13, 4, 2, 7, 0, 9, 12},
	{15, 12, 2, 7, 9, 0, 5, 10, 1, 11, 14, 8, 6, 13, 3, 4},
	{8, 6, 7, 9, 3, 12, 10, 15, 13, 1, 14, 4, 0, 11, 5, 2},
	{0, 15, 11, 8, 12, 9, 6, 3, 13, 1, 2, 4, 10, 7, 5, 14},
	{1, 15, 8, 3, 12, 0, 11, 6, 2, 5, 4, 10, 9, 14, 7, 13},
	{15, 5, 2, 11, 4, 10, 9, 12, 0, 3, 14, 8, 13, 6, 7, 1},
	{7, 2, 12, 5, 8, 4, 6, 11, 14, 9, 1, 15, 13, 3, 10, 0},
	{1, 13, 15, 0, 14, 8, 2, 11, 7, 4, 12, 10, 9, 3, 5, 6},
}

// All 16 inputs of an S-box at once: bit i of the words is input i.
func TestSerpentSboxes(t *testing.T) {
	var in [4]uint32
	for i := range 16 {
		for j := range in {
			in[j] |= uint32(i>>j&1) << i
		}
	}
	for n, table := range sboxTables {
		var out [4]uint32
		out[0], out[1], out[2], out[3] = sboxes[n](in[0], in[1], in[2], in[3])
		for i, want := range table {
			got := out[0]>>i&1 | out[1]>>i&1<<1 | out[2]>>i&1<<2 | out[3]>>i&1<<3
			if got != uint32(want) {
				t.Errorf("S-box %d of %d is %d, want %d", n, i, got, want)
			}
		}
		a, b, c, d := unsboxes[n](out[0], out[1], out[2], out[3])
		if back := [4]uint32{a & 0xffff, b & 0xffff, c & 0xffff, d & 0xffff}; back != in {
			t.Errorf("inverse S-box %d is not the inverse", n)
		}
	}
}

// Vectors of the authors' sets 1 for each length of keys, and ones of counting bytes.
func TestSerpentVectors(t *testing.T) {
	for _, c := range [][3]string{
		{"80000000000000000000000000000000", "00000000000000000000000000000000", "264e5481eff42a4606abda06c0bfda3d"},
		{"000102030405060708090a0b0c0d0e0f", "000102030405060708090a0b0c0d0e0f", "4c7d8a328072a22c823e4a1f3acda16d"},
		{"800000000000000000000000000000000000000000000000", "00000000000000000000000000000000", "9e274ead9b737bb21efcfca548602689"},
		{"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", "000102030405060708090a0b0c0d0e0f", "de269ff833e432b85b2e88d2701ce75c"},
	} {
		key, _ := hex.DecodeString(c[0])
		plain, _ := hex.DecodeString(c[1])
		want, _ := hex.DecodeString(c[2])
		var s serpent
		s.expand(key)
		got := make([]byte, 16)
		s.Encrypt(got, plain)
		if !bytes.Equal(got, want) {
			t.Errorf("key %s: %x, want %s", c[0], got, c[2])
		}
		s.Decrypt(got, got)
		if !bytes.Equal(got, plain) {
			t.Errorf("key %s: decrypts to %x", c[0], got)
		}
	}
}
