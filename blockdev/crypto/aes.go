package crypto

import (
	"crypto/aes"
	"crypto/cipher"
)

// portableAES is AES as package crypto/aes has it, which keeps the key schedule.
func portableAES(key []byte) (cipher.Block, *Key, error) {
	b, err := aes.NewCipher(key)
	return b, nil, err
}
