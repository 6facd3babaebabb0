package interop

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/tests/daemon"
)

// diskUser writes numbered blocks to a file, and reads what it has written, until it is to stop.
type diskUser struct {
	f      *os.File
	first  int64 // its own blocks
	blocks []uint64
	buf    []byte // page-aligned
	next   uint64
}

const userBlock = 4096

func (u *diskUser) at(i int) int64 { return u.first + int64(i)*userBlock }

// step does one thing, and requires that it is as it was written last.
func (u *diskUser) step(rng *rand.Rand) error {
	i := rng.IntN(len(u.blocks))
	switch rng.IntN(8) {
	case 0:
		return u.f.Sync()
	case 1:
		u.blocks[i] = 0
		return unix.Fallocate(int(u.f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, u.at(i), userBlock)
	case 2, 3, 4:
		u.next++
		u.blocks[i] = u.next
		for k := 0; k < userBlock; k += 8 {
			binary.LittleEndian.PutUint64(u.buf[k:], u.next)
		}
		_, err := u.f.WriteAt(u.buf, u.at(i))
		return err
	}
	return u.check(i)
}

func (u *diskUser) check(i int) error {
	if _, err := u.f.ReadAt(u.buf, u.at(i)); err != nil {
		return err
	}
	for k := 0; k < userBlock; k += 8 {
		if got := binary.LittleEndian.Uint64(u.buf[k:]); got != u.blocks[i] {
			return fmt.Errorf("at %d: %d, not %d", u.at(i), got, u.blocks[i])
		}
	}
	return nil
}

// users makes several of the file, by turns with and without O_DIRECT, each with its own part of
// the first half, which reads as zeroes; and lets them work until stop, which fails the test if
// something is wrong.
func (w *fuseWorld) users(count int) (stop func()) {
	w.Helper()
	var over atomic.Bool
	var all sync.WaitGroup
	for k := range count {
		f, err := os.OpenFile(w.mp, os.O_RDWR|k%2*syscall.O_DIRECT, 0)
		w.must(err)
		buf, err := syscall.Mmap(-1, 0, userBlock, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
		w.must(err)
		part := int64(fuseSize / 2 / count)
		u := &diskUser{f: f, first: int64(k) * part, blocks: make([]uint64, part/userBlock), buf: buf, next: uint64(k) << 32}
		w.must(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, u.first, part))
		all.Go(func() {
			defer f.Close()
			defer syscall.Munmap(buf)
			rng := rand.New(rand.NewPCG(uint64(k), 1))
			for !over.Load() {
				if err := u.step(rng); err != nil {
					w.Error(err)
					return
				}
			}
			for i := range u.blocks {
				if err := u.check(i); err != nil {
					w.Error(err)
					return
				}
			}
		})
	}
	return func() {
		over.Store(true)
		all.Wait()
	}
}

// TestFUSEMoves: the file goes on to be the disk while snapshots are taken, committed, and the disk
// is mirrored to another file and moved there.
func TestFUSEMoves(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, writable))
	stop := w.users(4)
	dir := filepath.Dir(w.mp)
	w.q.Must(t, "blockdev-snapshot-sync", map[string]any{"node-name": "fmt", "snapshot-node-name": "top",
		"snapshot-file": dir + "/top", "format": "qcow2"})
	w.q.Must(t, "block-commit", map[string]any{"job-id": "c", "device": "top"})
	w.q.Wait(t, "BLOCK_JOB_READY", map[string]any{"device": "c"})
	w.q.Must(t, "job-complete", map[string]any{"id": "c"})
	w.q.Wait(t, "BLOCK_JOB_COMPLETED", map[string]any{"device": "c"})
	for i := range 3 {
		name := fmt.Sprintf("copy%d", i)
		w.sh(fmt.Sprintf("truncate -s %d %s", fuseSize, name))
		w.q.Must(t, "blockdev-add", daemon.Blockdev("raw", name, map[string]any{"file": daemon.File(dir + "/" + name)}))
		from := "fmt"
		if i > 0 {
			from = fmt.Sprintf("copy%d", i-1)
		}
		w.q.Must(t, "blockdev-mirror", map[string]any{"job-id": name, "device": from, "target": name, "sync": "full"})
		w.q.Wait(t, "BLOCK_JOB_READY", map[string]any{"device": name})
		w.q.Must(t, "job-complete", map[string]any{"id": name})
		w.q.Wait(t, "BLOCK_JOB_COMPLETED", map[string]any{"device": name})
	}
	stop()
	if out := string(w.q.Must(t, "query-block-exports", nil)); !strings.Contains(out, `"copy2"`) {
		t.Error("the export has not moved: ", out)
	}
	w.del("e")
	w.d.Stop(t)
	half := w.sh("tail -c 8388608 copy2 | cmp - <(tail -c 8388608 noise)")
	if half != "" {
		t.Error("what nobody wrote differs: ", half)
	}
}

