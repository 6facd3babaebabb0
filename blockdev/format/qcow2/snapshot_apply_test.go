package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// TestApplySnapshot goes back to snapshots, of other sizes too, between random writes, and compares
// all with plain bytes.
func TestApplySnapshot(t *testing.T) {
	for _, sh := range []shape{
		{cs: 512, bits: 16, v: "v3"}, {cs: 4096, bits: 16, v: "v2"}, {cs: 65536, bits: 4, v: "v3"},
		{cs: 1024, bits: 64, v: "v3", lazy: true}, {cs: 16384, bits: 16, v: "v3", ext: true},
	} {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			f := mustCreate(t, sh.options(512<<10))
			all := config{unmap: true, options: checks("all")}
			d := &disk{t: t, s: mustOpen(t, mem{f}, all), now: make([]byte, 512<<10), snaps: map[string][]byte{}}
			rnd := rand.New(rand.NewPCG(3, sh.cs))
			applied := 0
			for i := range 40 {
				d.scribble(rnd, 6)
				switch id := fmt.Sprint(1 + rnd.IntN(i+1)); {
				case i%2 == 0 && len(d.snaps) < 5:
					id, err := d.s.CreateSnapshot(req(), fmt.Sprint("s", i), time.Now(), 0)
					if err != nil {
						t.Fatal(err)
					}
					d.snaps[id] = bytes.Clone(d.now)
				case d.snaps[id] != nil && i%5 == 1:
					if err := d.s.DeleteSnapshot(req(), id, d.s.nameOf(id)); err != nil {
						t.Fatal(err)
					}
					delete(d.snaps, id)
				case d.snaps[id] != nil:
					if err := d.s.ApplySnapshot(req(), id, d.s.nameOf(id)); err != nil {
						t.Fatal(err)
					}
					d.now = bytes.Clone(d.snaps[id])
					applied++
				case sh.v == "v3":
					size := 512 * (600 + rnd.IntN(1000))
					if err := d.s.Resize(req(), int64(size), blk.PreallocOff); err != nil {
						t.Fatal(err)
					}
					d.now = append(d.now, make([]byte, max(0, size-len(d.now)))...)[:size]
				}
				d.compare()
			}
			if applied < 3 {
				t.Errorf("only %d snapshots were applied", applied)
			}
			mustClose(t, d.s)
			d.s = mustOpen(t, mem{f}, all)
			sound(t, d.s, false)
			d.compare()
			mustClose(t, d.s)
			qemuChecks(t, "", f.Bytes(), nil, nil, d.now)
		})
	}
}

// compare is check for disks and snapshots of all sizes.
func (d *disk) compare() {
	d.t.Helper()
	if n := int(d.s.size.Load()); n != len(d.now) {
		d.t.Fatalf("the disk has %d bytes, want %d", n, len(d.now))
	}
	b := make([]byte, len(d.now))
	if err := d.s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, d.now) {
		d.t.Fatalf("the disk differs: %v", err)
	}
	if err := d.s.Flush(req()); err != nil {
		d.t.Fatal(err)
	}
	sound(d.t, d.s, true)
	for id, want := range d.snaps {
		c := config{readOnly: true, options: Options{XQblockdSnapshot: &id}}
		view := mustOpen(d.t, d.s.file, c)
		b := make([]byte, view.size.Load())
		if err := view.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, want) {
			d.t.Fatalf("snapshot %s, of %d bytes, differs: %v", id, len(b), err)
		}
		if err := view.Close(); err != nil {
			d.t.Fatal(err)
		}
	}
}

// there, followed by back, is a short history: a disk of 1, a snapshot of it, and one of 2, of
// another size if that can be, which is flushed; then back to the snapshot.
func there(s *image) error {
	w := func(c byte, off int64) error {
		return s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{c}, 8<<10)), off, 0)
	}
	if err := w(1, 0); err != nil {
		return err
	}
	if _, err := s.CreateSnapshot(req(), "a", time.Unix(1, 0), 0); err != nil {
		return err
	}
	if s.version >= 3 {
		if err := s.Resize(req(), 96<<10, blk.PreallocOff); err != nil {
			return err
		}
	}
	if err := w(2, 0); err != nil {
		return err
	}
	if err := w(2, s.size.Load()-8<<10); err != nil {
		return err
	}
	return s.Flush(req())
}

func back(r *blk.Req, s *image) error { return s.ApplySnapshot(r, "1", "a") }

// eitherWay opens what was left between there and back: the disk is all of one state, and the
// snapshot is whole.
func eitherWay(t *testing.T, f *drivertest.MemFile) (isBack bool) {
	t.Helper()
	s := mustOpen(t, mem{f}, config{})
	sound(t, s, true)
	size := s.size.Load()
	b := make([]byte, size)
	if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil {
		t.Fatal(err)
	}
	old, then := bytes.Repeat([]byte{2}, 8<<10), bytes.Repeat([]byte{1}, 8<<10)
	if !bytes.HasPrefix(b, old) || !bytes.HasSuffix(b, old) {
		isBack = true
		if size != 64<<10 || !bytes.HasPrefix(b, then) || len(bytes.Trim(b[8<<10:], "\x00")) > 0 {
			t.Fatalf("a disk of %d bytes that begins with %d", size, b[0])
		}
	}
	view := func() {
		t.Helper()
		v := mustOpen(t, mem{f}, config{readOnly: true, options: Options{XQblockdSnapshot: ptr("a")}})
		p := make([]byte, 8<<10)
		if err := v.ReadAt(req(), blk.Buf(p), 0, 0); err != nil || !bytes.Equal(p, then) || v.size.Load() != 64<<10 {
			t.Fatalf("the snapshot begins with %d, of %d bytes: %v", p[0], v.size.Load(), err)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
	}
	view()
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{9}, int(size))), 0, 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	view()
	return isBack
}

