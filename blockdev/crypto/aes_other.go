//go:build !amd64

package crypto

import "crypto/cipher"

func newAES(key []byte) (cipher.Block, *Key, error) { return portableAES(key) }

// aesSchedule is for amd64 alone; here there is none.
type aesSchedule struct{ cipher.Block }

func (c *Cipher) xtsFast(*scratch, []byte, []byte, uint64, bool) { panic("crypto: no fast path") }
