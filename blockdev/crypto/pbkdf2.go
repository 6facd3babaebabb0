package crypto

import (
	"context"
	"crypto/hmac"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"runtime"
	"syscall"
	"time"

	"qblockd/schema/types"
)

// DeriveKey makes a key of a password, in out: PBKDF2 with HMAC of a hash (RFC 8018). How long that
// takes is for whoever wrote the number of iterations to decide, so it ends when ctx does.
func DeriveKey(
	ctx context.Context, alg types.QCryptoHashAlgorithm, password, salt []byte, iterations uint32, out []byte,
) error {
	h, ok := hashes[alg]
	if !ok {
		return fmt.Errorf("Hash algorithm '%s' not supported", alg)
	}
	mac := hmac.New(h.make, password)
	u, t := make([]byte, 0, h.size), make([]byte, h.size)
	defer func() { Wipe(u[:cap(u)]); Wipe(t) }()
	var number [4]byte
	for block := uint32(1); len(out) > 0; block++ {
		binary.BigEndian.PutUint32(number[:], block)
		mac.Reset()
		mac.Write(salt)
		mac.Write(number[:])
		u = mac.Sum(u[:0])
		copy(t, u)
		for i := uint32(1); i < iterations; i++ {
			if i%1024 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			mac.Reset()
			mac.Write(u)
			u = mac.Sum(u[:0])
			subtle.XORBytes(t, t, u)
		}
		out = out[copy(out, t):]
	}
	return nil
}

// measured is how long CountIterations measures at least, in processor time.
const measured = 50 * time.Millisecond

// CountIterations measures how many iterations of DeriveKey this host does in a second of processor
// time, for a key of n bytes.
func CountIterations(ctx context.Context, alg types.QCryptoHashAlgorithm, n int) (uint64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var password, salt [32]byte
	out := make([]byte, n)
	for iterations := uint64(1 << 10); ; {
		before, err := threadTime()
		if err != nil {
			return 0, err
		}
		if err := DeriveKey(ctx, alg, password[:], salt[:], uint32(iterations), out); err != nil {
			return 0, err
		}
		after, err := threadTime()
		if err != nil {
			return 0, err
		}
		took := after - before
		if took >= measured || iterations >= 1<<30 {
			return uint64(float64(iterations) / max(took, time.Microsecond).Seconds()), nil
		}
		iterations *= 4
	}
}

// threadTime is the processor time that the calling thread has had.
func threadTime() (time.Duration, error) {
	const thread = 1 // RUSAGE_THREAD
	var u syscall.Rusage
	if err := syscall.Getrusage(thread, &u); err != nil {
		return 0, err
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}
