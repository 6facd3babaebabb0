package interop

import (
	"bytes"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/tests/daemon"
)

// Exports as files. What both daemons do is asked of the real one, too.

const fuseSize = 16 << 20

// fuseWorld is a daemon, one of two, with an image full of noise as the nodes "file" and "fmt".
type fuseWorld struct {
	*testing.T
	d     *daemon.Daemon
	q     *daemon.QMP
	image string // the path of the image
	mp    string // an empty file to mount on
	noise []byte // what the disk holds
	real  bool   // the daemon is qemu-storage-daemon
}

// needFUSE skips the test where nobody can mount.
func needFUSE(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip("SKIPPED: no /dev/fuse: ", err)
	}
	f.Close()
	if err := unix.Unmount(t.TempDir(), 0); err == unix.EPERM {
		t.Skip("SKIPPED: no right to mount")
	}
}

// unmountAll takes what is still mounted at path away, however the test has ended.
func unmountAll(path string) {
	for unix.Unmount(path, unix.MNT_DETACH|unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW) == nil {
	}
}

// inBoth runs f as a test of both daemons.
func inBoth(t *testing.T, format string, f func(w *fuseWorld)) {
	needFUSE(t)
	t.Run("qblockd", func(t *testing.T) { f(newFuseWorld(t, "", format)) })
	t.Run("qemu-storage-daemon", func(t *testing.T) {
		bin, err := exec.LookPath("qemu-storage-daemon")
		if err != nil {
			t.Skip("SKIPPED: qemu-storage-daemon is not installed")
		}
		f(newFuseWorld(t, bin, format))
	})
}

// newFuseWorld starts a daemon, by default ours.
func newFuseWorld(t *testing.T, bin, format string) *fuseWorld {
	needFUSE(t)
	dir := t.TempDir()
	w := &fuseWorld{T: t, real: bin != "", image: filepath.Join(dir, "image"), mp: filepath.Join(dir, "mp"),
		noise: make([]byte, fuseSize)}
	t.Cleanup(func() {
		unmountAll(w.mp)
		unmountAll(w.image)
	})
	rand.Read(w.noise)
	raw := filepath.Join(dir, "noise")
	w.must(os.WriteFile(raw, w.noise, 0o600))
	w.must(os.WriteFile(w.mp, nil, 0o600))
	w.sh("qemu-img convert -f raw -O " + format + " noise image")
	if !w.real {
		bin = daemon.Binary(t)
	}
	w.start(bin, format)
	return w
}

func (w *fuseWorld) start(bin, format string, more ...string) {
	w.Helper()
	w.d = daemon.StartBinary(w, bin, filepath.Dir(w.mp), append([]string{
		"--blockdev", "driver=file,node-name=file,discard=unmap,filename=" + w.image,
		"--blockdev", "driver=" + format + ",node-name=fmt,file=file,discard=unmap"}, more...)...)
	w.q = w.d.Dial(w)
}

func (w *fuseWorld) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// sh runs a command of the shell in the world's folder and returns what it says. It must succeed.
func (w *fuseWorld) sh(command string) string {
	w.Helper()
	out, err := w.try(command)
	if err != nil {
		w.Fatalf("%s: %v\n%s", command, err, out)
	}
	return out
}

