package interop

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/tests/daemon"
)

// mounts is how many file systems are mounted at the mountpoint.
func (w *fuseWorld) mounts() int {
	w.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	w.must(err)
	return strings.Count(string(table), " "+w.mp+" ")
}

// wantCut requires that a file whose export has gone says so.
func (w *fuseWorld) wantCut(f *os.File) {
	w.Helper()
	_, err := f.ReadAt(make([]byte, 512), 8<<20)
	if !errors.Is(err, syscall.ENOTCONN) && !errors.Is(err, syscall.ECONNABORTED) {
		w.Errorf("reading from a file whose export has gone: %v", err)
	}
}

// TestFUSEEnds: the mount goes in every way of ending, also when a program has the file open.
func TestFUSEEnds(t *testing.T) {
	ends := map[string]func(w *fuseWorld){
		"del": func(w *fuseWorld) { w.del("e") },
		"hard": func(w *fuseWorld) {
			w.q.Must(w, "block-export-del", map[string]any{"id": "e", "mode": "hard"})
			w.q.Wait(w, "BLOCK_EXPORT_DELETED", nil)
		},
		"quit": func(w *fuseWorld) {
			w.q.Must(w, "quit", nil)
			if !w.d.Ended(20 * time.Second) {
				w.Fatal("it does not end")
			}
		},
		"SIGTERM": func(w *fuseWorld) { w.d.Stop(w) },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			w := newFuseWorld(t, "", "qcow2")
			w.must(w.add("e", "fmt", w.mp, writable))
			f, err := os.Open(w.mp)
			w.must(err)
			defer f.Close()
			if w.mounts() != 1 {
				t.Fatal("nothing is mounted")
			}
			end(w)
			if w.mounts() != 0 {
				t.Error("the mount is still there")
			}
			w.wantCut(f)
			w.wantSh("stat -c %s mp", "0")
		})
	}
}

// TestFUSEUnmounted: somebody else may unmount the file; the export goes on to be one until it is
// removed, and what is mounted there later is left alone.
func TestFUSEUnmounted(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.d.LeavesNothing(t, func() {
		w.must(w.add("e", "fmt", w.mp, nil))
		w.sh("umount mp")
		w.sh("mount --bind noise mp")
		w.del("e")
		w.wantSh("cmp mp noise", "")
		w.sh("umount mp")
		w.must(w.add("e", "fmt", w.mp, nil))
		w.sh("mount --bind noise mp")
		w.del("e")
		w.wantSh("cmp mp noise", "")
		w.sh("umount mp; umount -l mp")
	})
}

// TestFUSEKilled: what a daemon that was killed leaves is taken over by the next one, and what was
// written and synced is there.
func TestFUSEKilled(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, writable))
	for round := range 3 {
		f, err := os.OpenFile(w.mp, os.O_RDWR, 0)
		w.must(err)
		defer f.Close()
		b := bytes.Repeat([]byte{byte(round + 1)}, 64<<10)
		_, err = f.WriteAt(b, int64(round)<<20)
		w.must(err)
		w.must(f.Sync())
		copy(w.noise[round<<20:], b)
		w.d.Kill()
		if !w.d.Ended(20 * time.Second) {
			t.Fatal("a killed daemon is still there")
		}
		w.wantCut(f)
		if _, err := os.Stat(w.mp); !errors.Is(err, syscall.ENOTCONN) {
			t.Errorf("what a killed daemon leaves: %v", err)
		}
		w.must(os.Remove(w.d.Pidfile()))
		w.start(daemon.Binary(t), "qcow2", "--export", "fuse,id=e,node-name=fmt,writable=on,mountpoint="+w.mp)
		if n := w.mounts(); n != 1 {
			t.Errorf("%d mounts", n)
		}
		if got, err := os.ReadFile(w.mp); err != nil || !bytes.Equal(got, w.noise) {
			t.Fatalf("round %d: the file differs: %v", round, err)
		}
	}
	w.del("e")
	if w.mounts() != 0 {
		t.Error("the mount is still there")
	}
}

// TestFUSEForeign: a dead mount that is not ours is not ours to take away.
func TestFUSEForeign(t *testing.T) {
	w := newFuseWorld(t, "", "raw")
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	w.must(err)
	w.must(unix.Mount("x", w.mp, "fuse.other", 0, fmt.Sprintf("fd=%d,rootmode=100000,user_id=0,group_id=0", dev)))
	unix.Close(dev)
	w.wantErr(w.add("e", "fmt", w.mp, nil), "Failed to stat '"+w.mp+"': Transport endpoint is not connected")
	if w.mounts() != 1 {
		t.Error("a mount of somebody else has gone")
	}
}

