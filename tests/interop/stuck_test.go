package interop

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"qblockd/tests/daemon"
)

// prompt is how soon others have to be answered while one client's storage is stuck. It is measured
// on machines that do other things too, so the median counts and the worst is bounded more loosely.
const (
	prompt = 50 * time.Millisecond
	worst  = time.Second
)

// answered runs commands on q, on nodes of its own and all queries, and checks that each is
// answered at once.
func answered(t *testing.T, q *daemon.QMP, image string) {
	t.Helper()
	late := 0
	const rounds = 20
	for range rounds {
		start := time.Now()
		for _, c := range []struct {
			name string
			args any
		}{
			{"query-named-block-nodes", nil},
			{"query-named-block-nodes", map[string]any{"flat": true}},
			{"query-block-exports", nil},
			{"x-debug-query-block-graph", nil},
			{"query-blockstats", map[string]any{"query-nodes": true}},
			{"query-jobs", nil},
			{"blockdev-add", daemon.Blockdev("qcow2", "own", map[string]any{"file": daemon.File(image)})},
			{"blockdev-del", map[string]any{"node-name": "own"}},
		} {
			one := time.Now()
			q.Must(t, c.name, c.args)
			switch took := time.Since(one); {
			case took > worst:
				t.Errorf("%s took %v", c.name, took)
			case took > prompt:
				late++
			}
		}
		t.Logf("a round of commands took %v", time.Since(start))
	}
	if late > rounds*8/20 {
		t.Errorf("%d of %d commands took more than %v", late, rounds*8, prompt)
	}
}

// ends sends SIGTERM and checks that everything is given back within two seconds.
func ends(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	start := time.Now()
	if err := d.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{d.QMPSocket(), d.NBDSocket(), d.Pidfile()} {
		for {
			if _, err := os.Lstat(f); os.IsNotExist(err) {
				break
			}
			if time.Since(start) > 2*time.Second {
				t.Errorf("%s is still there after %v", filepath.Base(f), time.Since(start))
				break
			}
			time.Sleep(2 * time.Millisecond) // nothing tells of a file that goes
		}
	}
	t.Logf("all was given back after %v", time.Since(start))
}

func image(t *testing.T, dir string) string {
	t.Helper()
	need(t, "qemu-img", "bash")
	sh(t, dir, "qemu-img create -q -f qcow2 own.qcow2 1M; qemu-img create -q -f qcow2 other.qcow2 1M")
	return filepath.Join(dir, "own.qcow2")
}

// waitStuck waits until a thread of the daemon is in the kernel's open of a FIFO.
func waitStuck(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/wchan", d.Cmd.Process.Pid))
		for _, f := range tasks {
			if where, err := os.ReadFile(f); err == nil && strings.Contains(string(where), "wait_for_partner") {
				return
			}
		}
	}
	t.Fatal("nobody is stuck in the FIFO")
}

// TestStuckOpen opens a FIFO that nobody writes to: the open never returns.
func TestStuckOpen(t *testing.T) {
	dir := t.TempDir()
	own := image(t, dir)
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	d := daemon.Start(t, dir, "--blockdev", "qcow2,node-name=other,file.driver=file,file.filename=other.qcow2",
		"--export", "nbd,id=e,node-name=other,writable=on")
	stuck, q := d.Dial(t), d.Dial(t)
	args := daemon.Blockdev("file", "x", map[string]any{"filename": fifo, "read-only": true})
	if err := stuck.Send("blockdev-add", args); err != nil {
		t.Fatal(err)
	}
	waitStuck(t, d)
	if _, err := q.Do("blockdev-add", daemon.Blockdev("null-co", "x", nil)); err == nil || !strings.Contains(err.Error(), "Duplicate nodes") {
		t.Errorf("the name of a node that is being opened: %v", err)
	}
	answered(t, q, own)
	c, err := d.DialNBD("other")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt([]byte("flushed at the end"), 0); err != nil {
		t.Fatal(err)
	}
	ends(t, d)
	if !d.Ended(2 * time.Second) {
		t.Error("the process is still there")
	}
	if out := sh(t, dir, "qemu-img check -q other.qcow2; qemu-img convert -O raw other.qcow2 raw; head -c 18 raw"); out != "flushed at the end" {
		t.Errorf("the other disk holds %q", out)
	}
}

// disk is a file whose reads are held back while hold is set.
type disk struct {
	fs.Inode
	hold    atomic.Bool
	held    chan struct{} // gets a value when a read is held back
	release chan struct{} // closed to let them go
}

