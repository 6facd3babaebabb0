package luks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"qblockd/blockdev/crypto"
	"qblockd/schema/types"
)

const (
	// HeaderSize is the length of the header without key material, in bytes.
	HeaderSize = 592
	// Slots is how many keys a header has room for.
	Slots = 8

	version     = 1
	stripes     = 4000
	sector      = crypto.SectorSize
	align       = 4096 / sector // of the slots' material, in sectors; the header has as many
	digestSize  = 20
	saltSize    = 32
	slotEnabled = 0x00ac71f3
	slotEmpty   = 0x0000dead
)

var magic = []byte("LUKS\xba\xbe")

// Header is what is said of an encrypted disk.
type Header struct {
	crypto.Spec
	// Hash is that of PBKDF2 and the splitter.
	Hash types.QCryptoHashAlgorithm
	// Payload is where the disk begins, in sectors after the header.
	Payload uint32
	// Digest is what PBKDF2 makes of the master key, with Salt and Iterations.
	Digest     [digestSize]byte
	Salt       [saltSize]byte
	Iterations uint32
	// UUID is a word for queries, any bytes, up to 40.
	UUID  string
	Slots [Slots]Slot
}

// Slot is a place for the key.
type Slot struct {
	Active     bool
	Iterations uint32
	Salt       [saltSize]byte
	Offset     uint32 // of its material, in sectors
	Stripes    uint32
}

// PayloadOffset is where the disk begins, in bytes after the header.
func (h *Header) PayloadOffset() int64 { return int64(h.Payload) * sector }

// materialSectors is how many sectors the material of a slot takes.
func materialSectors(keySize int) int { return (keySize*stripes + sector - 1) / sector }

// IsHeader tells whether a file that begins with head is a disk with such a header.
func IsHeader(head []byte) bool {
	return len(head) >= 8 && bytes.Equal(head[:8], append(magic, 0, version))
}

// Parse reads a header and refuses one that contradicts itself. b has HeaderSize bytes or more; if
// detached, the disk lies elsewhere.
func Parse(b []byte, detached bool) (*Header, error) {
	be := binary.BigEndian
	switch {
	case len(b) < HeaderSize || !bytes.Equal(b[:6], magic):
		return nil, errors.New("Volume is not in LUKS format")
	case be.Uint16(b[6:]) != version:
		return nil, fmt.Errorf("LUKS version %d is not supported", be.Uint16(b[6:]))
	}
	var words [3]string
	for i, what := range []string{"cipher name", "cipher mode", "hash spec"} {
		word, _, ok := bytes.Cut(b[8+32*i:][:32], []byte{0})
		if !ok {
			return nil, fmt.Errorf("LUKS header %s is not NUL terminated", what)
		}
		words[i] = string(word)
	}
	h := &Header{Payload: be.Uint32(b[104:]), Iterations: be.Uint32(b[164:])}
	keySize := be.Uint32(b[108:])
	copy(h.Digest[:], b[112:])
	copy(h.Salt[:], b[132:])
	uuid, _, _ := bytes.Cut(b[168:208], []byte{0})
	h.UUID = string(uuid)
	states := [Slots]uint32{}
	for i := range h.Slots {
		p, s := b[208+48*i:], &h.Slots[i]
		states[i] = be.Uint32(p)
		s.Active = states[i] == slotEnabled
		s.Iterations, s.Offset, s.Stripes = be.Uint32(p[4:]), be.Uint32(p[40:]), be.Uint32(p[44:])
		copy(s.Salt[:], p[8:])
	}
	if err := h.check(keySize, states, detached); err != nil {
		return nil, err
	}
	return h, h.spec(words, keySize)
}

