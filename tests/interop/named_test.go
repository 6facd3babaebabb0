package interop

import (
	"errors"
	"os/exec"
	"path/filepath"
	"testing"

	"qblockd/tests/daemon"
)

// TestEncryptedNames: a backing file that a name in JSON gives a secret and no format, as QEMU
// writes such names, is opened as its own header says.
func TestEncryptedNames(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("NOT TESTED: qemu-img is not installed")
	}
	dir := t.TempDir()
	img := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", args, out)
		}
	}
	secret := []string{"--object", "secret,id=s,data=abc"}
	create := append([]string{"create", "-q", "-f", "qcow2"}, secret...)
	for name, o := range map[string]string{
		"plain": "size=1M",
		"aes":   "size=1M,encrypt.format=aes,encrypt.key-secret=s",
		"luks":  "size=1M,encrypt.format=luks,encrypt.key-secret=s",
	} {
		img(append(create, "-o", o, filepath.Join(dir, name))...)
	}
	d := daemon.Start(t, dir, append(secret, "--image-policy", "references=on")...)
	q := d.Dial(t)
	const other = "Could not open backing file: Header reported 'aes' encryption format but options specify 'luks'"
	for _, c := range []struct{ base, format, want string }{
		{"plain", "", ""}, {"aes", "", ""}, {"luks", "", ""},
		{"aes", `,"encrypt.format":"aes"`, ""}, {"aes", `,"encrypt.format":"luks"`, other},
	} {
		name := `{"driver":"qcow2","encrypt.key-secret":"s","file.driver":"file","file.filename":"` +
			filepath.Join(dir, c.base) + `"` + c.format + `}`
		for driver, backing := range map[string]string{
			"qcow2": name,
			"raw":   `{"driver":"raw","file":` + name + `}`,
		} {
			top := filepath.Join(dir, "top")
			img("create", "-q", "-u", "-f", "qcow2", "-b", "json:"+backing, "-F", driver, top, "1M")
			_, err := q.Do("blockdev-add", daemon.Blockdev("qcow2", "n", map[string]any{"file": daemon.File(top)}))
			got := ""
			var refused *daemon.Error
			if errors.As(err, &refused) {
				got = refused.Desc
			} else if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("%s: %q, want %q", backing, got, c.want)
			}
			if err == nil {
				q.Must(t, "blockdev-del", map[string]any{"node-name": "n"})
			}
		}
	}
}