// TestApplySnapshotAcrossCrashes lets power fail after each write.
func TestApplySnapshotAcrossCrashes(t *testing.T) {
	for _, o := range []CreateOptions{{}, {Version: "v2"}, {LazyRefcounts: true}} {
		o.Size, o.ClusterSize = 64<<10, ptr(uint64(1024))
		f := drivertest.CrashFileOf(mustCreate(t, o))
		s := mustOpen(t, mem{f}, config{})
		if err := there(s); err != nil {
			t.Fatal(err)
		}
		ways := map[bool]int{}
		f.After(func(int) {
			for seed := range uint64(6) {
				if !t.Failed() {
					ways[eitherWay(t, f.CrashLocked(seed))]++
				}
			}
		})
		if err := back(req(), s); err != nil {
			t.Fatal(err)
		}
		if err := s.Inactivate(req()); err != nil {
			t.Fatal(err)
		}
		f.After(nil)
		if ways[false] < 5 || ways[true] < 5 {
			t.Errorf("not gone back %d times, gone back %d times", ways[false], ways[true])
		}
		_ = s.Close()
	}
}

// TestApplySnapshotWithFaults fails the i-th I/O.
func TestApplySnapshotWithFaults(t *testing.T) {
	for i := 0; ; i++ {
		img := mustCreate(t, CreateOptions{Size: 64 << 10, ClusterSize: ptr(uint64(1024))})
		f := drivertest.NewFault(img)
		s := mustOpen(t, mem{f}, config{})
		if err := there(s); err != nil {
			t.Fatal(err)
		}
		f.FailAt(i, syscall.EIO)
		err := back(req(), s)
		failed := f.Failed() > 0
		f.Clear()
		if !failed && err != nil {
			t.Fatal(err)
		}
		if isBack := s.size.Load() == 64<<10; err == nil && !isBack {
			t.Fatalf("call %d: nothing was done", i)
		}
		_ = s.Inactivate(req())
		_ = s.Close()
		if isBack := eitherWay(t, img); isBack != (s.size.Load() == 64<<10) {
			t.Fatalf("call %d: back %v once it is opened again", i, isBack)
		}
		if !failed {
			return
		}
	}
}

// TestApplySnapshotEndsWithItsClient: whenever the client goes, all is done or nothing.
func TestApplySnapshotEndsWithItsClient(t *testing.T) {
	gaveUp := 0
	for i := 0; ; i++ {
		f := mustCreate(t, CreateOptions{Size: 64 << 10, ClusterSize: ptr(uint64(512))})
		s := mustOpen(t, mem{f}, config{})
		if err := there(s); err != nil {
			t.Fatal(err)
		}
		ctx := &looks{Context: context.Background(), most: i}
		err := back(&blk.Req{Ctx: ctx}, s)
		if isBack := s.size.Load() == 64<<10; isBack != (err == nil) {
			t.Fatalf("%d looks: %v, but the disk has %d bytes", i, err, s.size.Load())
		}
		if err != nil {
			gaveUp++
			sound(t, s, false)
		}
		mustClose(t, s)
		if isBack := eitherWay(t, f); isBack != (err == nil) {
			t.Fatalf("%d looks: %v, and back %v", i, err, isBack)
		}
		if ctx.n <= i {
			break
		}
	}
	if gaveUp < 5 {
		t.Errorf("given up %d times only", gaveUp)
	}
}

// TestMachineState: the state of a machine, behind the end of the disk, goes with snapshots and
// comes back with them, and never becomes a part of the disk.
func TestMachineState(t *testing.T) {
	tool(t, "qemu-img")
	tool(t, "qemu-io")
	for o, grown := range map[string]int64{
		"cluster_size=64k": 600 << 20, "cluster_size=4k": 40 << 20, "extended_l2=on,cluster_size=16k": 40 << 20,
		"compat=0.10,cluster_size=4k": 0, // cannot grow
	} {
		t.Run(o, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "a.qcow2")
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, name, "1M")
			run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 512k", "-c", "write -b -P 7 0 200k", name)
			run(t, "qemu-img", "snapshot", "-c", "one", name)
			run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", "-c", "write -b -P 8 0 100k", name)
			s := mustOpen(t, openOS(t, name), config{})
			if err := s.ApplySnapshot(req(), "1", "one"); err != nil {
				t.Fatal(err)
			}
			sound(t, s, false)
			mustClose(t, s)
			qemuCheck(t, name)
			out := run(t, "qemu-io", "-f", "qcow2", "-c", "read -P 1 0 512k", "-c", "read -P 0 512k 512k", "-c", "read -b -P 7 0 200k", name)
			if strings.Contains(out, "erification failed") {
				t.Fatal(out)
			}
			if grown == 0 {
				return
			}
			s = mustOpen(t, openOS(t, name), config{})
			if err := s.Resize(req(), grown, blk.PreallocOff); err != nil {
				t.Fatal(err)
			}
			if x, err := s.Status(req(), 1<<20, grown-1<<20); err != nil || x.Data || x.Allocated || x.N != grown-1<<20 {
				t.Errorf("what was added is not unallocated: %+v, %v", x, err)
			}
			mustClose(t, s)
			qemuCheck(t, name)
			run(t, "qemu-img", "snapshot", "-a", "one", name)
			if out := run(t, "qemu-io", "-f", "qcow2", "-c", "read -b -P 7 0 200k", name); strings.Contains(out, "erification failed") {
				t.Fatal(out)
			}
		})
	}
}
