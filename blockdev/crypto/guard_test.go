package crypto

import (
	"bytes"
	"math/rand/v2"
	"syscall"
	"testing"
)

// guarded is memory of n bytes that ends, or begins, where a page begins or ends that must not be
// touched.
func guarded(t *testing.T, n int, atEnd bool) []byte {
	t.Helper()
	page := syscall.Getpagesize()
	size := (n + page - 1) / page * page
	const prot, flags = syscall.PROT_READ | syscall.PROT_WRITE, syscall.MAP_PRIVATE | syscall.MAP_ANON
	mem, err := syscall.Mmap(-1, 0, size+2*page, prot, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Munmap(mem); err != nil {
			t.Error(err)
		}
	})
	for _, guard := range [][]byte{mem[:page], mem[page+size:]} {
		if err := syscall.Mprotect(guard, syscall.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	if atEnd {
		return mem[page+size-n:][:n]
	}
	return mem[page:][:n]
}

// No cipher touches what is beside its buffers, wherever they begin and whether they are the same
// memory or not, and sources stay as they were.
func TestBounds(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, s := range []Spec{
		{Alg: "aes-128", Mode: "xts", IV: "plain64"},
		{Alg: "aes-192", Mode: "xts", IV: "plain"},
		{Alg: "aes-256", Mode: "xts", IV: "plain64"},
		{Alg: "aes-256", Mode: "cbc", IV: "plain64"},
		{Alg: "serpent-256", Mode: "xts", IV: "plain64"},
	} {
		c := mustNew(t, s, seeded(s.KeySize(), 5))
		for sectors := range 20 {
			n, first := sectors*SectorSize, r.Uint64()
			plain, want := seeded(n, byte(sectors)), make([]byte, n)
			for i := range sectors {
				c.Encrypt(want[i*SectorSize:][:SectorSize], plain[i*SectorSize:][:SectorSize], first+uint64(i))
			}
			for _, atEnd := range []bool{false, true} {
				src, dst := guarded(t, n, atEnd), guarded(t, n, !atEnd)
				copy(src, plain)
				c.Encrypt(dst, src, first)
				if !bytes.Equal(dst, want) || !bytes.Equal(src, plain) {
					t.Fatalf("%v: %d sectors: another result, or another source", s, sectors)
				}
				c.Decrypt(src, dst, first)
				c.Decrypt(dst, dst, first)
				if !bytes.Equal(src, plain) || !bytes.Equal(dst, plain) {
					t.Fatalf("%v: %d sectors do not decrypt to what they were", s, sectors)
				}
			}
			checkOdd(t, c, r, plain, want, first)
		}
	}
}

// checkOdd is the same at odd addresses, with bytes around that stay as they were.
func checkOdd(t *testing.T, c *Cipher, r *rand.Rand, plain, want []byte, first uint64) {
	t.Helper()
	const margin = 64
	mem := bytes.Repeat([]byte{0xa5}, len(plain)+2*margin)
	at := 1 + r.IntN(margin-1)
	b := mem[at:][:len(plain)]
	copy(b, plain)
	c.Encrypt(b, b, first)
	if !bytes.Equal(b, want) {
		t.Fatalf("%d bytes at %d: another result", len(b), at)
	}
	around := append(bytes.Clone(mem[:at]), mem[at+len(b):]...)
	if !bytes.Equal(around, bytes.Repeat([]byte{0xa5}, len(around))) {
		t.Fatalf("%d bytes at %d: bytes beside them changed", len(b), at)
	}
}