// TestFUSEStuck: an export goes, and its clients are told so, while storage does not answer; stat
// does not wait for that storage.
func TestFUSEStuck(t *testing.T) {
	for name, end := range map[string]func(w *fuseWorld){
		"hard": func(w *fuseWorld) { w.q.Must(w, "block-export-del", map[string]any{"id": "e", "mode": "hard"}) },
		"safe": func(w *fuseWorld) { w.q.Must(w, "block-export-del", map[string]any{"id": "e"}) },
		"quit": func(w *fuseWorld) { w.q.Must(w, "quit", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newFuseWorld(t, "", "raw")
			w.q.Must(t, "object-add", map[string]any{"qom-type": "throttle-group", "id": "g",
				"limits": map[string]any{"bps-total": 4096}})
			w.q.Must(t, "blockdev-add", daemon.Blockdev("throttle", "slow", map[string]any{"throttle-group": "g", "file": "fmt"}))
			w.must(w.add("e", "slow", w.mp, nil))
			w.stuck(end)
			w.d.Stop(t)
		})
	}
}

// stuck has many readers wait for an export, ends it, and requires that they fail.
func (w *fuseWorld) stuck(end func(w *fuseWorld)) {
	w.Helper()
	f, err := os.Open(w.mp)
	w.must(err)
	defer f.Close()
	failed := make(chan error, 8)
	for i := range cap(failed) {
		go func() {
			_, err := f.ReadAt(make([]byte, 1<<20), int64(i)<<20)
			failed <- err
		}()
	}
	if st, err := os.Stat(w.mp); err != nil || st.Size() != fuseSize || len(failed) > 0 {
		w.Error("stat of a stuck export: ", st, err)
	}
	end(w)
	for range cap(failed) {
		if err := <-failed; err == nil {
			w.Error("a read that cannot have ended has ended well")
		}
	}
	if w.mounts() != 0 {
		w.Error("the mount is still there")
	}
}

// TestFUSEOwnFile: a daemon opens the file that it serves itself, and exports that again.
func TestFUSEOwnFile(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	second := filepath.Join(filepath.Dir(w.mp), "mp2")
	w.must(os.WriteFile(second, nil, 0o600))
	t.Cleanup(func() { unmountAll(second) })
	w.must(w.add("e", "fmt", w.mp, writable))
	for range 20 {
		w.q.Must(t, "blockdev-add", daemon.Blockdev("raw", "again", map[string]any{"file": daemon.File(w.mp)}))
		w.must(w.add("f", "again", second, writable))
		w.sh("qemu-io -f raw -c 'write -P 9 1M 64k' -c 'read -P 9 1M 64k' mp2")
		w.sh("qemu-io -f raw -c 'read -P 9 1M 64k' mp")
		w.wantErr(w.add("g", "fmt", second, nil), "There already is a FUSE export on '"+second+"'")
		w.q.Must(t, "transaction", map[string]any{"actions": []any{
			map[string]any{"type": "block-dirty-bitmap-add", "data": map[string]any{"node": "fmt", "name": "b"}},
			map[string]any{"type": "block-dirty-bitmap-add", "data": map[string]any{"node": "again", "name": "b"}},
		}})
		w.q.Must(t, "block-dirty-bitmap-remove", map[string]any{"node": "fmt", "name": "b"})
		w.del("f")
		w.q.Must(t, "blockdev-del", map[string]any{"node-name": "again"})
	}
	w.q.Must(t, "blockdev-add", daemon.Blockdev("raw", "again", map[string]any{"file": daemon.File(w.mp)}))
	w.must(w.add("f", "again", second, writable))
	w.del("e")
	w.wantSh("head -c 1 mp2", "head: error reading 'mp2': Transport endpoint is not connected")
	w.d.Stop(t)
}

// TestFUSEOwnFileKilled: nothing keeps a daemon alive that has its own file open and is killed, or
// ends.
func TestFUSEOwnFileKilled(t *testing.T) {
	for name, signal := range map[string]syscall.Signal{"killed": syscall.SIGKILL, "ends": syscall.SIGTERM} {
		t.Run(name, func(t *testing.T) {
			w := newFuseWorld(t, "", "qcow2")
			second := filepath.Join(filepath.Dir(w.mp), "mp2")
			w.must(os.WriteFile(second, nil, 0o600))
			t.Cleanup(func() { unmountAll(second) })
			w.must(w.add("e", "fmt", w.mp, writable))
			w.q.Must(t, "blockdev-add", daemon.Blockdev("raw", "again", map[string]any{"file": daemon.File(w.mp)}))
			w.must(w.add("f", "again", second, writable))
			w.sh("dd if=mp2 bs=1M iflag=direct of=/dev/null status=none")
			w.sh("dd if=noise of=mp2 bs=1M conv=notrunc,fsync status=none")
			w.must(w.d.Cmd.Process.Signal(signal))
			if !w.d.Ended(20 * time.Second) {
				unmountAll(w.mp)
				t.Fatal("it does not end")
			}
		})
	}
}

