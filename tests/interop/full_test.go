package interop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// fullDisk is a file system that is too small, and how it gets room.
type fullDisk struct {
	dir  string
	grow func()
}

// smallTmpfs is one of 4 MiB.
func smallTmpfs(t *testing.T) fullDisk {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=4M"); err != nil {
		t.Skipf("SKIPPED: no file system can be mounted: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_FORCE|2) }) // 2: MNT_DETACH
	return fullDisk{dir, func() {
		if err := syscall.Mount("none", dir, "tmpfs", syscall.MS_REMOUNT, "size=64M"); err != nil {
			t.Error(err)
		}
	}}
}

// smallExt4 is one of 32 MiB on a loop device, most of it taken by a file that goes.
func smallExt4(t *testing.T) fullDisk {
	t.Helper()
	need(t, "mkfs.ext4", "losetup", "mount")
	dir, image := t.TempDir(), filepath.Join(t.TempDir(), "ext4")
	sh(t, dir, "truncate -s 32M %s && mkfs.ext4 -q -m 0 -O ^has_journal %s", image, image)
	if _, err := os.Stat("/dev/loop-control"); err != nil || os.Getuid() != 0 {
		t.Skip("SKIPPED: no file system can be mounted")
	}
	sh(t, dir, "mount -o loop %s %s", image, dir)
	t.Cleanup(func() { sh(t, "/", "umount -l %s", dir) })
	sh(t, dir, "fallocate -l 25M filler")
	return fullDisk{dir, func() {
		if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
			t.Error(err)
		}
	}}
}

// stateOf is what query-block-exports shows of the only export.
func stateOf(t *testing.T, q *daemon.QMP) (s struct {
	IoStatus string `json:"x-qblockd-io-status"`
	Node     string `json:"node-name"`
}) {
	t.Helper()
	var l []json.RawMessage
	if err := json.Unmarshal(q.Must(t, "query-block-exports", nil), &l); err != nil || len(l) != 1 {
		t.Fatalf("%d exports, %v", len(l), err)
	}
	if err := json.Unmarshal(l[0], &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// writers are guests that write 6 MiB each, and flush.
type writers struct {
	wg   sync.WaitGroup
	errs [2]error
}

const writes, writeSize = 48, 128 << 10

func written(guest, i int) []byte { return bytes.Repeat([]byte{byte(1 + guest + 2*i)}, writeSize) }

func startWriters(d *daemon.Daemon) *writers {
	w := &writers{}
	for g := range w.errs {
		w.wg.Go(func() {
			w.errs[g] = func() error {
				c, err := d.DialNBD("disk")
				if err != nil {
					return err
				}
				defer c.Drop()
				for i := range writes {
					if err := c.WriteAt(written(g, i), int64(2*i+g)*writeSize); err != nil {
						return fmt.Errorf("write %d: %w", i, err)
					}
				}
				return c.Flush()
			}()
		})
	}
	return w
}

// done waits for the guests, who must have succeeded, and compares what the export shows.
func (w *writers) done(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	w.wg.Wait()
	c, err := d.DialNBD("disk")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, writeSize)
	for g, err := range w.errs {
		if err != nil {
			t.Errorf("guest %d: %v", g, err)
			continue
		}
		for i := range writes {
			if err := c.ReadAt(got, int64(2*i+g)*writeSize); err != nil || !bytes.Equal(got, written(g, i)) {
				t.Errorf("guest %d lost write %d (%v)", g, i, err)
			}
		}
	}
}

// fill makes an image of 64 MiB in a file system that is too small and lets guests write to it
// until they are stopped.
func fill(t *testing.T, fs fullDisk, format string) (*daemon.Daemon, *daemon.QMP, *writers) {
	t.Helper()
	need(t, "qemu-img")
	image := filepath.Join(fs.dir, "disk.img")
	sh(t, fs.dir, "qemu-img create -q -f %s %s 64M", format, image)
	d := daemon.Start(t, t.TempDir())
	q := d.Dial(t)
	q.Must(t, "blockdev-add", daemon.Blockdev(format, "disk", map[string]any{"file": daemon.File(image)}))
	q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "disk", "writable": true,
		"x-qblockd-on-write-error": "enospc", "x-qblockd-on-read-error": "report"})
	w := startWriters(d)
	q.Wait(t, "BLOCK_IO_ERROR", map[string]any{"device": "e", "node-name": "disk", "operation": "write",
		"action": "stop", "nospace": true, "reason": "No space left on device", "qom-path": ""})
	if s := stateOf(t, q); s.IoStatus != "nospace" {
		t.Errorf("the export is %q", s.IoStatus)
	}
	return d, q, w
}

