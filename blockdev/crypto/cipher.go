package crypto

import (
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"sync"

	//lint:ignore SA1019 disks from long ago use it
	"golang.org/x/crypto/cast5"
	//lint:ignore SA1019 the same
	"golang.org/x/crypto/twofish"

	"qblockd/schema/types"
)

// Cipher encrypts and decrypts the sectors of a disk. Its methods but Close may be called from any
// goroutine.
type Cipher struct {
	block   cipher.Block
	tweak   cipher.Block // of XTS
	essiv   cipher.Block // nil: another generator
	crypt   func(c *Cipher, s *scratch, dst, src []byte, sector uint64, encrypt bool)
	iv32    bool // numbers of sectors are cut to 32 bits
	memory  []*Key
	aesFast bool // block and tweak are *aesSchedule
}

// scratch is what one call needs beside its arguments. Nothing of it is secret for longer than the
// data.
type scratch struct {
	iv, tmp [16]byte
	tweaks  [fastSectors][16]byte
}

// fastSectors is how many sectors the fast path takes at a time.
const fastSectors = 8

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// New makes a Cipher of a key of s.KeySize() bytes, which the caller may overwrite then.
func New(s Spec, key []byte) (*Cipher, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if len(key) != s.KeySize() {
		return nil, fmt.Errorf("Key of %d bytes where the cipher needs %d", len(key), s.KeySize())
	}
	c := &Cipher{iv32: s.IV == types.QCryptoIVGenAlgorithmPlain}
	if err := c.open(s, key); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Cipher) open(s Spec, key []byte) (err error) {
	data := key[:algorithms[s.Alg].keySize]
	if c.block, err = c.newBlock(s.Alg, data); err != nil {
		return err
	}
	switch s.Mode {
	case types.QCryptoCipherModeEcb:
		c.crypt = (*Cipher).ecb
	case types.QCryptoCipherModeCbc:
		c.crypt = (*Cipher).cbc
	case types.QCryptoCipherModeCtr:
		c.crypt = (*Cipher).ctr
	case types.QCryptoCipherModeXts:
		c.crypt = (*Cipher).xts
		if c.tweak, err = c.newBlock(s.Alg, key[len(data):]); err != nil {
			return err
		}
		_, c.aesFast = c.block.(*aesSchedule)
	default:
		return fmt.Errorf("Unsupported cipher mode %s", s.Mode)
	}
	if s.IV == types.QCryptoIVGenAlgorithmEssiv {
		alg, err := s.essivAlg()
		if err != nil {
			return err
		}
		h := NewHash(s.IVHash)
		h.Write(key)
		salt := h.Sum(nil)
		defer Wipe(salt)
		if c.essiv, err = c.newBlock(alg, salt); err != nil {
			return err
		}
	}
	return nil
}

// newBlock makes a block cipher, its key schedule in memory of its own.
func (c *Cipher) newBlock(alg types.QCryptoCipherAlgorithm, key []byte) (b cipher.Block, err error) {
	var k *Key
	switch algorithms[alg].family {
	case "aes":
		b, k, err = newAES(key)
	case "serpent":
		var s *serpent
		if s, k, err = inKey[serpent](); err == nil {
			s.expand(key)
			b = s
		}
	case "twofish":
		var made, kept *twofish.Cipher
		if made, err = twofish.NewCipher(key); err != nil {
			return nil, err
		}
		if kept, k, err = inKey[twofish.Cipher](); err == nil {
			*kept = *made
			b = kept
		}
		*made = twofish.Cipher{}
	case "cast5":
		var made, kept *cast5.Cipher
		if made, err = cast5.NewCipher(key); err != nil {
			return nil, err
		}
		if kept, k, err = inKey[cast5.Cipher](); err == nil {
			*kept = *made
			b = kept
		}
		*made = cast5.Cipher{}
	}
	if k != nil {
		c.memory = append(c.memory, k)
	}
	return b, err
}

// Close overwrites the keys. The Cipher is not used any more.
func (c *Cipher) Close() {
	if c == nil {
		return
	}
	for _, k := range c.memory {
		k.Close()
	}
	*c = Cipher{}
}

// Encrypt encrypts whole sectors, the first of which has that number. dst and src are as long, and
// are the same memory or do not overlap.
func (c *Cipher) Encrypt(dst, src []byte, sector uint64) { c.run(dst, src, sector, true) }

