package interop

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/crypto/luks"
	"qblockd/tests/daemon"
)

// mapping is a piece of a process's memory.
type mapping struct {
	from, to uint64
	name     string
	flags    map[string]bool // VmFlags of smaps: "dd" is not in core dumps, "lo" is locked
}

// mappings are those that can be read.
func mappings(t *testing.T, pid int) (l []mapping) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var m mapping
		var perms, off, dev string
		var inode uint64
		if n, _ := fmt.Sscanf(line, "%x-%x %s %s %s %d", &m.from, &m.to, &perms, &off, &dev, &inode); n == 6 {
			m.name, m.flags = strings.TrimSpace(line), map[string]bool{}
			if perms[0] == 'r' {
				l = append(l, m)
			}
			continue
		}
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && len(l) > 0 {
			for _, f := range strings.Fields(flags) {
				l[len(l)-1].flags[f] = true
			}
		}
	}
	return l
}

// sightings looks for b in the memory of a process: where it is kept out of core dumps, and
// elsewhere.
func sightings(t *testing.T, pid int, b []byte) (kept int, open []string) {
	t.Helper()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Skipf("NOT TESTED: the memory of a child cannot be read: %v", err)
	}
	defer mem.Close()
	for _, m := range mappings(t, pid) {
		if strings.Contains(m.name, "[v") { // vvar, vsyscall
			continue
		}
		data, err := io.ReadAll(io.NewSectionReader(mem, int64(m.from), int64(m.to-m.from)))
		if err != nil && !errors.Is(err, unix.EIO) {
			t.Fatal(m.name, err)
		}
		switch n := bytes.Count(data, b); {
		case n > 0 && m.flags["dd"] && m.flags["lo"]:
			kept += n
		case n > 0:
			open = append(open, fmt.Sprintf("%d times in %s", n, m.name))
		}
	}
	return kept, open
}

// gone requires that b is nowhere in the memory of a process, or soon will not be: what credentials
// have is overwritten by the collector of garbage.
func gone(t *testing.T, what string, pid int, b []byte) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		kept, open := sightings(t, pid, b)
		if kept == 0 && len(open) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Errorf("%s is still in the memory of the daemon: %d %v", what, kept, open)
			return
		}
	}
}

// guardedWell requires that b is in the memory of a process, and only where no core dump shows it.
func guardedWell(t *testing.T, what string, pid int, b []byte) {
	t.Helper()
	if kept, open := sightings(t, pid, b); kept == 0 || len(open) > 0 {
		t.Errorf("%s: %d places are kept out of core dumps; others are %v", what, kept, open)
	}
}