// TestFullDisk: guests of a thin disk whose file system is full wait until it has room, and lose
// nothing; everything else goes on meanwhile.
func TestFullDisk(t *testing.T) {
	for name, fs := range map[string]func(*testing.T) fullDisk{"tmpfs": smallTmpfs, "ext4": smallExt4} {
		for _, format := range []string{"qcow2", "raw"} {
			t.Run(name+"-"+format, func(t *testing.T) {
				fs := fs(t)
				d, q, w := fill(t, fs, format)
				own := filepath.Join(t.TempDir(), "own.qcow2")
				sh(t, d.Dir, "qemu-img create -q -f qcow2 %s 1M", own)
				answered(t, q, own)
				// Drains, which wait for requests, do not wait for those.
				start := time.Now()
				q.Must(t, "transaction", map[string]any{"actions": []any{map[string]any{
					"type": "block-dirty-bitmap-add", "data": map[string]any{"node": "disk", "name": "b"}}}})
				if took := time.Since(start); took > worst {
					t.Errorf("a drain took %v", took)
				}
				// In vain at first.
				q.Must(t, "x-qblockd-export-resume", map[string]any{"id": "e"})
				q.Wait(t, "BLOCK_IO_ERROR", map[string]any{"action": "stop"})
				fs.grow()
				q.Must(t, "x-qblockd-export-resume", map[string]any{"id": "e"})
				w.done(t, d)
				if s := stateOf(t, q); s.IoStatus != "ok" {
					t.Errorf("the export is %q", s.IoStatus)
				}
				if _, err := q.Do("x-qblockd-export-resume", map[string]any{"id": "e"}); err == nil ||
					err.Error() != "GenericError: Export 'e' is not stopped" {
					t.Errorf("resuming what runs: %v", err)
				}
				d.Stop(t)
				if format == "qcow2" {
					sh(t, fs.dir, "qemu-img check -q disk.img")
				}
			})
		}
	}
}

// TestFullDiskLeft: a snapshot elsewhere is a way out of a full file system, too.
func TestFullDiskLeft(t *testing.T) {
	d, q, w := fill(t, smallTmpfs(t), "qcow2")
	q.Must(t, "blockdev-snapshot-sync", map[string]any{"node-name": "disk", "snapshot-node-name": "top",
		"snapshot-file": filepath.Join(d.Dir, "top.qcow2")})
	if s := stateOf(t, q); s.Node != "top" || s.IoStatus != "nospace" {
		t.Errorf("the export is %+v", s)
	}
	q.Must(t, "x-qblockd-export-resume", map[string]any{"id": "e"})
	w.done(t, d)
	d.Stop(t)
}

// TestFullDiskEnd: a stopped export can be removed, and the daemon ended; the guests get errors.
func TestFullDiskEnd(t *testing.T) {
	for _, how := range []string{"hard", "stop", "quit"} {
		d, q, w := fill(t, smallTmpfs(t), "raw")
		start := time.Now()
		switch how {
		case "hard":
			if _, err := q.Do("block-export-del", map[string]any{"id": "e"}); err == nil {
				t.Error("an export in use is removed")
			}
			q.Must(t, "block-export-del", map[string]any{"id": "e", "mode": "hard"})
			q.Wait(t, "BLOCK_EXPORT_DELETED", map[string]any{"id": "e"})
			q.Must(t, "blockdev-del", map[string]any{"node-name": "disk"})
		case "stop":
			q.Must(t, "nbd-server-stop", nil)
			q.Must(t, "blockdev-del", map[string]any{"node-name": "disk"})
		}
		d.Stop(t)
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s took %v", how, took)
		}
		w.wg.Wait()
		if w.errs[0] == nil && w.errs[1] == nil {
			t.Errorf("%s: all was written", how)
		}
	}
}