var (
	_ fs.NodeOpener    = (*disk)(nil)
	_ fs.NodeReader    = (*disk)(nil)
	_ fs.NodeGetattrer = (*disk)(nil)
)

const diskSize = 1 << 20

func (f *disk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *disk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = syscall.S_IFREG|0o600, diskSize
	return 0
}

func (f *disk) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if f.hold.Load() {
		select {
		case f.held <- struct{}{}:
		default:
		}
		<-f.release
	}
	return fuse.ReadResultData(make([]byte, max(0, min(int64(len(dest)), diskSize-off)))), 0
}

// mountDisk serves a disk by FUSE and returns its path.
func mountDisk(t *testing.T) (*disk, string) {
	t.Helper()
	mnt := t.TempDir()
	f := &disk{held: make(chan struct{}, 1), release: make(chan struct{})}
	root := &fs.Inode{}
	server, err := fs.Mount(mnt, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "stuck"},
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG}), true)
		},
	})
	if err != nil {
		t.Skipf("SKIPPED: no FUSE here: %v", err)
	}
	t.Cleanup(func() {
		select {
		case <-f.release:
		default:
			close(f.release)
		}
		if err := server.Unmount(); err != nil {
			t.Logf("unmount: %v", err)
		}
	})
	return f, filepath.Join(mnt, "disk")
}

// TestStuckRequest drains a node with a request that its FUSE server answers only after the end of
// the daemon was asked for. The kernel keeps the process until then, but not its sockets and the
// other nodes' data.
func TestStuckRequest(t *testing.T) {
	dir := t.TempDir()
	own := image(t, dir)
	f, path := mountDisk(t)
	d := daemon.Start(t, dir,
		"--blockdev", "qcow2,node-name=other,file.driver=file,file.filename=other.qcow2",
		"--export", "nbd,id=other,node-name=other,writable=on",
		"--blockdev", "file,node-name=slow,auto-read-only=on,read-only=on,filename="+path,
		"--export", "nbd,id=slow,node-name=slow")
	reader, err := d.DialNBD("slow")
	if err != nil {
		t.Fatal(err)
	}
	f.hold.Store(true)
	go func() { _ = reader.ReadAt(make([]byte, 4096), 0) }()
	<-f.held

	stuck, q := d.Dial(t), d.Dial(t)
	// It has to drain the node, so it waits for the request.
	if err := stuck.Send("block_resize", map[string]any{"node-name": "slow", "size": 4096}); err != nil {
		t.Fatal(err)
	}
	answered(t, q, own)
	c, err := d.DialNBD("other")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt([]byte("flushed at the end"), 0); err != nil {
		t.Fatal(err)
	}
	ends(t, d)
	close(f.release)
	if !d.Ended(5 * time.Second) {
		t.Error("the process is still there after its storage has answered")
	}
	if out := sh(t, dir, "qemu-img check -q other.qcow2; qemu-img convert -O raw other.qcow2 raw; head -c 18 raw"); out != "flushed at the end" {
		t.Errorf("the other disk holds %q", out)
	}
}

// TestStuckRemoval takes an export away by force while its request is stuck; the command comes
// back.
func TestStuckRemoval(t *testing.T) {
	dir := t.TempDir()
	own := image(t, dir)
	f, path := mountDisk(t)
	d := daemon.Start(t, dir, "--blockdev", "file,node-name=slow,read-only=on,filename="+path, "--export", "nbd,id=slow,node-name=slow")
	reader, err := d.DialNBD("slow")
	if err != nil {
		t.Fatal(err)
	}
	f.hold.Store(true)
	go func() { _ = reader.ReadAt(make([]byte, 4096), 0) }()
	<-f.held
	q := d.Dial(t)
	start := time.Now()
	q.Must(t, "block-export-del", map[string]any{"id": "slow", "mode": "hard"})
	if took := time.Since(start); took > worst {
		t.Errorf("removing the export took %v", took)
	}
	answered(t, q, own)
	close(f.release)
	q.Wait(t, "BLOCK_EXPORT_DELETED", map[string]any{"id": "slow"})
	q.Must(t, "blockdev-del", map[string]any{"node-name": "slow"})
	var nodes []json.RawMessage
	if err := json.Unmarshal(q.Must(t, "query-named-block-nodes", nil), &nodes); err != nil || len(nodes) != 0 {
		t.Errorf("%d nodes are left (%v)", len(nodes), err)
	}
	d.Stop(t)
}