func (w *fuseWorld) try(command string) (string, error) {
	cmd := exec.Command("bash", "-c", command)
	cmd.Dir = filepath.Dir(w.mp)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// wantSh requires what a command says; no exit status.
func (w *fuseWorld) wantSh(command, want string) {
	w.Helper()
	if out, _ := w.try(command); out != want {
		w.Errorf("%s: %q, not %q", command, out, want)
	}
}

// add exports a node.
func (w *fuseWorld) add(id, node, mountpoint string, more map[string]any) error {
	a := map[string]any{"type": "fuse", "id": id, "node-name": node, "mountpoint": mountpoint}
	for k, v := range more {
		a[k] = v
	}
	_, err := w.q.Do("block-export-add", a)
	return err
}

// wantErr requires that adding an export fails so.
func (w *fuseWorld) wantErr(err error, text string) {
	w.Helper()
	var e *daemon.Error
	if !errors.As(err, &e) || e.Class != "GenericError" || e.Desc != text {
		w.Errorf("%v, not %s", err, text)
	}
}

// del removes an export and waits for the event.
func (w *fuseWorld) del(id string) {
	w.Helper()
	w.q.Must(w, "block-export-del", map[string]any{"id": id})
	w.q.Wait(w, "BLOCK_EXPORT_DELETED", map[string]any{"id": id})
}

var writable = map[string]any{"writable": true}

// TestFUSEErrors has the texts of both daemons for mountpoints that are none.
func TestFUSEErrors(t *testing.T) {
	inBoth(t, "qcow2", func(w *fuseWorld) {
		dir := filepath.Dir(w.mp)
		w.wantErr(w.add("e", "fmt", dir+"/nofile", nil), "Failed to stat '"+dir+"/nofile': No such file or directory")
		w.wantErr(w.add("e", "fmt", "", nil), "Failed to stat '': No such file or directory")
		w.wantErr(w.add("e", "fmt", w.mp+"/x", nil), "Failed to stat '"+w.mp+"/x': Not a directory")
		w.wantErr(w.add("e", "fmt", dir, nil), "'"+dir+"' is not a regular file")
		w.wantErr(w.add("e", "fmt", "/dev/null", nil), "'/dev/null' is not a regular file")
		w.must(w.add("e", "fmt", w.mp, nil))
		w.wantErr(w.add("f", "fmt", w.mp, nil), "There already is a FUSE export on '"+w.mp+"'")
		w.wantErr(w.add("e", "fmt", w.image, nil), "Block export id 'e' is already in use")
		w.del("e")
		if out := w.sh("stat -c %s mp"); out != "0" {
			w.Errorf("after the export the file has %s bytes", out)
		}
	})
}

// TestFUSEModes: who may do what with the file, by its mode.
func TestFUSEModes(t *testing.T) {
	inBoth(t, "raw", func(w *fuseWorld) {
		w.must(w.add("e", "fmt", w.mp, nil))
		w.wantSh("stat -c '%a %s %F' mp", "400 16777216 regular file")
		w.wantSh("chmod u+w mp", "chmod: changing permissions of 'mp': Read-only file system")
		w.wantSh("chmod u+x mp; stat -c %a mp", "500")
		w.wantSh("chown 1:2 mp; stat -c %u:%g mp", "1:2")
		w.wantSh("touch mp", "touch: setting times of 'mp': Operation not supported")
		w.wantSh("truncate -s 1M mp", "truncate: failed to truncate 'mp' at 1048576 bytes: Permission denied")
		w.wantSh("fallocate -p -l 1M mp", "fallocate: fallocate failed: Permission denied")
		w.wantSh("dd if=/dev/zero of=mp bs=4k count=1 conv=notrunc 2>&1 | head -1",
			"dd: error writing 'mp': Permission denied")
		w.del("e")
		w.must(w.add("e", "fmt", w.mp, map[string]any{"allow-other": "off"}))
		w.wantSh("chmod o+r mp", "chmod: changing permissions of 'mp': Operation not permitted")
		w.wantSh("chown 1:2 mp", "chown: changing ownership of 'mp': Operation not supported")
		w.wantSh("stat -c '%a %u' mp", "400 0")
	})
}

// TestFUSEReads: the file holds what the disk holds, however it is read.
func TestFUSEReads(t *testing.T) {
	inBoth(t, "qcow2", func(w *fuseWorld) {
		w.must(w.add("e", "fmt", w.mp, nil))
		w.wantSh("cmp mp noise", "")
		w.wantSh("qemu-img compare -f raw -F raw mp noise", "Images are identical.")
		w.wantSh("qemu-img info -f raw mp | grep 'virtual size'", "virtual size: 16 MiB (16777216 bytes)")
		w.wantSh("dd if=mp iflag=direct bs=1M status=none | cmp - noise", "")
		w.wantSh("dd if=mp iflag=direct bs=12k status=none | cmp - noise", "")
		w.wantSh("cp mp copy && cmp copy noise", "")
		w.wantSh("dd if=mp bs=1 skip=16777210 status=none | wc -c", "6")
		w.wantSh("dd if=mp bs=1M skip=17 status=none | wc -c", "0")
		w.mmap()
	})
}

// mmap compares the file as mapped memory.
func (w *fuseWorld) mmap() {
	w.Helper()
	f, err := os.Open(w.mp)
	w.must(err)
	defer f.Close()
	m, err := syscall.Mmap(int(f.Fd()), 0, fuseSize, syscall.PROT_READ, syscall.MAP_SHARED)
	w.must(err)
	defer func() { w.must(syscall.Munmap(m)) }()
	if !bytes.Equal(m, w.noise) {
		w.Error("mapped memory differs")
	}
}
