package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
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
	view := &image{}
	view.config = d.s.config
	for i := range peek(d.s).snaps {
		sn := &peek(d.s).snaps[i]
		if sn.ID != id {
			continue
		}
		view = atSnapshot(d.t, d.s, sn)
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
	if len(peek(d.s).snaps) != len(d.snaps) {
		d.t.Fatalf("%d snapshots, want %d", len(peek(d.s).snaps), len(d.snaps))
	}
	for id, want := range d.snaps {
		if !bytes.Equal(d.content(id), want) {
			d.t.Fatalf("snapshot %s differs", id)
		}
	}
}

// TestSnapshots makes and deletes snapshots between random writes and compares all with plain
// bytes; no cluster is lost.
func TestSnapshots(t *testing.T) {
	for _, sh := range []shape{
		{cs: 512, bits: 16, v: "v3"}, {cs: 4096, bits: 16, v: "v3"}, {cs: 65536, bits: 4, v: "v3"},
		{cs: 1024, bits: 64, v: "v3", lazy: true},
	} {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			f := mustCreate(t, sh.options(512<<10))
			all := config{unmap: true, options: checks("all")}
			d := &disk{t: t, s: mustOpen(t, mem{f}, all), now: make([]byte, 512<<10), snaps: map[string][]byte{}}
			rnd := rand.New(rand.NewPCG(1, sh.cs))
			for i := range 30 {
				d.scribble(rnd, 8)
				if id := fmt.Sprint(rnd.IntN(i + 1)); i%3 == 2 && d.snaps[id] != nil {
					if err := d.s.DeleteSnapshot(req(), id, d.s.nameOf(id)); err != nil {
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
				if err := d.s.DeleteSnapshot(req(), id, d.s.nameOf(id)); err != nil {
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
	if err := s.DeleteSnapshot(req(), a, "a"); err != nil {
		return err
	}
	return s.Inactivate(req())
}

// afterwards opens an image that twice has left at some point: it is sound when the next writer has
// it, and snapshots and disk show what they may.
func afterwards(t *testing.T, f *drivertest.MemFile) {
	t.Helper()
	s := mustOpen(t, mem{f}, config{})
	sound(t, s, true)
	d := &disk{t: t, s: s, now: make([]byte, 64<<10)}
	for _, sn := range peek(s).snaps {
		b := d.content(sn.ID)
		if name := sn.Name; b[0] != 1 || name == "a" && b[6143] != 1 || name == "b" && (b[2048] != 2 || b[8191] != 2) {
			t.Fatalf("snapshot %s shows %d %d %d", name, b[0], b[2048], b[6143])
		}
	}
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{9}, 32<<10)), 0, 0); err != nil {
		t.Fatal(err)
	}
	for i := range peek(s).snaps {
		if b := d.content(peek(s).snaps[i].ID); b[0] != 1 {
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
		if s, err := openImage(req(), config{file: mem{f}, options: quiet}); err == nil {
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

// nameOf is the name of the first snapshot with that ID.
func (s *image) nameOf(id string) string {
	return peek(s).snaps[slices.IndexFunc(peek(s).snaps, func(x layout.Snapshot) bool { return x.ID == id })].Name
}

// looks is a context that counts how often it is looked at, and has ended after some times.
type looks struct {
	context.Context
	n, most int
}

func (l *looks) Err() error {
	if l.n++; l.n > l.most {
		return context.Canceled
	}
	return nil
}

// Done implements context.Context: it can end, which nobody who waits is told.
func (l *looks) Done() <-chan struct{} { return make(chan struct{}) }

// TestSnapshotsEndWithTheirClients: whenever a client goes, a snapshot is made or deleted as a
// whole or not at all, and the image is as it was otherwise: no leak, no wrong flag, nothing to
// repair.
func TestSnapshotsEndWithTheirClients(t *testing.T) {
	for _, deletes := range []bool{false, true} {
		gaveUp, i := 0, 0
		for ; ; i++ {
			f := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(512))})
			s := mustOpen(t, mem{f}, config{})
			for off := int64(0); off < 1<<20; off += 96 << 10 {
				if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 4096)), off, 0); err != nil {
					t.Fatal(err)
				}
			}
			if deletes {
				if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
					t.Fatal(err)
				}
				if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{2}, 8192)), 0, 0); err != nil {
					t.Fatal(err)
				}
			}
			ctx := &looks{Context: context.Background(), most: i}
			r := &blk.Req{Ctx: ctx}
			var err error
			if deletes {
				err = s.DeleteSnapshot(r, "1", "s")
			} else {
				_, err = s.CreateSnapshot(r, "s", time.Unix(1, 0), 0)
			}
			if there := len(peek(s).snaps) == 1; there == (deletes == (err == nil)) {
				t.Fatalf("%d looks: %v, but %d snapshots", i, err, len(peek(s).snaps))
			}
			if err != nil {
				if gaveUp++; peek(s).flagsDue || peek(s).hdr.IncompatibleFeatures != 0 {
					t.Fatalf("%d looks: flags due %v, bits %x", i, peek(s).flagsDue, peek(s).hdr.IncompatibleFeatures)
				}
				sound(t, s, false)
			}
			mustClose(t, s)
			s = mustOpen(t, mem{f}, config{})
			sound(t, s, false)
			mustClose(t, s)
			if ctx.n <= i {
				break
			}
		}
		if gaveUp < 10 {
			t.Errorf("deletes %v: given up %d times in %d", deletes, gaveUp, i)
		}
	}
}

