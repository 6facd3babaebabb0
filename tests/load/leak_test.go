package load

import (
	"os/exec"
	"path/filepath"
	"testing"

	"qblockd/tests/daemon"
)

// TestCycle: chains, exports, clients and jobs come and go; the daemon is as before. That no
// goroutine is left is checked inside, where the packages' own tests end.
func TestCycle(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: qemu-img is not installed")
	}
	d := start(t)
	q := d.Dial(t)
	image := func(name string, args ...string) string {
		path := filepath.Join(d.Dir, name)
		if out, err := exec.Command("qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, args...), path, "4M")...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return path
	}
	base := image("base")
	mid := image("mid", "-b", base, "-F", "qcow2")
	top := image("top", "-b", mid, "-F", "qcow2")
	buf := make([]byte, 64<<10)
	cycle := func() {
		q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", "top", map[string]any{"file": daemon.File(top)}))
		q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "x", "node-name": "top", "name": "x", "writable": true})
		for i := range 4 {
			c, err := d.DialNBD("x")
			if err != nil {
				t.Fatal(err)
			}
			if err := c.WriteAt(buf, int64(i)<<20); err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				c.Close()
			} else {
				defer c.Drop() // the export goes under it
			}
		}
		m := newMonitor(t, d)
		m.negotiate()
		q.Must(t, "block-stream", map[string]any{"job-id": "j", "device": "top"})
		q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "j", "status": "null"})
		q.Must(t, "block-export-del", map[string]any{"id": "x", "mode": "hard"})
		q.Wait(t, "BLOCK_EXPORT_DELETED", map[string]any{"id": "x"})
		q.Must(t, "blockdev-del", map[string]any{"node-name": "top"})
		m.c.Close()
		q.Events = nil
	}
	cycle() // what is made once and kept
	rss := d.RSS(t)
	d.LeavesNothing(t, func() {
		for range 20 {
			cycle()
		}
	})
	eventually(t, "memory is as before", func() bool { return d.RSS(t) <= rss+leftOver })
}
