package luks

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"qblockd/blockdev/crypto"
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
	slot := uint32(materialSectors(h.KeySize())+align-1) / align * align
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

// newUUID makes a random UUID.
func newUUID() string {
	var u [16]byte
	rand.Read(u[:])
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
