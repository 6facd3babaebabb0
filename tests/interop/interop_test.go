// Package interop tests qblockd with real clients and QEMU's tools. A tool that is missing skips
// its tests loudly.
package interop

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"qblockd/tests/daemon"
)

// need skips the test unless the programs are there.
func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed", tool)
		}
	}
}

// sh runs a shell command in dir, which has to succeed, and returns what it printed.
func sh(t *testing.T, dir, format string, args ...any) string {
	t.Helper()
	cmd := exec.Command("bash", "-c", fmt.Sprintf(format, args...))
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}

// chain makes b <- m <- t, qcow2 images of 64 MiB with some data, in dir.
func chain(t *testing.T, dir string) {
	t.Helper()
	sh(t, dir, `exec >/dev/null
		qemu-img create -f qcow2 b.qcow2 64M; qemu-io -f qcow2 -c 'write -P 1 0 40M' b.qcow2
		qemu-img create -f qcow2 -o cluster_size=4k -b b.qcow2 -F qcow2 m.qcow2; qemu-io -f qcow2 -c 'write -P 2 10M 30M' m.qcow2
		qemu-img create -f qcow2 -b m.qcow2 -F qcow2 t.qcow2; qemu-io -f qcow2 -c 'write -P 3 50M 5M' t.qcow2`)
}

// guest hammers its own part of an export and checks all it reads against a shadow copy.
type guest struct {
	d      *daemon.Daemon
	export string
	shadow []byte // of the whole export; only [lo, hi) is the guest's
	lo, hi int64
	rnd    *rand.Rand
	ops    atomic.Int64
	warm   chan struct{} // closed after enough requests
}

// enough is how many requests each guest makes while the job is slow.
const enough = 200

func (g *guest) run(stop *atomic.Bool) error {
	c, err := g.d.DialNBD(g.export)
	if err != nil {
		return err
	}
	defer func() {
		if c != nil {
			c.Close()
		}
	}()
	sizes := []int64{512, 4096, 65536, 3 * 65536, 1000, 1 << 20}
	buf := make([]byte, 1<<20)
	for !stop.Load() {
		n := sizes[g.rnd.IntN(len(sizes))]
		off := g.lo + g.rnd.Int64N(g.hi-g.lo-n)
		p, mine := buf[:n], g.shadow[off:off+n]
		switch x := g.rnd.IntN(100); {
		case x < 45:
			for i := range p {
				p[i] = byte(g.rnd.Uint32())
			}
			err = c.WriteAt(p, off)
			copy(mine, p)
		case x < 60:
			err = c.Zero(off, int(n))
			clear(mine)
		case x < 95:
			if err = c.ReadAt(p, off); err == nil && !bytes.Equal(p, mine) {
				return fmt.Errorf("read of %d bytes at %d differs from what was written", n, off)
			}
		case x < 98:
			err = c.Flush()
		default:
			// Killed and reconnected: what was acknowledged has to be there.
			c.Drop()
			if c, err = g.d.DialNBD(g.export); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		if g.ops.Add(1) == enough {
			close(g.warm)
		}
	}
	return c.Flush()
}

func TestStreamUnderGuests(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "bash")
	dir := t.TempDir()
	chain(t, dir)
	sh(t, dir, "qemu-img convert -O raw t.qcow2 shadow.raw")
	shadow, err := os.ReadFile(filepath.Join(dir, "shadow.raw"))
	if err != nil {
		t.Fatal(err)
	}
	d := daemon.Start(t, dir,
		"--blockdev", "qcow2,node-name=t,discard=unmap,file.driver=file,file.discard=unmap,file.filename=t.qcow2",
		"--export", "nbd,id=e,node-name=t,writable=on")
	q := d.Dial(t)

	var stop atomic.Bool
	var wg sync.WaitGroup
	guests := make([]*guest, 4)
	for i := range guests {
		part := int64(len(shadow)) / int64(len(guests))
		g := &guest{d: d, export: "t", shadow: shadow, lo: int64(i) * part, hi: int64(i+1) * part,
			warm: make(chan struct{}), rnd: rand.New(rand.NewPCG(1, uint64(i)))}
		guests[i] = g
		wg.Go(func() {
			if err := g.run(&stop); err != nil {
				t.Errorf("guest %d: %v", i, err)
			}
			if g.ops.Load() < enough {
				close(g.warm)
			}
		})
	}
	q.Must(t, "block-stream", map[string]any{"job-id": "j", "device": "t", "speed": 256 << 10}) // slow enough not to end before set-speed
	q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "j", "status": "running"})
	q.Must(t, "job-pause", map[string]any{"id": "j"})
	q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "j", "status": "paused"})
	q.Must(t, "job-resume", map[string]any{"id": "j"})
	for _, g := range guests {
		<-g.warm
	}
	// What guests have written need not be copied, so the job may be over by now.
	if _, err := q.Do("block-job-set-speed", map[string]any{"device": "j", "speed": 0}); err != nil && !strings.Contains(err.Error(), "not found") {
		t.Fatal(err)
	}
	q.Wait(t, "BLOCK_JOB_COMPLETED", map[string]any{"device": "j"})
	q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "j", "status": "null"})
	stop.Store(true)
	wg.Wait()
	d.Stop(t)

	for i, g := range guests {
		t.Logf("guest %d: %d requests", i, g.ops.Load())
	}
	if err := os.WriteFile(filepath.Join(dir, "shadow.raw"), shadow, 0o600); err != nil {
		t.Fatal(err)
	}
	sh(t, dir, "qemu-img check t.qcow2; qemu-img compare -f raw -F qcow2 shadow.raw t.qcow2")
	if info := sh(t, dir, "qemu-img info t.qcow2"); strings.Contains(info, "backing file") {
		t.Errorf("the image still has a backing file:\n%s", info)
	}
}

// TestStreamIntermediate streams into a read-only image in the middle of a chain, down to a base
// that stays.
func TestStreamIntermediate(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "bash")
	dir := t.TempDir()
	chain(t, dir)
	sh(t, dir, `qemu-img create -q -f qcow2 -b t.qcow2 -F qcow2 top.qcow2; qemu-img convert -O raw top.qcow2 want.raw`)
	d := daemon.Start(t, dir)
	q := d.Dial(t)
	layer := func(name string, below any) map[string]any {
		return daemon.Blockdev("qcow2", name, map[string]any{"file": daemon.File(filepath.Join(dir, name+".qcow2")), "backing": below})
	}
	q.Must(t, "blockdev-add", layer("top", layer("t", layer("m", layer("b", nil)))))
	q.Must(t, "block-stream", map[string]any{"job-id": "j", "device": "t", "base-node": "b", "auto-dismiss": false})
	q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "j", "status": "concluded"})
	if r := q.Must(t, "query-jobs", nil); bytes.Contains(r, []byte("error")) {
		t.Fatalf("the job failed: %s", r)
	}
	q.Must(t, "job-dismiss", map[string]any{"id": "j"})
	if _, err := q.Do("blockdev-del", map[string]any{"node-name": "m"}); err == nil ||
		!strings.Contains(err.Error(), "Failed to find node") {
		t.Errorf("the layer that was streamed away: %v", err)
	}
	d.Stop(t)
	sh(t, dir, "qemu-img check t.qcow2; qemu-img compare -f qcow2 -F raw top.qcow2 want.raw")
	if info := sh(t, dir, "qemu-img info t.qcow2"); !strings.Contains(info, "backing file: b.qcow2") && !strings.Contains(info, "backing file: "+dir+"/b.qcow2") {
		t.Errorf("the image does not name its new backing file:\n%s", info)
	}
}
