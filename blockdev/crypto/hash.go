package crypto

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"hash"

	//lint:ignore SA1019 disks from long ago use it
	"golang.org/x/crypto/ripemd160"

	"qblockd/schema/types"
)

var hashes = map[types.QCryptoHashAlgorithm]struct {
	size int
	make func() hash.Hash
}{
	types.QCryptoHashAlgorithmMd5:       {md5.Size, md5.New},
	types.QCryptoHashAlgorithmSha1:      {sha1.Size, sha1.New},
	types.QCryptoHashAlgorithmSha224:    {sha256.Size224, sha256.New224},
	types.QCryptoHashAlgorithmSha256:    {sha256.Size, sha256.New},
	types.QCryptoHashAlgorithmSha384:    {sha512.Size384, sha512.New384},
	types.QCryptoHashAlgorithmSha512:    {sha512.Size, sha512.New},
	types.QCryptoHashAlgorithmRipemd160: {ripemd160.Size, ripemd160.New},
}

// NewHash makes a hash, nil if there is none of that name.
func NewHash(alg types.QCryptoHashAlgorithm) hash.Hash {
	if h, ok := hashes[alg]; ok {
		return h.make()
	}
	return nil
}

// HashSize is the length of a hash in bytes, 0 if there is none of that name.
func HashSize(alg types.QCryptoHashAlgorithm) int { return hashes[alg].size }
