package luks

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"math"
	"syscall"

	"qblockd/blockdev/crypto"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Store is where the header is. Offsets count from its beginning.
type Store interface {
	// ReadAt reads zeroes behind the end.
	ReadAt(b []byte, off int64) error
	WriteAt(b []byte, off int64) error
	Flush() error
}

// Gated is a Store each access to which is made inside of a call, which passes the header as it is
// then to f.
type Gated func(f func(st Store) error) error

// ReadAt implements Store.
func (g Gated) ReadAt(b []byte, off int64) error {
	return g(func(st Store) error { return st.ReadAt(b, off) })
}

// WriteAt implements Store.
func (g Gated) WriteAt(b []byte, off int64) error {
	return g(func(st Store) error { return st.WriteAt(b, off) })
}

// Flush implements Store.
func (g Gated) Flush() error { return g(Store.Flush) }

// ErrPassword says that no slot opens with a password.
var ErrPassword = errors.New("Invalid password, cannot unlock any keyslot")

// Read reads the header of a disk.
func Read(st Store, detached bool) (*Header, error) {
	b := make([]byte, HeaderSize)
	if err := st.ReadAt(b, 0); err != nil {
		return nil, told(err, "Unable to read LUKS header")
	}
	return Parse(b, detached)
}

// Unlock finds the master key with a password. The caller closes it.
func (h *Header) Unlock(ctx context.Context, st Store, password []byte) (*crypto.Key, error) {
	for i := range h.Slots {
		if key, err := h.UnlockSlot(ctx, st, i, password); key != nil || err != nil {
			return key, err
		}
	}
	return nil, ErrPassword
}

// UnlockSlot is Unlock with one slot. There is no key if the password is another one, or the slot
// is not active.
func (h *Header) UnlockSlot(ctx context.Context, st Store, slot int, password []byte) (*crypto.Key, error) {
	s := &h.Slots[slot]
	if !s.Active {
		return nil, nil
	}
	c, err := h.slotCipher(ctx, s, password)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	material, err := crypto.NewKey(materialSectors(h.KeySize()) * sector)
	if err != nil {
		return nil, err
	}
	defer material.Close()
	b := material.Bytes()
	if err := st.ReadAt(b, int64(s.Offset)*sector); err != nil {
		return nil, told(err, "Failed to read key material")
	}
	c.Decrypt(b, b, 0)
	key, err := crypto.NewKey(h.KeySize())
	if err != nil {
		return nil, err
	}
	merge(h.Hash, b[:h.KeySize()*stripes], key.Bytes())
	var digest [digestSize]byte
	err = crypto.DeriveKey(ctx, h.Hash, key.Bytes(), h.Salt[:], h.Iterations, digest[:])
	if err != nil || subtle.ConstantTimeCompare(digest[:], h.Digest[:]) != 1 {
		key.Close()
		return nil, err
	}
	return key, nil
}

// slotCipher is the cipher of a slot's material.
func (h *Header) slotCipher(ctx context.Context, s *Slot, password []byte) (*crypto.Cipher, error) {
	key, err := crypto.NewKey(h.KeySize())
	if err != nil {
		return nil, err
	}
	defer key.Close()
	if err := crypto.DeriveKey(ctx, h.Hash, password, s.Salt[:], s.Iterations, key.Bytes()); err != nil {
		return nil, err
	}
	return crypto.New(h.Spec, key.Bytes())
}

// SetKey makes a slot active: it opens with the password then. PBKDF2 is to take about millis
// milliseconds of this host. When it fails the header is what it was.
func (h *Header) SetKey(
	ctx context.Context, st Store, slot int, master *crypto.Key, password []byte, millis int64,
) error {
	s := h.Slots[slot]
	iterations, err := iterations(ctx, h.Hash, h.KeySize(), millis, 1)
	if err != nil {
		return err
	}
	s.Active, s.Iterations = true, iterations
	rand.Read(s.Salt[:])
	c, err := h.slotCipher(ctx, &s, password)
	if err != nil {
		return err
	}
	defer c.Close()
	material, err := crypto.NewKey(materialSectors(h.KeySize()) * sector)
	if err != nil {
		return err
	}
	defer material.Close()
	b := material.Bytes()
	split(h.Hash, master.Bytes(), b[:h.KeySize()*stripes])
	c.Encrypt(b, b, 0)
	if err := st.WriteAt(b, int64(s.Offset)*sector); err != nil {
		return err
	}
	if err := st.Flush(); err != nil {
		return err
	}
	return h.store(st, slot, s)
}

// Erase makes a slot inactive and overwrites its material.
func (h *Header) Erase(st Store, slot int) error {
	s := h.Slots[slot]
	s.Active, s.Iterations, s.Salt = false, 0, [saltSize]byte{}
	if err := h.store(st, slot, s); err != nil {
		return err
	}
	b := make([]byte, materialSectors(h.KeySize())*sector)
	rand.Read(b)
	if err := st.WriteAt(b, int64(s.Offset)*sector); err != nil {
		return err
	}
	return st.Flush()
}

// store writes the header with one slot changed.
func (h *Header) store(st Store, slot int, s Slot) error {
	next := *h
	next.Slots[slot] = s
	if err := st.WriteAt(next.Bytes(), 0); err != nil {
		return err
	}
	h.Slots[slot] = s
	return st.Flush()
}

// minIterations is the least of all iterations.
const minIterations = 1000

// iterations is how many iterations of PBKDF2 take that long for keys of n bytes, divided by div.
func iterations(ctx context.Context, alg types.QCryptoHashAlgorithm, n int, millis, div int64) (uint32, error) {
	if millis == 0 {
		return minIterations, nil
	}
	perSecond, err := crypto.CountIterations(ctx, alg, n)
	if err != nil {
		return 0, err
	}
	if perSecond > math.MaxUint64/uint64(millis) {
		return 0, blk.Errnof(syscall.ERANGE, "PBKDF iterations %d too large to scale", perSecond)
	}
	scaled := perSecond * uint64(millis) / 1000 / uint64(div)
	if scaled > math.MaxUint32 {
		return 0, blk.Errnof(syscall.ERANGE, "PBKDF iterations %d larger than %d", scaled, uint32(math.MaxUint32))
	}
	return uint32(max(scaled, minIterations)), nil
}
