package luks

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"qblockd/blockdev/crypto"
	"qblockd/schema/types"
)

// DefaultMillis is how long PBKDF2 is to take if nothing is said, in milliseconds.
const DefaultMillis = 2000

// digestShare is how much shorter PBKDF2 is that checks the master key.
const digestShare = 8

// New makes a header without an active slot, and a master key, which the caller closes. spec and
// Hash of proto are looked at alone.
func New(ctx context.Context, proto Header, millis int64) (*Header, *crypto.Key, error) {
	h := &Header{Spec: proto.Spec, Hash: proto.Hash}
	if err := h.Check(); err != nil {
		return nil, nil, err
	}
	if len(h.Mode)+len(h.IV)+len(h.IVHash)+2 > 31 {
		return nil, nil, errors.New("Cipher spec is too long for the header")
	}
	slot := slotSectors(h.Spec)
	for i := range h.Slots {
		h.Slots[i] = Slot{Offset: align + uint32(i)*slot, Stripes: stripes}
	}
	h.Payload = align + Slots*slot
	h.UUID = newUUID()
	rand.Read(h.Salt[:])
	var err error
	if h.Iterations, err = iterations(ctx, h.Hash, digestSize, millis, digestShare); err != nil {
		return nil, nil, err
	}
	master, err := crypto.NewKey(h.KeySize())
	if err != nil {
		return nil, nil, err
	}
	rand.Read(master.Bytes())
	if err := crypto.DeriveKey(ctx, h.Hash, master.Bytes(), h.Salt[:], h.Iterations, h.Digest[:]); err != nil {
		master.Close()
		return nil, nil, err
	}
	return h, master, nil
}

// slotSectors is how far apart slots lie.
func slotSectors(s crypto.Spec) uint32 {
	return uint32(materialSectors(s.KeySize())+align-1) / align * align
}

// Room is how many bytes lie before the disk in a new image.
func Room(o *types.QblockdMeasureLUKS) (int64, error) {
	s := crypto.Spec{
		Alg: types.QCryptoCipherAlgorithmAes256, Mode: types.QCryptoCipherModeXts, IV: types.QCryptoIVGenAlgorithmPlain64,
	}
	if o.CipherAlg != nil {
		s.Alg = *o.CipherAlg
	}
	if o.CipherMode != nil {
		s.Mode = *o.CipherMode
	}
	return (align + Slots*int64(slotSectors(s))) * sector, s.Check()
}

// newUUID makes a random UUID.
func newUUID() string {
	var u [16]byte
	rand.Read(u[:])
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
