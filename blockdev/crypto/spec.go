package crypto

import (
	"fmt"

	"qblockd/schema/types"
)

// SectorSize is the unit of encryption, in bytes.
const SectorSize = 512

// Spec says how the sectors of a disk are encrypted.
type Spec struct {
	Alg  types.QCryptoCipherAlgorithm
	Mode types.QCryptoCipherMode
	IV   types.QCryptoIVGenAlgorithm
	// IVHash is what essiv hashes the key with.
	IVHash types.QCryptoHashAlgorithm
}

// algorithm is a block cipher with a certain length of its key.
type algorithm struct {
	family  string // name without the length of the key, as headers have it
	shown   string // as errors call the family
	keySize int
	block   int
}

var algorithms = map[types.QCryptoCipherAlgorithm]algorithm{
	types.QCryptoCipherAlgorithmAes128:     {"aes", "AES", 16, 16},
	types.QCryptoCipherAlgorithmAes192:     {"aes", "AES", 24, 16},
	types.QCryptoCipherAlgorithmAes256:     {"aes", "AES", 32, 16},
	types.QCryptoCipherAlgorithmCast5128:   {"cast5", "", 16, 8},
	types.QCryptoCipherAlgorithmSerpent128: {"serpent", "Serpent", 16, 16},
	types.QCryptoCipherAlgorithmSerpent192: {"serpent", "Serpent", 24, 16},
	types.QCryptoCipherAlgorithmSerpent256: {"serpent", "Serpent", 32, 16},
	types.QCryptoCipherAlgorithmTwofish128: {"twofish", "Twofish", 16, 16},
	types.QCryptoCipherAlgorithmTwofish192: {"twofish", "Twofish", 24, 16},
	types.QCryptoCipherAlgorithmTwofish256: {"twofish", "Twofish", 32, 16},
}

// Family is the name of the cipher without the length of its key.
func Family(alg types.QCryptoCipherAlgorithm) string { return algorithms[alg].family }

// HasFamily tells whether there is a cipher of that name, with any length of key.
func HasFamily(family string) bool {
	for _, a := range algorithms {
		if a.family == family {
			return true
		}
	}
	return false
}

// OfFamily is the cipher of a family whose keys have that many bytes.
func OfFamily(family string, keySize int) (types.QCryptoCipherAlgorithm, bool) {
	for _, alg := range types.QCryptoCipherAlgorithmValues {
		if a := algorithms[alg]; a.family == family && a.keySize == keySize {
			return alg, true
		}
	}
	return "", false
}

// KeySize is how many bytes the key of a disk has: two keys of the cipher for XTS.
func (s Spec) KeySize() int {
	n := algorithms[s.Alg].keySize
	if s.Mode == types.QCryptoCipherModeXts {
		n *= 2
	}
	return n
}

// essivAlg is the cipher that makes initialization vectors: of the same family, with keys as long
// as the hash.
func (s Spec) essivAlg() (types.QCryptoCipherAlgorithm, error) {
	a, digest := algorithms[s.Alg], HashSize(s.IVHash)
	if alg, ok := OfFamily(a.family, digest); ok {
		return alg, nil
	}
	if a.shown == "" {
		return "", fmt.Errorf("Cipher %s not supported with essiv", s.Alg)
	}
	return "", fmt.Errorf("No %s cipher with key size %d available", a.shown, digest)
}

// Check refuses combinations that there are no ciphers for.
func (s Spec) Check() error {
	a, ok := algorithms[s.Alg]
	if !ok {
		return fmt.Errorf("Algorithm '%s' not supported", s.Alg)
	}
	if s.IV == types.QCryptoIVGenAlgorithmEssiv {
		if _, err := s.essivAlg(); err != nil {
			return err
		}
	}
	if s.Mode == types.QCryptoCipherModeXts && a.block != 16 {
		return fmt.Errorf("Unsupported cipher mode %s", s.Mode)
	}
	return nil
}