// TestSnapshotWalkLooks: also within one table a walk sees that its client has gone.
func TestSnapshotWalkLooks(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 30, ClusterSize: ptr(uint64(2 << 20))})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	for _, walk := range []func(r *blk.Req) error{
		func(r *blk.Req) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			_, err := s.clustersOf(r, s.l1.at(0), nil)
			return err
		},
		func(r *blk.Req) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			_, err := s.fixFlags(r, 0)
			return err
		},
	} {
		ctx := &looks{Context: context.Background(), most: 1 << 30}
		if err := walk(&blk.Req{Ctx: ctx}); err != nil {
			t.Fatal(err)
		}
		if want := (2 << 20) / 8 / lookEvery; ctx.n < want {
			t.Errorf("looked %d times at its context, want %d", ctx.n, want)
		}
	}
	mustClose(t, s)
}

// TestTablesNamedTwice: an L1 table that names an L2 table twice, or one that is not in the file,
// is found before any of what it says is walked, also in an image that is too large for a survey.
func TestTablesNamedTwice(t *testing.T) {
	for _, c := range []struct {
		name string
		poke func(l1 []uint64)
	}{
		{"all name one", func(l1 []uint64) {
			for i := range l1 {
				l1[i] = l1[0]
			}
		}},
		{"two name one", func(l1 []uint64) { l1[len(l1)-1] = l1[0] &^ layout.Copied }},
		{"beyond the end", func(l1 []uint64) { l1[1] = 1 << 50 }},
		{"unaligned", func(l1 []uint64) { l1[1] = l1[0] + 512 }},
	} {
		for _, deletes := range []bool{false, true} {
			// 2^12 entries of L1, and as many in the table that they name.
			f := mustCreate(t, CreateOptions{Size: 1 << 39, ClusterSize: ptr(uint64(32 << 10)), RefcountBits: ptr(int64(64))})
			s := mustOpen(t, mem{f}, config{})
			if err := s.WriteAt(req(), blk.Buf(make([]byte, 1<<20)), 0, 0); err != nil {
				t.Fatal(err)
			}
			at := int64(peek(s).hdr.L1TableOffset)
			if deletes {
				if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
					t.Fatal(err)
				}
				at = int64(peek(s).snaps[0].L1TableOffset)
			}
			mustClose(t, s)
			l1 := make([]uint64, 1<<12)
			l1[0] = be.Uint64(f.Bytes()[at:])
			c.poke(l1)
			var b []byte
			for _, e := range l1 {
				b = be.AppendUint64(b, e)
			}
			f.Poke(at, b)
			var told corruptions
			s = mustOpen(t, mem{f}, config{corrupted: told.corrupted})
			surveyTooLarge(s, 0)
			before := bytes.Clone(f.Bytes()[s.cs:])
			var err error
			if deletes {
				err = s.DeleteSnapshot(req(), "1", "s")
			} else {
				_, err = s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0)
			}
			if err == nil || len(told.fatal) != 1 {
				t.Errorf("%s, deletes %v: %v, reports %q", c.name, deletes, err, told.fatal)
			}
			if !bytes.Equal(f.Bytes()[s.cs:], before) {
				t.Errorf("%s, deletes %v: something has changed", c.name, deletes)
			}
			_ = s.Close()
		}
	}
}

// TestSnapshotIsDeletedBesideReaders: a request that is still reading neither leaves copied flags
// wrong nor the image dirty until it is closed.
func TestSnapshotIsDeletedBesideReaders(t *testing.T) {
	for _, v := range []string{"v2", "v3"} {
		f := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(512)), Version: v})
		s := mustOpen(t, mem{f}, config{unmap: true})
		write := func(off, n int64, b byte) {
			t.Helper()
			if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{b}, int(n))), off, 0); err != nil {
				t.Fatal(err)
			}
		}
		write(0, 64<<10, 1)
		if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
			t.Fatal(err)
		}
		write(0, 8<<10, 2)
		s.mu.Lock()
		reader := s.quarantine.hold()
		s.mu.Unlock()
		if err := s.DeleteSnapshot(req(), "1", "s"); err != nil {
			t.Fatal(err)
		}
		if peek(s).flagsDue || peek(s).hdr.IncompatibleFeatures != 0 {
			t.Errorf("%s: flags due %v, bits %x", v, peek(s).flagsDue, peek(s).hdr.IncompatibleFeatures)
		}
		crashed := mustOpen(t, mem{drivertest.MemFileOf(bytes.Clone(f.Bytes()))}, config{readOnly: true})
		sound(t, crashed, true)
		_ = crashed.Close()
		if len(peek(s).limbo) == 0 {
			t.Errorf("%s: nothing is kept for the reader", v)
		}
		reader.Release()
		if err := s.Flush(req()); err != nil {
			t.Fatal(err)
		}
		sound(t, s, false)
		mustClose(t, s)
	}
}
