package luks

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/blockdev/crypto"
	"qblockd/schema/types"
)

// run executes a program; the test is skipped where it is not installed.
func run(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Skip(err)
	}
	c := exec.Command(args[0], args[1:]...)
	c.Stdin = strings.NewReader(stdin)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// cryptsetup opens what is made here. It has AES itself; for other ciphers it needs the kernel, and
// the right to ask it.
func TestCryptsetupOpens(t *testing.T) {
	for _, c := range []struct {
		crypto.Spec
		hash types.QCryptoHashAlgorithm
	}{
		{usual, "sha256"},
		{crypto.Spec{Alg: "aes-128", Mode: "cbc", IV: "essiv", IVHash: "sha256"}, "sha1"},
		{crypto.Spec{Alg: "aes-192", Mode: "cbc", IV: "plain64"}, "sha512"}, // no whole sectors of material
		{crypto.Spec{Alg: "aes-128", Mode: "xts", IV: "plain"}, "ripemd160"},
		{crypto.Spec{Alg: "aes-256", Mode: "cbc", IV: "plain"}, "sha384"},
	} {
		m, h, master := create(t, c.Spec, c.hash, "one")
		if err := h.SetKey(ctx, m, 3, master, []byte("two"), 0); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(t.TempDir(), "disk")
		data := make([]byte, h.PayloadOffset()+1<<20)
		copy(data, m.data)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if dump := run(t, "", "cryptsetup", "luksDump", name); !strings.Contains(dump, h.UUID) ||
			!strings.Contains(dump, fmt.Sprintf("%s-%s", h.Mode, h.IV)) || !strings.Contains(dump, "Key Slot 3: ENABLED") {
			t.Errorf("%v: %s", c, dump)
		}
		for _, password := range []string{"one", "two"} {
			run(t, password, "cryptsetup", "luksOpen", "--test-passphrase", "--key-file=-", name)
		}
	}
}

// What cryptsetup makes is opened.
func TestOpensCryptsetups(t *testing.T) {
	for _, args := range [][]string{
		nil,
		{"--cipher", "aes-cbc-essiv:sha256", "--hash", "sha1", "--key-size", "128"},
		{"--cipher", "aes-cbc-plain", "--hash", "sha512", "--key-size", "192"},
		{"--cipher", "aes-xts-plain", "--key-size", "256", "--hash", "ripemd160"},
	} {
		name := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(name, make([]byte, 4<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "sesame", append([]string{"cryptsetup", "luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000",
			"--key-file=-", name}, args...)...)
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		m := &memory{data: b}
		h, err := Read(m, false)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		key, err := h.Unlock(ctx, m, []byte("sesame"))
		if err != nil {
			t.Errorf("%v: %v", args, err)
		}
		key.Close()
	}
}
