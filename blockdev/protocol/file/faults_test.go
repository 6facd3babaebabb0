package file

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// TestAbandonedPrepare: a permission change that the kernel holds ends for its caller with
// the context, and undoes itself when the kernel lets go.
func TestAbandonedPrepare(t *testing.T) {
	name := mustFile(t, t.TempDir(), "stuck", 1<<20)
	d := mustOpen(t, settings{name: name, locks: true, auto: true})
	other := mustOpen(t, settings{name: name, locks: true})
	if err := change(t, d, bareWriter); err != nil {
		t.Fatal(err)
	}
	before := openFDs(t)
	stuck, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	d.fdatasync = func(fd int) error { // runs before the file is opened again, read-only
		once.Do(func() { close(stuck); <-release })
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error)
	mean := perm.Claim{Need: perm.ConsistentRead, Share: perm.ConsistentRead}
	go func() { res <- d.PermPrepare(ctx, mean) }()
	<-stuck
	cancel()
	if err := <-res; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	d.PermAbort() // may follow
	done, stop := context.WithCancel(context.Background())
	stop()
	if err := d.PermPrepare(done, nobody); !errors.Is(err, context.Canceled) {
		t.Errorf("while the first is stuck: %v", err)
	}
	close(release)
	if err := change(t, d, bareWriter); err != nil { // waits for the undoing
		t.Fatal(err)
	}
	if !d.cur.Load().writable {
		t.Error("the abandoned change came through")
	}
	waitFDs(t, before)
	if err := change(t, other, bareWriter); err != nil {
		t.Errorf("locks were left: %v", err)
	}
}

// TestFullDisk: ENOSPC comes back as itself from writes, preallocation and creation.
func TestFullDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("SKIPPED: cannot mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	d := mustOpen(t, settings{name: mustFile(t, dir, "f", 4096)})
	if err := d.WriteAt(bg, blk.Buf(pattern(4096, 1)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(bg, blk.Buf(pattern(2<<20, 1)), 4096, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write: %v", err)
	}
	for range 2 {
		b, err := os.ReadFile(d.name)
		if err != nil || d.Size() != int64(len(b)) || !bytes.Equal(mustRead(t, d, 0, int(d.Size())), b) {
			t.Errorf("after a write of which a part or nothing is there: the size is %d, the file has %d bytes: %v",
				d.Size(), len(b), err)
		}
		if err := d.WriteAt(bg, blk.Buf(pattern(4096, 1)), 8<<20, 0); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("write: %v", err)
		}
	}
	for _, m := range []blk.Prealloc{blk.PreallocFalloc, blk.PreallocFull} {
		if err := d.Resize(context.Background(), 4096, blk.PreallocOff); err != nil {
			t.Fatal(err)
		}
		err := d.Resize(context.Background(), 8<<20, m)
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", m, err)
		}
		if st, _ := os.Stat(d.name); st.Size() != 4096 || d.Size() != 4096 {
			t.Errorf("%s: left %d bytes, size %d", m, st.Size(), d.Size())
		}
	}
	if err := d.Zero(bg, 4096, 8<<20, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("zero: %v", err)
	}
	if got := mustRead(t, d, 0, 4096); !bytes.Equal(got, pattern(4096, 1)) {
		t.Error("old data was lost")
	}
}

// TestZeroesOnFullDisk: ext4 leaves a file as long as it got where zeroes find no space, and so
// long it is then.
func TestZeroesOnFullDisk(t *testing.T) {
	dir, img := t.TempDir(), filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{
		{"truncate", "-s", "8M", img}, {"mkfs.ext4", "-q", img}, {"mount", "-o", "loop", img, dir},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Skipf("SKIPPED: cannot mount: %v: %s", err, out)
		}
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	d := mustOpen(t, settings{name: mustFile(t, dir, "f", 4096)})
	if err := d.Zero(bg, 4096, 64<<20, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("zero: %v", err)
	}
	if st, err := os.Stat(d.name); err != nil || st.Size() != d.Size() || st.Size() == 4096 {
		t.Errorf("the file has %d bytes, the size is %d: %v", st.Size(), d.Size(), err)
	}
}

func TestTouchBlocks(t *testing.T) {
	d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "t", 5000)})
	fd := d.cur.Load().fd
	if err := touchBlocks(context.Background(), fd, 5000, 300001); err != nil {
		t.Fatal(err)
	}
	st, _ := os.Stat(d.name)
	if n, err := d.ActualSize(); err != nil || st.Size() != 300001 || n < 290000 {
		t.Errorf("size %d, %d allocated, %v", st.Size(), n, err)
	}
}

// TestSwapUnderLoad swaps the descriptor below running requests.
func TestSwapUnderLoad(t *testing.T) {
	d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "swap", 64<<10), locks: true, auto: true})
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			b := buf(4096)
			var m blk.Mapping
			for !stop.Load() {
				if err := d.ReadAt(bg, blk.Buf(b), 4096, 0); err != nil {
					t.Error(err)
					return
				}
				if err := d.Map(bg, 0, 4096, &m); err != nil || m.N() != 4096 {
					t.Error(err)
					return
				}
				m.Release()
			}
		})
	}
	for i := range 200 {
		c := formatReader
		if i%2 == 0 {
			c = bareWriter
		}
		if err := change(t, d, c); err != nil {
			t.Error(err)
			break
		}
	}
	stop.Store(true)
	wg.Wait()
}

// TestInlineOverwrites: the rule for buffered writes without a worker, on a file system of a disk.
func TestInlineOverwrites(t *testing.T) {
	nw := &blk.Req{NoWait: true}
	d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "in", 1<<20)})
	if d.memory {
		t.Skip("the temporary directory is in memory")
	}
	d.nowaitWrite.Store(false) // as ext4 answers
	p := pattern(4096, 1)
	if err := d.WriteAt(nw, blk.Buf(p), 0, 0); err != blk.ErrWouldBlock {
		t.Errorf("before anything is known: %v", err)
	}
	d.pace.run.Store(shortRun)
	if err := d.WriteAt(nw, blk.Buf(p), 0, 0); err != nil {
		t.Errorf("after short ones: %v", err)
	}
	d.pace.run.Store(shortRun)
	for what, err := range map[string]error{
		"FUA":     d.WriteAt(nw, blk.Buf(p), 0, blk.FUA),
		"growing": d.WriteAt(nw, blk.Buf(p), 1<<20-512, 0),
		"large":   d.WriteAt(nw, blk.Buf(pattern(inlineMax+512, 1)), 0, 0),
		"zero":    d.Zero(nw, 0, 4096, 0),
		"discard": d.Discard(nw, 0, 4096),
	} {
		if err != blk.ErrWouldBlock {
			t.Errorf("%s: %v", what, err)
		}
	}
	if d.Size() != 1<<20 || d.discardErr.Load()+d.discardOK.Load() != 0 {
		t.Error("a refused request left a trace")
	}
}
