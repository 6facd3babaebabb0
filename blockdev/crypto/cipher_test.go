package crypto

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/crypto/xts"
	"pgregory.net/rapid"

	"qblockd/schema/types"
)

// every lists all combinations that there are ciphers for, each with one hash for essiv.
func every() (out []Spec) {
	for _, alg := range types.QCryptoCipherAlgorithmValues {
		for _, mode := range types.QCryptoCipherModeValues {
			for _, iv := range types.QCryptoIVGenAlgorithmValues {
				for _, h := range []types.QCryptoHashAlgorithm{types.QCryptoHashAlgorithmSha256, types.QCryptoHashAlgorithmMd5} {
					s := Spec{Alg: alg, Mode: mode, IV: iv, IVHash: h}
					if s.Check() == nil {
						out = append(out, s)
					}
				}
			}
		}
	}
	return out
}

func seeded(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func mustNew(t testing.TB, s Spec, key []byte) *Cipher {
	t.Helper()
	c, err := New(s, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Many sectors at once are what they are one by one, in place or not, and decrypt to what they
// were.
func TestSectors(t *testing.T) {
	plain := seeded(11*SectorSize, 1)
	for _, s := range every() {
		c := mustNew(t, s, seeded(s.KeySize(), 2))
		const first = 1<<32 - 5 // where plain begins anew
		whole := make([]byte, len(plain))
		c.Encrypt(whole, plain, first)
		for i := range len(plain) / SectorSize {
			one := bytes.Clone(plain[i*SectorSize:][:SectorSize])
			c.Encrypt(one, one, first+uint64(i))
			if !bytes.Equal(one, whole[i*SectorSize:][:SectorSize]) {
				t.Errorf("%v: sector %d is another one alone", s, i)
			}
		}
		back := make([]byte, len(plain))
		c.Decrypt(back, whole, first)
		c.Decrypt(whole, whole, first)
		if !bytes.Equal(back, plain) || !bytes.Equal(whole, plain) {
			t.Errorf("%v: does not decrypt to what it was", s)
		}
	}
}

// The numbers of sectors matter as the generators say.
func TestVectors(t *testing.T) {
	for _, s := range every() {
		if s.Mode == types.QCryptoCipherModeEcb {
			continue
		}
		c := mustNew(t, s, seeded(s.KeySize(), 3))
		var a, b, wrapped [SectorSize]byte
		c.Encrypt(a[:], a[:], 7)
		c.Encrypt(b[:], b[:], 8)
		c.Encrypt(wrapped[:], wrapped[:], 1<<32+7)
		if a == b {
			t.Errorf("%v: sectors 7 and 8 look the same", s)
		}
		if same := s.IV == types.QCryptoIVGenAlgorithmPlain; (a == wrapped) != same {
			t.Errorf("%v: sectors 7 and 2^32+7 look the same: %v", s, !same)
		}
	}
}

// XTS with any number is what golang.org/x/crypto has, by the fast path and by the portable one.
func TestXTS(t *testing.T) {
	for _, alg := range []types.QCryptoCipherAlgorithm{types.QCryptoCipherAlgorithmAes128,
		types.QCryptoCipherAlgorithmAes192, types.QCryptoCipherAlgorithmAes256} {
		t.Run(string(alg), rapid.MakeCheck(func(rt *rapid.T) {
			s := Spec{Alg: alg, Mode: types.QCryptoCipherModeXts, IV: types.QCryptoIVGenAlgorithmPlain64}
			checkXTS(rt, t, s, rapid.SliceOfN(rapid.Byte(), s.KeySize(), s.KeySize()).Draw(rt, "key"),
				rapid.IntRange(1, 20).Draw(rt, "sectors"), rapid.Uint64().Draw(rt, "first"))
		}))
	}
}

type failer interface{ Fatalf(string, ...any) }

func checkXTS(f failer, t testing.TB, s Spec, key []byte, sectors int, first uint64) {
	c := mustNew(t, s, key)
	ref, err := xts.NewCipher(aes.NewCipher, key)
	if err != nil {
		f.Fatalf("%v", err)
	}
	plain, want := seeded(sectors*SectorSize, key[0]), make([]byte, sectors*SectorSize)
	for i := range sectors {
		ref.Encrypt(want[i*SectorSize:][:SectorSize], plain[i*SectorSize:][:SectorSize], first+uint64(i))
	}
	got := make([]byte, len(plain))
	for _, fast := range []bool{c.aesFast, false} {
		c.aesFast = fast
		c.Encrypt(got, plain, first)
		if !bytes.Equal(got, want) {
			f.Fatalf("fast %v: encrypts to something else", fast)
		}
		c.Decrypt(got, got, first)
		if !bytes.Equal(got, plain) {
			f.Fatalf("fast %v: decrypts to something else", fast)
		}
	}
}

// The same with whatever a fuzzer thinks of.
func FuzzXTS(f *testing.F) {
	f.Add([]byte("key"), uint8(3), uint64(1)<<63)
	f.Fuzz(func(t *testing.T, seed []byte, sectors uint8, first uint64) {
		s := Spec{Alg: "aes-256", Mode: "xts", IV: "plain64"}
		key := make([]byte, 64)
		copy(key, seed)
		checkXTS(t, t, s, key, int(sectors%32)+1, first)
	})
}

// Vectors of IEEE 1619: 4 with AES-128, of a whole sector, and 10 with AES-256.
func TestXTSStandard(t *testing.T) {
	for _, c := range []struct {
		alg    types.QCryptoCipherAlgorithm
		key    string
		sector uint64
		begins string
	}{
		{types.QCryptoCipherAlgorithmAes128, "2718281828459045235360287471352631415926535897932384626433832795", 0,
			"27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"},
		{types.QCryptoCipherAlgorithmAes256, "2718281828459045235360287471352662497757247093699959574966967627" +
			"3141592653589793238462643383279502884197169399375105820974944592", 0xff,
			"1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"},
	} {
		key, _ := hex.DecodeString(c.key)
		x := mustNew(t, Spec{Alg: c.alg, Mode: types.QCryptoCipherModeXts, IV: types.QCryptoIVGenAlgorithmPlain64}, key)
		b := make([]byte, SectorSize)
		for i := range b {
			b[i] = byte(i)
		}
		x.Encrypt(b, b, c.sector)
		if got := hex.EncodeToString(b[:32]); got != c.begins {
			t.Errorf("%s: begins with %s, want %s", c.alg, got, c.begins)
		}
	}
}

// Both implementations of AES have the same schedule.
func TestAES(t *testing.T) {
	for _, n := range []int{16, 24, 32} {
		for seed := range byte(50) {
			key := seeded(n, seed)
			a, k, err := newAES(key)
			if err != nil {
				t.Fatal(err)
			}
			b, _, err := portableAES(key)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range []func(b cipher.Block) func(dst, src []byte){
				func(b cipher.Block) func(dst, src []byte) { return b.Encrypt },
				func(b cipher.Block) func(dst, src []byte) { return b.Decrypt },
			} {
				got, want := seeded(16, seed), seeded(16, seed)
				f(a)(got, got)
				f(b)(want, want)
				if !bytes.Equal(got, want) {
					t.Errorf("key %x: %x, want %x", key, got, want)
				}
			}
			k.Close()
		}
	}
}

// CBC is what package crypto/cipher has.
func TestCBC(t *testing.T) {
	key := seeded(32, 9)
	c := mustNew(t, Spec{Alg: "aes-256", Mode: "cbc", IV: "plain64"}, key)
	b, _ := aes.NewCipher(key)
	plain := seeded(SectorSize, 4)
	got, want := make([]byte, SectorSize), make([]byte, SectorSize)
	iv := make([]byte, 16)
	iv[1] = 1
	cipher.NewCBCEncrypter(b, iv).CryptBlocks(want, plain)
	c.Encrypt(got, plain, 256)
	if !bytes.Equal(got, want) {
		t.Error("another result")
	}
}

// What there is no cipher for is refused in QEMU's words.
func TestCheck(t *testing.T) {
	for _, c := range []struct {
		s    Spec
		want string
	}{
		{Spec{Alg: "3des"}, "Algorithm '3des' not supported"},
		{Spec{Alg: "cast5-128", Mode: "xts", IV: "plain64"}, "Unsupported cipher mode xts"},
		{Spec{Alg: "cast5-128", Mode: "cbc", IV: "essiv", IVHash: "sha256"}, "Cipher cast5-128 not supported with essiv"},
		{Spec{Alg: "aes-256", Mode: "cbc", IV: "essiv", IVHash: "sha1"}, "No AES cipher with key size 20 available"},
		{Spec{Alg: "twofish-256", Mode: "cbc", IV: "essiv", IVHash: "sha512"}, "No Twofish cipher with key size 64 available"},
		{Spec{Alg: "serpent-256", Mode: "ecb", IV: "essiv", IVHash: "sha1"}, "No Serpent cipher with key size 20 available"},
	} {
		if _, err := New(c.s, make([]byte, 64)); err == nil || err.Error() != c.want {
			t.Errorf("%v: %v, want %s", c.s, err, c.want)
		}
	}
}

// A closed cipher has overwritten what it made of the key.
func TestClose(t *testing.T) {
	k, err := NewKey(64)
	if err != nil {
		t.Fatal(err)
	}
	copy(k.Bytes(), "secret")
	Wipe(k.Bytes())
	if !bytes.Equal(k.Bytes(), make([]byte, 64)) {
		t.Error("not overwritten")
	}
	k.Close()
	if k.Bytes() != nil {
		t.Error("still there")
	}
	k.Close()
	c := mustNew(t, Spec{Alg: "twofish-256", Mode: "xts", IV: "essiv", IVHash: "sha256"}, seeded(64, 1))
	if len(c.memory) != 3 {
		t.Errorf("%d keys in memory of their own, want 3", len(c.memory))
	}
	c.Close()
	if c.block != nil || c.memory != nil {
		t.Error("a closed cipher has keys")
	}
}

// No call allocates.
func TestAllocs(t *testing.T) {
	buf := make([]byte, 64<<10)
	for _, s := range every() {
		c := mustNew(t, s, seeded(s.KeySize(), 5))
		small := buf[:SectorSize]
		n := testing.AllocsPerRun(20, func() { c.Encrypt(small, small, 1); c.Decrypt(small, small, 1) })
		if n > 0.5 && !raceEnabled {
			t.Errorf("%v: %v allocations", s, n)
		}
	}
}

func BenchmarkCipher(b *testing.B) {
	for _, s := range every() {
		if s.IV != types.QCryptoIVGenAlgorithmPlain64 || s.IVHash != types.QCryptoHashAlgorithmSha256 {
			continue
		}
		c := mustNew(b, s, seeded(s.KeySize(), 5))
		for _, size := range []int{4 << 10, 1 << 20} {
			buf := make([]byte, size)
			for name, f := range map[string]func(dst, src []byte, sector uint64){"enc": c.Encrypt, "dec": c.Decrypt} {
				b.Run(fmt.Sprintf("%s-%s/%d/%s", s.Alg, s.Mode, size, name), func(b *testing.B) {
					b.SetBytes(int64(size))
					for b.Loop() {
						f(buf, buf, 99)
					}
				})
			}
		}
	}
}