// check refuses places that cannot be.
func (h *Header) check(keySize uint32, states [Slots]uint32, detached bool) error {
	switch {
	case !detached && h.Payload < align:
		return errors.New("LUKS payload is overlapping with the header")
	case h.Iterations == 0:
		return errors.New("LUKS key iteration count is zero")
	}
	n := (uint64(keySize)*stripes + sector - 1) / sector
	n = (n + align - 1) / align * align // QEMU opens no disk whose places are not whole
	for i := range h.Slots {
		s := &h.Slots[i]
		from := uint64(s.Offset)
		switch {
		case s.Stripes != stripes:
			return fmt.Errorf("Keyslot %d is corrupted (stripes %d != %d)", i, int32(s.Stripes), stripes)
		case from < align:
			return fmt.Errorf("Keyslot %d is overlapping with the LUKS header", i)
		case !s.Active && states[i] != slotEmpty:
			return fmt.Errorf("Keyslot %d state (active/disable) is corrupted", i)
		case s.Active && s.Iterations == 0:
			return fmt.Errorf("Keyslot %d iteration count is zero", i)
		case !detached && from+n > uint64(h.Payload):
			return fmt.Errorf("Keyslot %d is overlapping with the encrypted payload", i)
		}
		for j := i + 1; j < Slots; j++ {
			if o := uint64(h.Slots[j].Offset); from+n > o && o+n > from {
				return fmt.Errorf("Keyslots %d and %d are overlapping in the header", i, j)
			}
		}
	}
	return nil
}

// spec understands the words for cipher, mode and hash.
func (h *Header) spec(words [3]string, keySize uint32) error {
	mode, gen, ok := strings.Cut(words[1], "-")
	if !ok {
		return fmt.Errorf("Unexpected cipher mode string format '%s'", words[1])
	}
	gen, ivHash, hashed := strings.Cut(gen, ":")
	h.IVHash, h.Mode, h.Hash, h.IV = types.QCryptoHashAlgorithm(ivHash), types.QCryptoCipherMode(mode),
		types.QCryptoHashAlgorithm(words[2]), types.QCryptoIVGenAlgorithm(gen)
	if hashed && crypto.HashSize(h.IVHash) == 0 {
		return fmt.Errorf("Hash algorithm '%s' not supported", ivHash)
	}
	if !slices.Contains(types.QCryptoCipherModeValues, h.Mode) {
		return fmt.Errorf("Cipher mode '%s' not supported", mode)
	}
	size := keySize
	if h.Mode == types.QCryptoCipherModeXts {
		if keySize%2 != 0 {
			return errors.New("XTS cipher key length should be a multiple of 2")
		}
		size /= 2
	}
	if h.Alg, ok = crypto.OfFamily(words[0], int(size)); !ok || uint64(h.KeySize()) != uint64(keySize) {
		return fmt.Errorf("Algorithm '%s' with key size %d bytes not supported", words[0], size)
	}
	if crypto.HashSize(h.Hash) == 0 {
		return fmt.Errorf("Hash algorithm '%s' not supported", words[2])
	}
	if !slices.Contains(types.QCryptoIVGenAlgorithmValues, h.IV) {
		return fmt.Errorf("IV generator '%s' not supported", gen)
	}
	if h.IV == types.QCryptoIVGenAlgorithmEssiv && !hashed {
		return errors.New("Missing IV generator hash specification")
	}
	return h.Check()
}

// Bytes writes the header.
func (h *Header) Bytes() []byte {
	be := binary.BigEndian
	b := make([]byte, HeaderSize)
	copy(b, magic)
	be.PutUint16(b[6:], version)
	copy(b[8:39], crypto.Family(h.Alg))
	mode := string(h.Mode) + "-" + string(h.IV)
	if h.IVHash != "" {
		mode += ":" + string(h.IVHash)
	}
	copy(b[40:71], mode)
	copy(b[72:103], string(h.Hash))
	be.PutUint32(b[104:], h.Payload)
	be.PutUint32(b[108:], uint32(h.KeySize()))
	copy(b[112:], h.Digest[:])
	copy(b[132:], h.Salt[:])
	be.PutUint32(b[164:], h.Iterations)
	copy(b[168:208], h.UUID)
	for i := range h.Slots {
		p, s := b[208+48*i:], &h.Slots[i]
		be.PutUint32(p, slotEmpty)
		if s.Active {
			be.PutUint32(p, slotEnabled)
		}
		be.PutUint32(p[4:], s.Iterations)
		copy(p[8:], s.Salt[:])
		be.PutUint32(p[40:], s.Offset)
		be.PutUint32(p[44:], s.Stripes)
	}
	return b
}