// randomText is 40 characters that nobody else has.
func randomText() string {
	b := make([]byte, 20)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// imageStore is the header of a LUKS image in memory.
type imageStore []byte

func (s imageStore) ReadAt(b []byte, off int64) error {
	copy(b, s[off:])
	return nil
}
func (imageStore) WriteAt([]byte, int64) error { return errors.ErrUnsupported }
func (imageStore) Flush() error                { return nil }

// TestSecretsInMemory gives a daemon secrets in all ways but its command line: they are where core
// dumps do not have them, and nowhere once their objects are deleted.
func TestSecretsInMemory(t *testing.T) {
	dir := t.TempDir()
	d := daemon.Start(t, dir)
	q := d.Dial(t)
	pid := d.Cmd.Process.Pid
	file := filepath.Join(dir, "secret")
	for _, c := range []struct {
		name string
		make func(text string) map[string]any
	}{
		{"data", func(text string) map[string]any { return map[string]any{"qom-type": "secret", "data": text} }},
		{"data in base64", func(text string) map[string]any {
			return map[string]any{"qom-type": "secret", "data": base64.StdEncoding.EncodeToString([]byte(text)), "format": "base64"}
		}},
		{"file", func(text string) map[string]any {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			return map[string]any{"qom-type": "secret", "file": file}
		}},
		{"keyring", func(text string) map[string]any {
			serial, err := unix.AddKey("user", t.Name(), []byte(text), unix.KEY_SPEC_USER_KEYRING)
			if err != nil {
				t.Skipf("NOT TESTED: there are no keyrings: %v", err)
			}
			_, _ = unix.KeyctlInt(unix.KEYCTL_SETPERM, serial, 0x3f3f0000, 0, 0)
			t.Cleanup(func() { _, _ = unix.KeyctlInt(unix.KEYCTL_UNLINK, serial, unix.KEY_SPEC_USER_KEYRING, 0, 0) })
			return map[string]any{"qom-type": "secret_keyring", "serial": serial}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := randomText()
			args := c.make(text)
			args["id"] = "s"
			q.Must(t, "object-add", args)
			guardedWell(t, "the secret", pid, []byte(text))
			if s, ok := args["data"].(string); ok && s != text {
				gone(t, "the secret as it was written", pid, []byte(s))
			}
			for _, property := range []string{"data", "serial", "file", "format"} {
				out, err := q.Do("qom-get", map[string]any{"path": "/objects/s", "property": property})
				if strings.Contains(fmt.Sprint(string(out), err), text) {
					t.Errorf("%s gives the secret away", property)
				}
			}
			q.Must(t, "object-del", map[string]any{"id": "s"})
			gone(t, "the secret", pid, []byte(text))
			args["keyid"] = "nobody" // refused
			if _, err := q.Do("object-add", args); err == nil || strings.Contains(err.Error(), text) {
				t.Errorf("got %v", err)
			}
			gone(t, "a secret that was refused", pid, []byte(text))
			if strings.Contains(d.Stderr.String(), text) {
				t.Error("the log has the secret")
			}
		})
	}
	t.Run("encrypted by another", func(t *testing.T) { encryptedSecret(t, d, q) })
	t.Run("keys of TLS", func(t *testing.T) { keysOfTLS(t, d, q) })
	d.Stop(t)
}

// keysOfTLS has credentials that are a key.
func keysOfTLS(t *testing.T, d *daemon.Daemon, q *daemon.QMP) {
	pid, dir := d.Cmd.Process.Pid, d.Dir
	text := randomText()
	if err := os.WriteFile(filepath.Join(dir, "keys.psk"), []byte("qemu:"+text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	raw, _ := hex.DecodeString(text)
	q.Must(t, "object-add", map[string]any{"qom-type": "tls-creds-psk", "id": "c", "endpoint": "client", "dir": dir})
	guardedWell(t, "the key", pid, raw)
	q.Must(t, "object-del", map[string]any{"id": "c"})
	gone(t, "the key", pid, raw)
	gone(t, "the key as it was written", pid, []byte(text))
}

// encryptedSecret has a secret that is encrypted with another, as libvirt does.
func encryptedSecret(t *testing.T, d *daemon.Daemon, q *daemon.QMP) {
	need(t, "openssl")
	pid := d.Cmd.Process.Pid
	text := randomText()
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	if err := os.WriteFile(filepath.Join(d.Dir, "master"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	iv := "000102030405060708090a0b0c0d0e0f"
	data := strings.TrimSpace(sh(t, d.Dir, "printf %s | openssl enc -aes-256-cbc -K %x -iv %s -base64 -A", text, key, iv))
	q.Must(t, "object-add", map[string]any{"qom-type": "secret", "id": "k", "file": "master"})
	guardedWell(t, "the key", pid, key)
	q.Must(t, "object-add", map[string]any{"qom-type": "secret", "id": "s", "keyid": "k", "format": "base64", "data": data,
		"iv": "AAECAwQFBgcICQoLDA0ODw=="})
	guardedWell(t, "the secret", pid, []byte(text))
	q.Must(t, "object-del", map[string]any{"id": "s"})
	gone(t, "the secret", pid, []byte(text))
	q.Must(t, "object-del", map[string]any{"id": "k"})
	// What decrypted with it is the standard library's: it goes with the garbage, whenever its memory
	// is used again.
	if kept, open := sightings(t, pid, key); kept > 0 {
		t.Errorf("the key is in %d places, and %v", kept, open)
	}
}

// TestKeysOfDisksInMemory opens an encrypted disk: the password and the key of the disk are where
// core dumps do not have them, and nowhere once node and object are gone.
func TestKeysOfDisksInMemory(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	text := randomText()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// Where the machine is busy it cannot always tell how fast that is.
	sh(t, dir, "for i in 1 2 3 4 5 6 7 8 9; do "+
		"qemu-img create -q -f luks --object secret,id=s,file=secret -o key-secret=s,iter-time=100 disk 1M && break; done 2>&1")
	image, err := os.ReadFile(filepath.Join(dir, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	h, err := luks.Read(imageStore(image), false)
	if err != nil {
		t.Fatal(err)
	}
	master, err := h.Unlock(context.Background(), imageStore(image), []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	d := daemon.Start(t, dir)
	q := d.Dial(t)
	pid := d.Cmd.Process.Pid
	q.Must(t, "object-add", map[string]any{"qom-type": "secret", "id": "s", "file": "secret"})
	for range 3 {
		q.Must(t, "blockdev-add", map[string]any{"driver": "luks", "node-name": "n", "key-secret": "s", "file": daemon.File("disk")})
		q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n", "name": "x", "writable": true})
		sh(t, dir, "qemu-io -f raw -c 'write -P 7 0 1M' -c 'read -P 7 0 1M' '%s'", d.URI("x"))
		half := master.Bytes()[:32] // the key of one of the two ciphers of XTS
		guardedWell(t, "the key of the disk", pid, half)
		guardedWell(t, "the password", pid, []byte(text))
		q.Must(t, "block-export-del", map[string]any{"id": "e"})
		q.Wait(t, "BLOCK_EXPORT_DELETED", nil)
		q.Must(t, "blockdev-del", map[string]any{"node-name": "n"})
		gone(t, "the key of the disk", pid, half)
	}
	q.Must(t, "object-del", map[string]any{"id": "s"})
	gone(t, "the password", pid, []byte(text))
	d.Stop(t)
}