// Decrypt undoes Encrypt.
func (c *Cipher) Decrypt(dst, src []byte, sector uint64) { c.run(dst, src, sector, false) }

func (c *Cipher) run(dst, src []byte, sector uint64, encrypt bool) {
	if len(src)%SectorSize != 0 || len(dst) != len(src) {
		panic("crypto: not whole sectors")
	}
	s := scratches.Get().(*scratch)
	switch {
	case c.aesFast:
		c.xtsFast(s, dst, src, sector, encrypt)
	default:
		for ; len(src) > 0; sector++ {
			c.crypt(c, s, dst[:SectorSize], src[:SectorSize], sector, encrypt)
			dst, src = dst[SectorSize:], src[SectorSize:]
		}
	}
	scratches.Put(s)
}

// vector writes the initialization vector of a sector to iv.
func (c *Cipher) vector(iv *[16]byte, sector uint64) {
	if c.iv32 {
		sector &= 1<<32 - 1
	}
	binary.LittleEndian.PutUint64(iv[:], sector)
	binary.LittleEndian.PutUint64(iv[8:], 0)
	if c.essiv != nil {
		n := c.essiv.BlockSize()
		c.essiv.Encrypt(iv[:n], iv[:n])
	}
}

// ecb has no use for an initialization vector.
func (c *Cipher) ecb(_ *scratch, dst, src []byte, _ uint64, encrypt bool) {
	n := c.block.BlockSize()
	for ; len(src) > 0; dst, src = dst[n:], src[n:] {
		if encrypt {
			c.block.Encrypt(dst[:n], src[:n])
		} else {
			c.block.Decrypt(dst[:n], src[:n])
		}
	}
}

func (c *Cipher) cbc(s *scratch, dst, src []byte, sector uint64, encrypt bool) {
	c.vector(&s.iv, sector)
	n := c.block.BlockSize()
	prev, next := s.iv[:n], s.tmp[:n]
	for ; len(src) > 0; dst, src = dst[n:], src[n:] {
		if encrypt {
			subtle.XORBytes(dst[:n], src[:n], prev)
			c.block.Encrypt(dst[:n], dst[:n])
			prev = dst[:n]
			continue
		}
		copy(next, src)
		c.block.Decrypt(dst[:n], src[:n])
		subtle.XORBytes(dst[:n], dst[:n], prev)
		prev, next = next, prev
	}
}

// ctr counts up from the initialization vector, which is one number, most significant byte first.
func (c *Cipher) ctr(s *scratch, dst, src []byte, sector uint64, _ bool) {
	c.vector(&s.iv, sector)
	n := c.block.BlockSize()
	for ; len(src) > 0; dst, src = dst[n:], src[n:] {
		c.block.Encrypt(s.tmp[:n], s.iv[:n])
		subtle.XORBytes(dst[:n], src[:n], s.tmp[:n])
		for i := n - 1; i >= 0; i-- {
			if s.iv[i]++; s.iv[i] != 0 {
				break
			}
		}
	}
}

// xts is IEEE 1619: block i of a sector is masked, before and after, with the encrypted
// initialization vector times x^i in GF(2^128).
func (c *Cipher) xts(s *scratch, dst, src []byte, sector uint64, encrypt bool) {
	c.vector(&s.iv, sector)
	t := &s.tmp
	c.tweak.Encrypt(t[:], s.iv[:])
	le := binary.LittleEndian
	for ; len(src) > 0; dst, src = dst[16:], src[16:] {
		lo, hi := le.Uint64(t[:]), le.Uint64(t[8:])
		a, b := le.Uint64(src)^lo, le.Uint64(src[8:])^hi
		le.PutUint64(dst, a)
		le.PutUint64(dst[8:], b)
		if encrypt {
			c.block.Encrypt(dst[:16], dst[:16])
		} else {
			c.block.Decrypt(dst[:16], dst[:16])
		}
		le.PutUint64(dst, le.Uint64(dst)^lo)
		le.PutUint64(dst[8:], le.Uint64(dst[8:])^hi)
		le.PutUint64(t[8:], hi<<1|lo>>63)
		le.PutUint64(t[:], lo<<1^0x87*(hi>>63))
	}
}