// TestFUSEResized: a size that changes by QMP is seen at once.
func TestFUSEResized(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, nil))
	f, err := os.Open(w.mp)
	w.must(err)
	defer f.Close()
	for _, size := range []int64{32 << 20, 4 << 20, 8 << 20} {
		w.q.Must(t, "block_resize", map[string]any{"node-name": "fmt", "size": size})
		begin := time.Now()
		for {
			st, err := f.Stat()
			w.must(err)
			if st.Size() == size {
				break
			}
			if time.Since(begin) > 500*time.Millisecond { // the kernel would look by itself after a second
				t.Fatalf("size %d after a resize to %d", st.Size(), size)
			}
		}
	}
	if n, err := f.ReadAt(make([]byte, 8192), 8<<20-4096); n != 4096 || err == nil {
		t.Errorf("reading over the end: %d bytes, %v", n, err)
	}
}

// TestFUSEBesideNBD: a file is truncated unless somebody counts on the size.
func TestFUSEBesideNBD(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, writable))
	w.q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "n", "node-name": "fmt"})
	w.wantSh("truncate -s 20M mp", "truncate: failed to truncate 'mp' at 20971520 bytes: Operation not permitted")
	w.del("n")
	w.wantSh("truncate -s 20M mp; stat -c %s mp", "20971520")
	w.q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "n", "node-name": "fmt"})
}

// TestFUSERounds: exports come and go without leaving anything.
func TestFUSERounds(t *testing.T) {
	w := newFuseWorld(t, "", "raw")
	rounds := 1000
	if testing.Short() {
		rounds = 50
	}
	round := func(n int) {
		for range n {
			w.must(w.add("e", "fmt", w.mp, writable))
			f, err := os.OpenFile(w.mp, os.O_RDWR, 0)
			w.must(err)
			_, err = f.WriteAt(w.noise[:4096], 4096)
			w.must(err)
			f.Close()
			w.del("e")
		}
	}
	round(20)
	threads := func() int { return len(w.list("task")) }
	before, memory := threads(), w.d.RSS(t)
	w.d.LeavesNothing(t, func() { round(rounds) })
	if now := threads(); now > before+4 {
		t.Errorf("%d threads, %d before", now, before)
	}
	if now := w.d.RSS(t); now > memory+32<<20 {
		t.Errorf("%d bytes of memory, %d before", now, memory)
	}
}

// list are the entries of a folder of the daemon's in /proc.
func (w *fuseWorld) list(dir string) []os.DirEntry {
	w.Helper()
	l, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s", w.d.Cmd.Process.Pid, dir))
	w.must(err)
	return l
}

// unprivileged is a user's life with exports, as a script of bash. /dev/fuse is for all, as on most
// systems.
const unprivileged = `
mount --bind fuse /dev/fuse && mount -t tmpfs -o mode=1777 none /mnt && cp "$DAEMON" /mnt/qblockd && cd /mnt || exit 9
cat > user <<'END'
head -c 1M /dev/urandom > image; : > mp
start() {
	./qblockd --blockdev file,node-name=f,filename=image --export fuse,id=e,node-name=f,mountpoint=mp --pidfile pid &
	P=$!
	until [ -s pid ]; do kill -0 $P || exit 8; sleep 0.01; done
}
start; cmp mp image && exec 5<mp && kill $P && wait $P && stat -c %s mp
cat <&5 2>&1 | grep -o 'not connected' | head -1; exec 5<&-
start; kill -9 $P; wait $P 2>/dev/null; rm pid; stat mp 2>&1 | grep -o 'not connected'
start; cmp mp image && kill $P && wait $P && stat -c %s mp
./qblockd --blockdev file,node-name=f,filename=image --export fuse,id=e,node-name=f,mountpoint=mp,allow-other=on 2>&1 |
	grep -o 'Failed to mount FUSE session to export'
END
exec setpriv --reuid 65534 --regid 65534 --clear-groups bash user 2>/dev/null
`

// TestFUSEUnprivileged: users who may not mount do so by fusermount3.
func TestFUSEUnprivileged(t *testing.T) {
	needFUSE(t)
	need(t, "fusermount3", "unshare", "setpriv")
	dir := t.TempDir()
	if err := unix.Mknod(filepath.Join(dir, "fuse"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
		t.Skip("SKIPPED: no device files can be made: ", err)
	}
	if err := os.Chmod(filepath.Join(dir, "fuse"), 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "bash", "-c", unprivileged)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "DAEMON="+daemon.Binary(t))
	out, err := cmd.Output()
	const want = "0\nnot connected\nnot connected\n0\nFailed to mount FUSE session to export\n"
	if err != nil || string(out) != want {
		t.Errorf("%v: %q, not %q", err, out, want)
	}
}
