package crypto

import (
	"crypto/cipher"
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/cpu"
)

// hasAES tells whether the processor has the instructions that aes_amd64.s is made of.
var hasAES = cpu.X86.HasAES && cpu.X86.HasAVX

// aesSchedule is AES with the instructions of the processor. Beside being a cipher.Block it has the
// fast path of XTS.
type aesSchedule struct {
	enc, dec [15][16]byte
	rounds   int
}

// The functions of aes_amd64.s. rounds is 10, 12 or 14.

// aesSubWord puts each byte of a word through the S-box of AES.
//
//go:noescape
func aesSubWord(w uint32) uint32

// aesInvMix makes a round key for decryption.
//
//go:noescape
func aesInvMix(dst, src *[16]byte)

//go:noescape
func aesEncrypt(k *[15][16]byte, rounds int, dst, src *byte)

//go:noescape
func aesDecrypt(k *[15][16]byte, rounds int, dst, src *byte)

// aesEncrypt8 encrypts blocks in place.
//
//go:noescape
func aesEncrypt8(k *[15][16]byte, rounds int, b *[8][16]byte)

// aesXTSEncrypt encrypts sectors, at least one. Each has its encrypted initialization vector.
//
//go:noescape
func aesXTSEncrypt(k *[15][16]byte, rounds int, tweaks *[16]byte, dst, src *byte, sectors int)

//go:noescape
func aesXTSDecrypt(k *[15][16]byte, rounds int, tweaks *[16]byte, dst, src *byte, sectors int)

// newAES makes AES, and the memory that has its key schedule if that is ours.
func newAES(key []byte) (cipher.Block, *Key, error) {
	if !hasAES {
		return portableAES(key)
	}
	a, k, err := inKey[aesSchedule]()
	if err != nil {
		return nil, nil, err
	}
	a.expand(key)
	return a, k, nil
}

// expand makes the key schedule, as FIPS 197 has it. Words are little-endian.
func (a *aesSchedule) expand(key []byte) {
	n := len(key) / 4
	a.rounds = n + 6
	le := binary.LittleEndian
	word := func(i int) []byte { return a.enc[i/4][i%4*4:][:4] }
	for i := range n {
		copy(word(i), key[4*i:])
	}
	constant := uint32(1)
	for i := n; i < 4*(a.rounds+1); i++ {
		w := le.Uint32(word(i - 1))
		switch {
		case i%n == 0:
			w = aesSubWord(bits.RotateLeft32(w, -8)) ^ constant
			constant = constant<<1 ^ constant>>7*0x11b
		case n > 6 && i%n == 4:
			w = aesSubWord(w)
		}
		le.PutUint32(word(i), le.Uint32(word(i-n))^w)
	}
	a.dec[0], a.dec[a.rounds] = a.enc[a.rounds], a.enc[0]
	for i := 1; i < a.rounds; i++ {
		aesInvMix(&a.dec[i], &a.enc[a.rounds-i])
	}
}

// BlockSize implements cipher.Block.
func (a *aesSchedule) BlockSize() int { return 16 }

// Encrypt implements cipher.Block.
func (a *aesSchedule) Encrypt(dst, src []byte) {
	_, _ = dst[15], src[15]
	aesEncrypt(&a.enc, a.rounds, &dst[0], &src[0])
}

// Decrypt implements cipher.Block.
func (a *aesSchedule) Decrypt(dst, src []byte) {
	_, _ = dst[15], src[15]
	aesDecrypt(&a.dec, a.rounds, &dst[0], &src[0])
}

// xtsFast is xts for many sectors.
func (c *Cipher) xtsFast(s *scratch, dst, src []byte, sector uint64, encrypt bool) {
	data, tweak := c.block.(*aesSchedule), c.tweak.(*aesSchedule)
	for len(src) > 0 {
		n := min(len(src)/SectorSize, fastSectors)
		for i := range n {
			c.vector(&s.tweaks[i], sector+uint64(i))
		}
		aesEncrypt8(&tweak.enc, tweak.rounds, &s.tweaks)
		if encrypt {
			aesXTSEncrypt(&data.enc, data.rounds, &s.tweaks[0], &dst[0], &src[0], n)
		} else {
			aesXTSDecrypt(&data.dec, data.rounds, &s.tweaks[0], &dst[0], &src[0], n)
		}
		dst, src, sector = dst[n*SectorSize:], src[n*SectorSize:], sector+uint64(n)
	}
}
