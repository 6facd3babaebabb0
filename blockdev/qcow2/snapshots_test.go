package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// disk is an image with internal snapshots beside plain bytes.
type disk struct {
	t     testing.TB
	s     *image
	now   []byte
	snaps map[string][]byte // by ID
}

func (d *disk) scribble(rnd *rand.Rand, n int) {
	d.t.Helper()
	for range n {
		size := 512 * (1 + rnd.IntN(20))
		off := 512 * rnd.IntN((len(d.now)-size)/512+1)
		var err error
		switch k := rnd.IntN(10); {
		case k < 6:
			fill(rnd, d.now[off:off+size])
			err = d.s.WriteAt(req(), blk.Buf(d.now[off:off+size]), int64(off), 0)
		case k < 8:
			cs := int(d.s.cs)
			lo, hi := (off+cs-1)/cs*cs, (off+size)/cs*cs
			if lo < hi {
				clear(d.now[lo:hi])
				err = d.s.Zero(req(), int64(lo), int64(hi-lo), blk.MayUnmap)
			}
		default:
			cs := int(d.s.cs)
			at := off / cs * cs
			p := make([]byte, cs)
			fill(rnd, p[:cs/2])
			if d.s.WriteAt(req(), blk.Buf(p), int64(at), blk.Compressed) == nil { // refused where something is allocated
				copy(d.now[at:], p)
			}
		}
		if err != nil {
			d.t.Fatal(err)
		}
	}
}

// content reads what a snapshot shows, through its own L1 table.
func (d *disk) content(id string) []byte {
	d.t.Helper()
	view := &image{config: d.s.config}
	for i := range d.s.snaps {
		sn := &d.s.snaps[i]
		if sn.ID != id {
			continue
		}
		c := d.s.config
		c.readOnly, c.keeper = true, nil
		v, err := openImage(req(), c)
		if err != nil {
			d.t.Fatal(err)
		}
		view = v
		if view.l1, err = view.readTable(req(), int64(sn.L1TableOffset), int64(sn.L1Size)); err != nil {
			d.t.Fatal(err)
		}
	}
	b := make([]byte, len(d.now))
	if err := view.ReadAt(req(), blk.Buf(b), 0, 0); err != nil {
		d.t.Fatal(err)
	}
	_ = view.Close()
	return b
}

func (d *disk) check() {
	d.t.Helper()
	b := make([]byte, len(d.now))
	if err := d.s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, d.now) {
		d.t.Fatalf("the disk differs: %v", err)
	}
	if err := d.s.Flush(req()); err != nil {
		d.t.Fatal(err)
	}
	if len(d.s.snaps) != len(d.snaps) {
		d.t.Fatalf("%d snapshots, want %d", len(d.s.snaps), len(d.snaps))
	}
	for id, want := range d.snaps {
		if !bytes.Equal(d.content(id), want) {
			d.t.Fatalf("snapshot %s differs", id)
		}
	}
}

// TestSnapshots makes and deletes snapshots between random writes and compares all with plain bytes; no cluster is lost.
func TestSnapshots(t *testing.T) {
	for _, sh := range []shape{{cs: 512, bits: 16, v: "v3"}, {cs: 4096, bits: 16, v: "v3"}, {cs: 65536, bits: 4, v: "v3"}, {cs: 1024, bits: 64, v: "v3", lazy: true}} {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			f := mustCreate(t, CreateOptions{Size: 512 << 10, ClusterSize: &sh.cs, RefcountBits: &sh.bits, Version: sh.v, LazyRefcounts: sh.lazy})
			all := config{unmap: true, options: Options{OverlapTemplate: "all"}}
			d := &disk{t: t, s: mustOpen(t, mem{f}, all), now: make([]byte, 512<<10), snaps: map[string][]byte{}}
			rnd := rand.New(rand.NewPCG(1, sh.cs))
			for i := range 30 {
				d.scribble(rnd, 8)
				if id := fmt.Sprint(rnd.IntN(i + 1)); i%3 == 2 && d.snaps[id] != nil {
					if err := d.s.DeleteSnapshot(req(), id); err != nil {
						t.Fatal(err)
					}
					delete(d.snaps, id)
				} else if i%2 == 0 {
					id, err := d.s.CreateSnapshot(req(), fmt.Sprint("s", i), time.Now(), 0)
					if err != nil {
						t.Fatal(err)
					}
					d.snaps[id] = bytes.Clone(d.now)
				}
				d.check()
			}
			if len(d.snaps) < 3 {
				t.Errorf("only %d snapshots are left", len(d.snaps))
			}
			mustClose(t, d.s)
			d.s = mustOpen(t, mem{f}, all)
			sound(t, d.s, false)
			d.check()
			for id := range d.snaps {
				if err := d.s.DeleteSnapshot(req(), id); err != nil {
					t.Fatal(err)
				}
				d.scribble(rnd, 20) // into what has become free
				delete(d.snaps, id)
			}
			d.check()
			mustClose(t, d.s)
			d.s = mustOpen(t, mem{f}, config{readOnly: true})
			sound(t, d.s, false)
			mustClose(t, d.s)
		})
	}
}

