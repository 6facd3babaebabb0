package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"qblockd/blockdev/crypto"
	"qblockd/schema/types"
)

// memory is a Store that fails at some step and can lose what was not flushed.
type memory struct {
	data, flushed []byte
	steps, failAt int // failAt 0: never
}

var errStep = errors.New("step fails")

func (m *memory) step() error {
	if m.steps++; m.steps == m.failAt {
		return errStep
	}
	return nil
}

func (m *memory) ReadAt(b []byte, off int64) error {
	clear(b)
	if off < int64(len(m.data)) {
		copy(b, m.data[off:])
	}
	return m.step()
}

func (m *memory) WriteAt(b []byte, off int64) error {
	if err := m.step(); err != nil {
		return err
	}
	if need := int(off) + len(b); need > len(m.data) {
		m.data = append(m.data, make([]byte, need-len(m.data))...)
	}
	copy(m.data[off:], b)
	return nil
}

func (m *memory) Flush() error {
	if err := m.step(); err != nil {
		return err
	}
	m.flushed = bytes.Clone(m.data)
	return nil
}

var ctx = context.Background()

// create makes a disk whose slot 0 opens with the password.
func create(
	t testing.TB, s crypto.Spec, hash types.QCryptoHashAlgorithm, password string,
) (*memory, *Header, *crypto.Key) {
	t.Helper()
	h, master, err := New(ctx, Header{Spec: s, Hash: hash}, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(master.Close)
	m := &memory{}
	if err := h.SetKey(ctx, m, 0, master, []byte(password), 0); err != nil {
		t.Fatal(err)
	}
	return m, h, master
}

var usual = crypto.Spec{Alg: "aes-256", Mode: "xts", IV: "plain64"}

// What is written is read again, with all ciphers and hashes; the payload is where QEMU has it.
func TestRoundTrip(t *testing.T) {
	payload := map[string]uint32{
		"aes-256-xts": 4040, "aes-128-cbc": 8 + 8*128, "aes-192-cbc": 8 + 8*192, "aes-192-xts": 8 + 8*376,
	}
	for _, alg := range types.QCryptoCipherAlgorithmValues {
		for _, mode := range types.QCryptoCipherModeValues {
			for _, hash := range types.QCryptoHashAlgorithmValues {
				s := crypto.Spec{Alg: alg, Mode: mode, IV: "plain64"}
				if s.Check() != nil || alg != "aes-256" && hash != "sha256" {
					continue
				}
				m, h, master := create(t, s, hash, "sesame")
				if want, ok := payload[fmt.Sprintf("%s-%s", alg, mode)]; ok && h.Payload != want {
					t.Errorf("%v: payload at %d, want %d", s, h.Payload, want)
				}
				got, err := Read(m, false)
				if err != nil {
					t.Fatal(err)
				}
				if *got != *h {
					t.Errorf("%v: read %+v, written %+v", s, got, h)
				}
				key, err := got.Unlock(ctx, m, []byte("sesame"))
				if err != nil || !bytes.Equal(key.Bytes(), master.Bytes()) {
					t.Errorf("%v %s: %v", s, hash, err)
				}
				key.Close()
			}
		}
	}
}

// Keys come and go; only those that are there open the disk.
func TestSlots(t *testing.T) {
	m, h, master := create(t, usual, "sha256", "one")
	opens := func(want ...string) {
		t.Helper()
		h, err := Read(m, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{"one", "two", "three"} {
			key, err := h.Unlock(ctx, m, []byte(p))
			key.Close()
			if ok := slices.Contains(want, p); ok != (err == nil) || !ok && err != ErrPassword {
				t.Errorf("password %s: %v", p, err)
			}
		}
	}
	opens("one")
	if err := h.SetKey(ctx, m, 7, master, []byte("two"), 0); err != nil {
		t.Fatal(err)
	}
	opens("one", "two")
	before := bytes.Clone(m.data[h.Slots[0].Offset*sector:][:4096])
	if err := h.Erase(m, 0); err != nil {
		t.Fatal(err)
	}
	opens("two")
	if bytes.Equal(before, m.data[h.Slots[0].Offset*sector:][:4096]) {
		t.Error("the material of an erased slot is still there")
	}
	if err := h.SetKey(ctx, m, 7, master, []byte("three"), 0); err != nil {
		t.Fatal(err)
	}
	opens("three")
}

// Whatever step fails, on disk and in memory the disk opens with what was not to be changed, and a
// slot is called active only when its material is on stable storage.
func TestFailures(t *testing.T) {
	for name, change := range map[string]func(h *Header, m *memory, master *crypto.Key) error{
		"set": func(h *Header, m *memory, master *crypto.Key) error {
			return h.SetKey(ctx, m, 1, master, []byte("two"), 0)
		},
		"erase": func(h *Header, m *memory, _ *crypto.Key) error { return h.Erase(m, 2) },
	} {
		for i := 1; ; i++ {
			m, h, master := create(t, usual, "sha1", "one")
			if err := h.SetKey(ctx, m, 2, master, []byte("three"), 0); err != nil {
				t.Fatal(err)
			}
			m.steps, m.failAt = 0, i
			err := change(h, m, master)
			failed := m.steps >= i
			if failed != errors.Is(err, errStep) {
				t.Fatalf("%s, step %d: %v", name, i, err)
			}
			for what, data := range map[string][]byte{"written": m.data, "flushed": m.flushed} {
				now := &memory{data: data}
				h, err := Read(now, false)
				if err != nil {
					t.Fatalf("%s, step %d, %s: %v", name, i, what, err)
				}
				for slot, password := range []string{"one", "two", "three"} {
					key, err := h.UnlockSlot(ctx, now, slot, []byte(password))
					key.Close()
					if err != nil || h.Slots[slot].Active && key == nil || !h.Slots[slot].Active && slot == 0 {
						t.Errorf("%s, step %d, %s: slot %d: %v", name, i, what, slot, err)
					}
				}
			}
			if !failed {
				break
			}
		}
	}
}

// Headers that contradict themselves are refused in QEMU's words.
func TestHostile(t *testing.T) {
	m, _, _ := create(t, crypto.Spec{Alg: "aes-256", Mode: "cbc", IV: "essiv", IVHash: "sha256"}, "sha256", "sesame")
	u32 := func(v uint32) string { return string([]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}) }
	xts, sha256 := "xts-plain64"+strings.Repeat("\x00", 21), "sha256"+strings.Repeat("\x00", 26)
	for _, c := range []struct {
		at         int
		data, want string
	}{
		{0, "X", "Volume is not in LUKS format"},
		{6, "\x00\x02", "LUKS version 2 is not supported"},
		{8, strings.Repeat("a", 32), "LUKS header cipher name is not NUL terminated"},
		{40, strings.Repeat("a", 32), "LUKS header cipher mode is not NUL terminated"},
		{72, strings.Repeat("a", 32), "LUKS header hash spec is not NUL terminated"},
		{8, "foo\x00", "Algorithm 'foo' with key size 32 bytes not supported"},
		{40, "cbc\x00", "Unexpected cipher mode string format 'cbc'"},
		{40, "foo-plain64\x00", "Cipher mode 'foo' not supported"},
		{40, "cbc-foo\x00", "IV generator 'foo' not supported"},
		{40, "cbc-essiv:foo\x00", "Hash algorithm 'foo' not supported"},
		{40, "cbc-essiv\x00", "Missing IV generator hash specification"},
		{40, "cbc-essiv:sha1\x00", "No AES cipher with key size 20 available"},
		{40, "cbc-plain:\x00", "Hash algorithm '' not supported"},
		{40, xts + sha256 + u32(2056) + u32(31), "XTS cipher key length should be a multiple of 2"},
		{72, "foo\x00", "Hash algorithm 'foo' not supported"},
		{104, u32(7), "LUKS payload is overlapping with the header"},
		{104, u32(8), "Keyslot 0 is overlapping with the encrypted payload"},
		{108, u32(0), "Algorithm 'aes' with key size 0 bytes not supported"},
		{108, u32(33), "Keyslots 0 and 1 are overlapping in the header"},
		{108, u32(1<<32 - 1), "Keyslot 0 is overlapping with the encrypted payload"},
		{104, u32(2055), "Keyslot 7 is overlapping with the encrypted payload"}, // it ends before, its place does not
		{164, u32(0), "LUKS key iteration count is zero"},
		{208, u32(5), "Keyslot 0 state (active/disable) is corrupted"},
		{256, u32(slotEnabled), "Keyslot 1 iteration count is zero"},
		{248, u32(7), "Keyslot 0 is overlapping with the LUKS header"},
		{248, u32(264), "Keyslots 0 and 1 are overlapping in the header"},
		{248, u32(9), "Keyslots 0 and 1 are overlapping in the header"}, // the same
		{252, u32(1), "Keyslot 0 is corrupted (stripes 1 != 4000)"},
		{252, u32(1<<32 - 1), "Keyslot 0 is corrupted (stripes -1 != 4000)"},
		{208 + 7*48 + 40, u32(1<<32 - 1), "Keyslot 7 is overlapping with the encrypted payload"},
	} {
		b := bytes.Clone(m.data[:HeaderSize])
		copy(b[c.at:], c.data)
		if _, err := Parse(b, false); err == nil || err.Error() != c.want {
			t.Errorf("%q at %d: %v, want %s", c.data, c.at, err, c.want)
		}
	}
}

// A header that passes is written as it was read, and says nothing that allocates much.
func FuzzParse(f *testing.F) {
	m, _, _ := create(f, usual, "sha256", "sesame")
	f.Add(m.data[:HeaderSize], false)
	m, _, _ = create(f, crypto.Spec{Alg: "serpent-192", Mode: "cbc", IV: "essiv", IVHash: "sha256"}, "ripemd160", "sesame")
	f.Add(m.data[:HeaderSize], true)
	copy(m.data[168:208], strings.Repeat("\xef", 40)) // a UUID that is no text
	f.Add(m.data[:HeaderSize], true)
	f.Fuzz(func(t *testing.T, b []byte, detached bool) {
		h, err := Parse(b, detached)
		if err != nil {
			return
		}
		if h.KeySize() > 64 || crypto.HashSize(h.Hash) == 0 || h.Check() != nil {
			t.Fatalf("%+v", h)
		}
		again, err := Parse(h.Bytes(), detached)
		if err != nil || *again != *h {
			t.Fatalf("%+v is read again as %+v, %v", h, again, err)
		}
	})
}

// What cannot be had in the time asked for is refused.
func TestIterations(t *testing.T) {
	_, err := iterations(ctx, "sha256", 32, 1<<62, 1)
	if err == nil || !strings.HasSuffix(err.Error(), "Numerical result out of range") {
		t.Errorf("%v", err)
	}
	if n, err := iterations(ctx, "sha256", 32, 1, 8); err != nil || n < minIterations {
		t.Errorf("%d, %v", n, err)
	}
}