// TestFUSEDrained: a drain waits for the requests of an export, and those that come meanwhile wait
// for its end: nothing is lost, whatever the order.
func TestFUSEDrained(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, writable))
	stop := w.users(8)
	for i := range 300 {
		w.q.Must(t, "transaction", map[string]any{"actions": []any{map[string]any{"type": "block-dirty-bitmap-add",
			"data": map[string]any{"node": "fmt", "name": fmt.Sprint("b", i)}}}})
		w.q.Must(t, "block_resize", map[string]any{"node-name": "fmt", "size": fuseSize + i%2*65536})
		w.q.Must(t, "block-dirty-bitmap-remove", map[string]any{"node": "fmt", "name": fmt.Sprint("b", i)})
	}
	stop()
	w.del("e")
}

// TestFUSEIothread: the workers of an iothread serve an export.
func TestFUSEIothread(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.q.Must(t, "object-add", map[string]any{"qom-type": "iothread", "id": "io"})
	w.must(w.add("e", "fmt", w.mp, map[string]any{"writable": true, "iothread": "io"}))
	w.wantSh("cmp mp noise", "")
	stop := w.users(4)
	for _, io := range []any{nil, "io", nil} {
		w.q.Must(t, "x-blockdev-set-iothread", map[string]any{"node-name": "fmt", "iothread": io, "force": true})
	}
	stop()
	w.d.Stop(t)
}

// TestFUSEErrorPolicies: an error stops an export until somebody resumes it, or is ignored.
func TestFUSEErrorPolicies(t *testing.T) {
	w := newFuseWorld(t, "", "raw")
	w.q.Must(t, "blockdev-add", daemon.Blockdev("blkdebug", "bad", map[string]any{"image": "fmt", "inject-error": []any{
		map[string]any{"event": "none", "iotype": "read", "errno": 5, "once": true, "sector": 16}}}))
	w.must(w.add("e", "bad", w.mp, map[string]any{"x-qblockd-on-read-error": "stop"}))
	got := make(chan string, 1)
	go func() {
		out, err := w.try("dd if=mp iflag=direct bs=64k count=1 status=none | cmp - <(head -c 65536 noise)")
		got <- fmt.Sprint(out, err)
	}()
	w.q.Wait(t, "BLOCK_IO_ERROR", map[string]any{"device": "e", "operation": "read", "action": "stop"})
	if len(got) > 0 {
		t.Fatal("a read has ended although its export is stopped: ", <-got)
	}
	w.q.Must(t, "x-qblockd-export-resume", map[string]any{"id": "e"})
	if s := <-got; s != "<nil>" {
		t.Error(s)
	}
	w.del("e")
	w.q.Must(t, "blockdev-add", daemon.Blockdev("blkdebug", "worse", map[string]any{"image": "bad", "inject-error": []any{
		map[string]any{"event": "none", "iotype": "read", "errno": 5}}}))
	w.must(w.add("e", "worse", w.mp, map[string]any{"x-qblockd-on-read-error": "ignore"}))
	w.wantSh("head -c 65536 mp | tr -d '\\0' | wc -c", "0")
	w.del("e")
	w.must(w.add("e", "worse", w.mp, nil))
	w.wantSh("head -c 65536 mp", "head: error reading 'mp': Input/output error")
}

