package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/tests/daemon"
)

// host is the daemon with the disk.
type host struct {
	t      *testing.T
	binary string
	dir    string // for sockets
	store  string // for images
	queues int
	d      *daemon.Daemon
	q      *daemon.QMP
	format string // of images that are no overlays
	export string // more options of the export
	top    image  // of the disk's chain
	size   int64  // of the disk, in bytes
	images int    // made
	killed bool   // some daemon was
}

// image is an image and its node.
type image struct{ node, format, path string }

// disk is what a host is to have: the format of its images, and more options of the export.
type disk struct{ format, export string }

const diskSize = 192 * mib

// start starts a daemon with an empty disk.
func start(t *testing.T, binary string, d disk, queues int) *host {
	t.Helper()
	h := &host{
		t: t, binary: binary, dir: t.TempDir(), store: store(t), queues: queues, format: d.format, export: d.export,
		size: diskSize,
	}
	h.top = h.create(d.format)
	h.up()
	return h
}

// store is a folder for images, in memory if there is such a thing: then no wait is the storage's.
func store(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "qblockd-guest-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// socket is where the front end connects.
func (h *host) socket() string { return filepath.Join(h.dir, "vhost.sock") }

// create makes an image, over the one that more names.
func (h *host) create(format string, more ...string) image {
	h.t.Helper()
	x := image{node: fmt.Sprintf("n%d", h.images), format: format}
	h.images++
	x.path = filepath.Join(h.store, x.node)
	args := append([]string{"create", "-q", "-f", format}, more...)
	h.run("qemu-img", append(args, x.path, fmt.Sprint(h.size))...)
	return x
}

func (h *host) run(name string, args ...string) {
	h.t.Helper()
	exe, err := exec.LookPath(name)
	if err != nil {
		h.t.Skipf("SKIPPED: %s is not installed", name)
	}
	if out, err := exec.Command(exe, args...).CombinedOutput(); err != nil {
		h.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// up starts the daemon with the disk as it is.
func (h *host) up() {
	h.t.Helper()
	h.d = daemon.StartBinary(h.t, h.binary, h.dir,
		"--blockdev", fmt.Sprintf("%s,node-name=%s,discard=unmap,file.driver=file,file.discard=unmap,file.filename=%s",
			h.top.format, h.top.node, h.top.path),
		"--export", fmt.Sprintf("vhost-user-blk,id=disk,node-name=%s,writable=on,num-queues=%d,addr.type=unix,addr.path=%s%s",
			h.top.node, h.queues, h.socket(), h.export))
	h.q = h.d.Dial(h.t)
}

// kill kills the daemon and starts it again.
func (h *host) kill() {
	h.t.Helper()
	h.killed = true
	h.d.Kill()
	h.q.Drop()
	for _, f := range []string{h.d.Pidfile(), h.d.QMPSocket()} {
		_ = os.Remove(f)
	}
	h.up()
}

// add opens an image.
func (h *host) add(x image, more map[string]any) {
	h.t.Helper()
	file := daemon.File(x.path)
	file["discard"] = "unmap"
	args := map[string]any{"discard": "unmap", "file": file}
	for k, v := range more {
		args[k] = v
	}
	h.q.Must(h.t, "blockdev-add", daemon.Blockdev(x.format, x.node, args))
}

// snapshot has the guest write to an overlay from now on.
func (h *host) snapshot() {
	h.t.Helper()
	top := h.create("qcow2", "-F", h.top.format, "-b", h.top.path)
	h.add(top, map[string]any{"backing": nil})
	h.q.Must(h.t, "blockdev-snapshot", map[string]any{"node": h.top.node, "overlay": top.node})
	h.top = top
}

// commit brings what the overlay has into base, and has the guest write there.
func (h *host) commit(base image) {
	h.t.Helper()
	h.q.Must(h.t, "block-commit", map[string]any{"job-id": "job", "device": h.top.node})
	h.leave(base)
}

// mirror moves the disk to a new image.
func (h *host) mirror() {
	h.t.Helper()
	target := h.create(h.format)
	h.add(target, nil)
	h.q.Must(h.t, "blockdev-mirror",
		map[string]any{"job-id": "job", "device": h.top.node, "target": target.node, "sync": "full"})
	h.leave(target)
}

// leave has the job end at its target when that has all data, and closes and removes what was the
// disk's top.
func (h *host) leave(target image) {
	h.t.Helper()
	h.q.Wait(h.t, "BLOCK_JOB_READY", map[string]any{"device": "job"})
	h.q.Must(h.t, "block-job-complete", map[string]any{"device": "job"})
	h.q.Wait(h.t, "BLOCK_JOB_COMPLETED", map[string]any{"device": "job"})
	h.q.Wait(h.t, "JOB_STATUS_CHANGE", map[string]any{"id": "job", "status": "null"})
	h.q.Must(h.t, "blockdev-del", map[string]any{"node-name": h.top.node})
	_ = os.Remove(h.top.path)
	h.top = target
}

// grow makes the disk longer.
func (h *host) grow(by int64) {
	h.t.Helper()
	h.size += by
	h.q.Must(h.t, "block_resize", map[string]any{"node-name": h.top.node, "size": h.size})
}

// stop ends the daemon; what it leaves is a sound image, with clusters that nobody uses at most if
// it was killed.
func (h *host) stop() {
	h.t.Helper()
	h.d.Stop(h.t)
	if h.top.format != "qcow2" {
		return
	}
	const leaks = 3 // exit status of qemu-img check
	cmd := exec.Command("qemu-img", "check", "-q", h.top.path)
	out, err := cmd.CombinedOutput()
	if err != nil && !(h.killed && cmd.ProcessState.ExitCode() == leaks) {
		h.t.Errorf("%v: %v\n%s", cmd, err, out)
	}
}