// twice is a short history with a snapshot that stays and one that goes.
func twice(s *image) error {
	w := func(c byte, off int64) error {
		return s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{c}, 6144)), off, 0)
	}
	if err := w(1, 0); err != nil {
		return err
	}
	a, err := s.CreateSnapshot(req(), "a", time.Unix(1, 0), 0)
	if err != nil {
		return err
	}
	if err := w(2, 2048); err != nil {
		return err
	}
	if _, err := s.CreateSnapshot(req(), "b", time.Unix(2, 0), 0); err != nil {
		return err
	}
	if err := w(3, 4096); err != nil {
		return err
	}
	if err := s.DeleteSnapshot(req(), a); err != nil {
		return err
	}
	return s.Inactivate(req())
}

// afterwards opens an image that twice has left at some point: it is sound when the next writer has it, and snapshots and disk show what they may.
func afterwards(t *testing.T, f *drivertest.MemFile) {
	t.Helper()
	s := mustOpen(t, mem{f}, config{})
	sound(t, s, true)
	d := &disk{t: t, s: s, now: make([]byte, 64<<10)}
	for i := range s.snaps {
		b := d.content(s.snaps[i].ID)
		if name := s.snaps[i].Name; b[0] != 1 || name == "a" && b[6143] != 1 || name == "b" && (b[2048] != 2 || b[8191] != 2) {
			t.Fatalf("snapshot %s shows %d %d %d", name, b[0], b[2048], b[6143])
		}
	}
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{9}, 32<<10)), 0, 0); err != nil {
		t.Fatal(err)
	}
	for i := range s.snaps {
		if b := d.content(s.snaps[i].ID); b[0] != 1 {
			t.Fatal("a write went through to a snapshot")
		}
	}
	mustClose(t, s)
}

// TestSnapshotsAcrossCrashes lets power fail after each write.
func TestSnapshotsAcrossCrashes(t *testing.T) {
	f := drivertest.CrashFileOf(mustCreate(t, CreateOptions{Size: 64 << 10, ClusterSize: ptr(uint64(1024))}))
	s := mustOpen(t, mem{f}, config{})
	crashes := 0
	f.After(func(int) {
		for seed := range uint64(4) {
			crashes++
			if !t.Failed() {
				afterwards(t, f.CrashLocked(seed))
			}
		}
	})
	if err := twice(s); err != nil {
		t.Fatal(err)
	}
	f.After(nil)
	if crashes < 50 {
		t.Errorf("only %d crashes", crashes)
	}
	_ = s.Close()
}

// TestSnapshotsWithFaults fails the i-th I/O.
func TestSnapshotsWithFaults(t *testing.T) {
	for i := 0; ; i++ {
		img := mustCreate(t, CreateOptions{Size: 64 << 10, ClusterSize: ptr(uint64(1024))})
		f := drivertest.NewFault(img)
		f.FailAt(i, syscall.EIO)
		if s, err := openImage(req(), config{file: mem{f}, options: Options{CacheCleanInterval: ptr(int64(0))}}); err == nil {
			_ = twice(s)
			_ = s.Inactivate(req())
			_ = s.Close()
		}
		failed := f.Failed() > 0
		f.Clear()
		if afterwards(t, img); !failed {
			return
		}
	}
}