// TestFUSEFio: fio finds what it has written, with and without the page cache.
func TestFUSEFio(t *testing.T) {
	need(t, "fio")
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, writable))
	const odd, pages = "--bsrange=512-128k --blockalign=512 ", "--bsrange=4k-128k --blockalign=4k "
	for _, how := range []string{odd + "--direct=0 --ioengine=psync", odd + "--direct=1 --ioengine=libaio --iodepth=16",
		pages + "--direct=0 --ioengine=mmap", pages + "--direct=1 --ioengine=io_uring --iodepth=8"} {
		out, err := w.try("fio --name=v --filename=mp --size=16M --rw=randwrite " +
			"--verify=crc32c --verify_fatal=1 --fsync=64 --randseed=7 " + how)
		if err != nil && strings.Contains(out, "not loadable") {
			continue
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", how, err, out)
		}
	}
}

// TestFUSEFileSystem: a file system in a disk in qcow2 format, on a loop device on the file.
func TestFUSEFileSystem(t *testing.T) {
	need(t, "mkfs.ext4", "losetup", "e2fsck")
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, writable))
	w.sh("mkfs.ext4 -q -F mp")
	for _, direct := range []string{"off", "on"} {
		loop, err := w.try("losetup --show -f --direct-io=" + direct + " mp")
		if err != nil {
			t.Skip("SKIPPED: no loop devices: ", loop)
		}
		t.Cleanup(func() { _, _ = w.try("losetup -d " + loop) })
		w.sh("mkdir -p fs && mount " + loop + " fs")
		t.Cleanup(func() { _, _ = w.try("umount -l fs") })
		w.sh("head -c 3000000 noise > fs/a && sync fs/a && cp fs/a fs/b && rm fs/a && fstrim fs && sync -f fs/b")
		w.wantSh("head -c 3000000 noise | cmp - fs/b", "")
		w.sh("umount fs && losetup -d " + loop)
	}
	w.del("e")
	w.d.Stop(t)
	w.sh("qemu-img convert -O raw image plain && e2fsck -fn plain && qemu-img check image")
}

// TestFUSESyncs: what many writers were told is on stable storage is there if the daemon is killed
// among them.
func TestFUSESyncs(t *testing.T) {
	w := newFuseWorld(t, "", "qcow2")
	w.must(w.add("e", "fmt", w.mp, writable))
	const writers = 8
	var synced [writers]int
	var all sync.WaitGroup
	enough := make(chan struct{}, writers)
	for k := range writers {
		f, err := os.OpenFile(w.mp, os.O_RDWR|k%2*syscall.O_DSYNC, 0)
		w.must(err)
		all.Go(func() {
			defer f.Close()
			for i := range fuseSize / writers / userBlock {
				_, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, userBlock), int64(i*writers+k)*userBlock)
				if err == nil && k%2 == 0 {
					err = f.Sync()
				}
				if err != nil {
					return
				}
				if synced[k] = i + 1; i == 40 {
					enough <- struct{}{}
				}
			}
		})
	}
	<-enough
	w.d.Kill()
	all.Wait()
	unmountAll(w.mp)
	w.sh("qemu-img convert -O raw image plain")
	got, err := os.ReadFile(filepath.Join(filepath.Dir(w.mp), "plain"))
	w.must(err)
	for k, n := range synced {
		for i := range n {
			at := (i*writers + k) * userBlock
			if !bytes.Equal(got[at:at+userBlock], bytes.Repeat([]byte{byte(i + 1)}, userBlock)) {
				t.Fatalf("what writer %d has synced at %d is lost", k, at)
			}
		}
	}
}
