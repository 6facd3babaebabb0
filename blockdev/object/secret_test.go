package object

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/driver"
	"qblockd/schema/types"
)

func addSecret(r *Registry, id string, p *types.SecretProperties) error {
	return r.Add(&types.ObjectOptions{QomType: types.ObjectTypeSecret, ID: id, U: p})
}

// TestSecretFile reads secrets of all lengths from files, and from what is none.
func TestSecretFile(t *testing.T) {
	dir := t.TempDir()
	r := NewRegistry(nil)
	for _, n := range []int{0, 1, firstSecret - 1, firstSecret, firstSecret + 1, 5 * firstSecret, maxSecret - 1} {
		path, want := filepath.Join(dir, "f"), bytes.Repeat([]byte("s"), n)
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := addSecret(r, "s", &types.SecretProperties{File: &path}); err != nil {
			t.Fatal(n, err)
		}
		got, err := driver.Password(r, "s")
		if err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%d bytes: got %d, %v", n, len(got.Bytes()), err)
		}
		got.Close()
		if err := r.Del("s"); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{
		"/dev/zero":  "Unable to read /dev/zero: Error reading file “/dev/zero”: File too large",
		dir:          "Unable to read " + dir + ": Error reading file “" + dir + "”: Is a directory",
		dir + "/not": "Unable to read " + dir + "/not: Failed to open file “" + dir + "/not”: No such file or directory",
	} {
		if err := addSecret(r, "s", &types.SecretProperties{File: &path}); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// TestSecretGone has users of a secret that is deleted meanwhile: what they have got stays theirs,
// and there is no more of it.
func TestSecretGone(t *testing.T) {
	r := NewRegistry(nil)
	if err := addSecret(r, "s", &types.SecretProperties{Data: ptr("open sesame")}); err != nil {
		t.Fatal(err)
	}
	found := r.find("s").(*secret)
	found.mu.Lock()
	mem := found.key.Bytes()
	found.mu.Unlock()
	held, err := driver.Password(r, "s")
	if err != nil {
		t.Fatal(err)
	}
	if &mem[0] == &held.Bytes()[0] {
		t.Error("a user has the memory of the object")
	}
	if err := r.Del("s"); err != nil {
		t.Fatal(err)
	}
	if string(held.Bytes()) != "open sesame" {
		t.Errorf("a user has %q", held.Bytes())
	}
	held.Close()
	if _, ok, err := found.Secret(); ok || err != nil {
		t.Error("the secret is still there", err)
	}
	if _, err := driver.Password(r, "s"); err == nil || err.Error() != "No secret with id 's'" {
		t.Error(err)
	}
}

// TestSecretsAtOnce has secrets come, be used and go at once.
func TestSecretsAtOnce(t *testing.T) {
	r := NewRegistry(nil)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 200 {
				id := fmt.Sprintf("s%d", i%2)
				_ = addSecret(r, id, &types.SecretProperties{Data: ptr("open sesame")})
				if k, err := driver.Password(r, id); err == nil {
					if string(k.Bytes()) != "open sesame" {
						t.Errorf("got %q", k.Bytes())
					}
					k.Close()
				}
				_ = r.Del(id)
			}
		})
	}
	wg.Wait()
}

