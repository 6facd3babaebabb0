package luks

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"hash"

	"qblockd/blockdev/crypto"
	"qblockd/schema/types"
)

// split spreads key over out, which is stripes times as long: all stripes but the last are random,
// and the last is what makes the sum of all, diffused in between, the key.
func split(alg types.QCryptoHashAlgorithm, key, out []byte) {
	n, h := len(key), crypto.NewHash(alg)
	rand.Read(out[:len(out)-n])
	sum := make([]byte, n)
	for i := 0; i < len(out)-n; i += n {
		subtle.XORBytes(sum, sum, out[i:i+n])
		diffuse(h, sum)
	}
	subtle.XORBytes(out[len(out)-n:], sum, key)
	crypto.Wipe(sum)
}

// merge undoes split.
func merge(alg types.QCryptoHashAlgorithm, in, key []byte) {
	n, h := len(key), crypto.NewHash(alg)
	clear(key)
	for i := 0; i < len(in)-n; i += n {
		subtle.XORBytes(key, key, in[i:i+n])
		diffuse(h, key)
	}
	subtle.XORBytes(key, key, in[len(in)-n:])
}

// diffuse replaces each piece of b, as long as the hash, with the hash of its number and itself.
func diffuse(h hash.Hash, b []byte) {
	var sum [64]byte
	var number [4]byte
	for i := uint32(0); len(b) > 0; i++ {
		piece := b[:min(h.Size(), len(b))]
		binary.BigEndian.PutUint32(number[:], i)
		h.Reset()
		h.Write(number[:])
		h.Write(piece)
		b = b[copy(piece, h.Sum(sum[:0])):]
	}
	crypto.Wipe(sum[:])
}
