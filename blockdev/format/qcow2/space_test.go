package qcow2

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// limited is a file that cannot be longer than max.
type limited struct {
	mem
	max int64
}

func (f limited) WriteAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	if off+v.Len() > f.max {
		return syscall.ENOSPC
	}
	return f.mem.WriteAt(r, v, off, fl)
}

// TestNoSpaceIsFoundWhereItIsKeptBack: clusters that only wait for a flush are given out before a
// request fails for want of space; so are those that lie in the file of an image that nobody has
// looked at yet.
func TestNoSpaceIsFoundWhereItIsKeptBack(t *testing.T) {
	f := limited{mem{imageOf(t, 8, CreateOptions{})}, 2 << 20}
	s := mustOpen(t, f, config{unmap: true})
	b := make([]byte, 64<<10)
	for i := range int64(400) {
		b[0] = byte(i)
		c := i % 13
		if err := s.WriteAt(req(), blk.Buf(b), c<<16, 0); err != nil {
			t.Fatalf("write %d: %v", i, err)
		}
		if i%3 == 0 {
			if err := s.Discard(req(), c<<16, 64<<10); err != nil {
				t.Fatalf("discard %d: %v", i, err)
			}
		}
	}
	if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
		t.Errorf("snapshot: %v", err)
	}
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 3<<20)), 0, 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a write for which there is no space: %v", err)
	}
	sound(t, s, true)
	mustClose(t, s)
}

// TestDiscardNoUnrefKeepsSnapshots: a cluster that a snapshot shares keeps its data.
func TestDiscardNoUnrefKeepsSnapshots(t *testing.T) {
	f := imageOf(t, 4, CreateOptions{})
	s := mustOpen(t, mem{f}, config{unmap: true, options: Options{DiscardNoUnref: ptr(true)}})
	if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
		t.Fatal(err)
	}
	_, host := l2At(f, 1)
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{9}, 64<<10)), 3<<16, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Discard(req(), 1<<16, 3<<16); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(req()); err != nil {
		t.Fatal(err)
	}
	wantByte(t, s, 1, 0)
	wantByte(t, s, 3, 0)
	if b := f.Bytes()[host : host+128<<10]; b[0] != 2 || b[64<<10] != 3 {
		t.Error("the data of the snapshot are gone")
	}
	sound(t, s, false)
	mustClose(t, s)
}

// TestVersion2Zeroes: where nothing lies below, zeroes take no space in images of version 2 either.
func TestVersion2Zeroes(t *testing.T) {
	f := imageOf(t, 4, CreateOptions{Version: "v2"})
	s := mustOpen(t, mem{f}, config{unmap: true})
	size := f.Size()
	for _, x := range [][2]int64{{0, 2 << 16}, {20 << 16, 30 << 16}, {60<<16 + 512, 1024}} {
		if err := s.Zero(req(), x[0], x[1], blk.NoFallback); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Zero(req(), 3<<16+512, 512, 0); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("a part of a cluster: %v", err)
	}
	wantByte(t, s, 0, 0)
	wantByte(t, s, 1, 0)
	wantByte(t, s, 2, 3)
	wantByte(t, s, 3, 4)
	sound(t, s, false)
	mustClose(t, s)
	if f.Size() != size {
		t.Errorf("the file has grown from %d to %d", size, f.Size())
	}
	back := mem{drivertest.MemFileOf(bytes.Repeat([]byte{5}, 1<<20))}
	s = mustOpen(t, mem{f}, config{backing: func() file { return back }})
	if err := s.Zero(req(), 0, 1<<16, 0); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("over a backing file: %v", err)
	}
	if err := s.Zero(req(), 16<<16, 1<<16, 0); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("beyond the end of a backing file, whose place a longer one may take: %v", err)
	}
	mustClose(t, s)
}

// TestZeroingLetsOthersIn: while a large range of small clusters is zeroed others get at the image.
func TestZeroingLetsOthersIn(t *testing.T) {
	const size = 256 << 20 // 8192 L2 tables
	h := &hooked{mem: mem{mustCreate(t, CreateOptions{Size: size, ClusterSize: ptr(uint64(512))})}}
	s := mustOpen(t, h, config{})
	done := make(chan int, 1)
	h.wrote = func(n int) {
		if n > 20 {
			runtime.Gosched()
		}
		if n == 20 {
			started := make(chan struct{})
			defer func() { <-started }()
			go func() {
				close(started)
				if err := s.ReadAt(req(), blk.Buf(make([]byte, 512)), size-512, 0); err != nil {
					t.Error(err)
				}
				s.mu.Lock() // what counts is what was written by then
				defer s.mu.Unlock()
				done <- h.n
			}()
		}
	}
	if err := s.Zero(req(), 0, size, 0); err != nil {
		t.Fatal(err)
	}
	if n := <-done; n >= h.n-100 {
		t.Errorf("a read had to wait for %d of %d tables", n, h.n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Zero(&blk.Req{Ctx: ctx}, 0, size, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("zeroing for a client that has gone: %v", err)
	}
	mustClose(t, s)
}

// hooked counts the writes.
type hooked struct {
	mem
	n     int
	wrote func(n int)
}

func (h *hooked) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if h.n++; h.wrote != nil {
		h.wrote(h.n)
	}
	return h.mem.WriteAt(r, v, off, f)
}

// TestFileEndsWithItsLastCluster: as QEMU leaves it.
func TestFileEndsWithItsLastCluster(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 4 << 20})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 512)), 1<<20+512, 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	if f.Size()&0xffff != 0 {
		t.Errorf("the file is %d bytes long", f.Size())
	}
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("SKIPPED: qemu-io is not installed, so nothing was compared with it")
	}
	name := filepath.Join(t.TempDir(), "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", name, "4M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 1049088 512", name)
	if out := strings.TrimSpace(run(t, "stat", "-c", "%s", name)); out != strconv.FormatInt(f.Size(), 10) {
		t.Errorf("QEMU's file is %s bytes long, ours %d", out, f.Size())
	}
}