// TestPasswordTwice has two certificates whose keys one secret protects.
func TestPasswordTwice(t *testing.T) {
	r := NewRegistry(nil)
	if err := addSecret(r, "s", &types.SecretProperties{Data: ptr("123456")}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for from, to := range map[string]string{"cert.pem": "server-cert.pem", "ca.pem": "ca-cert.pem", "aes.pem": "server-key.pem"} {
		b, err := os.ReadFile("../tlscreds/testdata/encrypted/" + from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, to), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"a", "b"} {
		p := &types.TlsCredsX509Properties{Dir: &dir, Endpoint: ptr(types.QCryptoTLSCredsEndpointServer),
			SanityCheck: ptr(false), Passwordid: ptr("s")}
		if err := r.Add(&types.ObjectOptions{QomType: types.ObjectTypeTlsCredsX509, ID: id, U: p}); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// TestKeyOfCredentials is gone soon after its object.
func TestKeyOfCredentials(t *testing.T) {
	r := NewRegistry(nil)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "keys.psk"), []byte("qemu:0123456789abcdef\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &types.TlsCredsPskProperties{Dir: &dir, Endpoint: ptr(types.QCryptoTLSCredsEndpointClient)}
	if err := r.Add(&types.ObjectOptions{QomType: types.ObjectTypeTlsCredsPsk, ID: "t", U: p}); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	runtime.AddCleanup(r.find("t").(*presharedKeys).PSK, func(c chan struct{}) { close(c) }, gone)
	if err := r.Del("t"); err != nil {
		t.Fatal(err)
	}
	<-gone
}

// userKey makes a key of the kernel that this process may read.
func userKey(t *testing.T, b []byte) int {
	t.Helper()
	serial, err := unix.AddKey("user", "qblockd "+t.Name(), b, unix.KEY_SPEC_PROCESS_KEYRING)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		t.Skipf("NOT TESTED: this process has no keyrings: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return serial
}

// TestKeyring reads secrets that the kernel keeps.
func TestKeyring(t *testing.T) {
	// Keys belong to threads: those of the process are seen by threads that began after it had any.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	serial := int32(userKey(t, []byte("b3BlbiBzZXNhbWU=")))
	r := NewRegistry(nil)
	add := func(id string, p types.SecretKeyringProperties) error {
		return r.Add(&types.ObjectOptions{QomType: types.ObjectTypeSecretKeyring, ID: id, U: &p})
	}
	b64 := types.QCryptoSecretFormatBase64
	for id, want := range map[string]string{"raw": "b3BlbiBzZXNhbWU=", "base64": "open sesame"} {
		p := types.SecretKeyringProperties{Serial: serial}
		if id == "base64" {
			p.Format = &b64
		}
		if err := add(id, p); err != nil {
			t.Fatal(err)
		}
		k, err := driver.Password(r, id)
		if err != nil || string(k.Bytes()) != want {
			t.Errorf("%s: %q, %v", id, k.Bytes(), err)
		}
		k.Close()
		if v, err := r.Get("/objects/"+id, "serial"); err != nil || v != int64(serial) {
			t.Errorf("serial is %v, %v", v, err)
		}
		if err := r.Set("/objects/"+id, "serial", int64(5)); err == nil ||
			err.Error() != "Property 'secret_keyring.serial' is not writable" {
			t.Error(err)
		}
	}
	for _, c := range []struct {
		p    types.SecretKeyringProperties
		want string
	}{
		{types.SecretKeyringProperties{}, "'serial' should not be equal to 0"},
		{types.SecretKeyringProperties{Serial: 0x7ffffff1}, "Unable to read serial key 7ffffff1: Required key not available"},
		{types.SecretKeyringProperties{Serial: serial, Keyid: ptr("zz")}, "No secret with id 'zz'"},
		{types.SecretKeyringProperties{Serial: serial, Keyid: ptr("base64")}, "Key should be 32 bytes in length"},
	} {
		if err := add("x", c.p); err == nil || err.Error() != c.want {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
	// A key that was revoked after it was read is not asked for again.
	if _, err := unix.KeyctlInt(unix.KEYCTL_REVOKE, int(serial), 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	k, err := driver.Password(r, "raw")
	if err != nil || !strings.HasPrefix(string(k.Bytes()), "b3B") {
		t.Error(err)
	}
	k.Close()
	if err := add("x", types.SecretKeyringProperties{Serial: serial}); err == nil ||
		err.Error() != fmt.Sprintf("Unable to read serial key %08x: Key has been revoked", serial) {
		t.Error(err)
	}
}
