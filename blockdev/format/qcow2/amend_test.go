package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

type amendment = types.BlockdevAmendOptionsQcow2

func toWidth(n int64) amendment    { return amendment{RefcountBits: &n} }
func toVersion(v string) amendment { return amendment{Version: ptr(types.BlockdevQcow2Version(v))} }

// amendTo is what a job does.
func amendTo(s *image, a *amendment) error { return (&amender{s}).amendTo(req(), a) }

// amendable makes an image with data in every other cluster, and zeroes in some.
func amendable(t *testing.T, o CreateOptions) (*drivertest.MemFile, []byte) {
	t.Helper()
	f := mustCreate(t, o)
	s := mustOpen(t, mem{f}, config{})
	disk, cs := make([]byte, o.Size), int64(*o.ClusterSize)
	rnd := rand.New(rand.NewPCG(3, 4))
	for c := int64(0); c < int64(o.Size)/cs; c += 2 {
		b := disk[c*cs : (c+1)*cs]
		fill(rnd, b)
		if err := s.WriteAt(req(), blk.Buf(b), c*cs, 0); err != nil {
			t.Fatal(err)
		}
	}
	if o.Version != "v2" {
		if err := s.Zero(req(), 4*cs, 3*cs, blk.MayUnmap); err != nil {
			t.Fatal(err)
		}
		clear(disk[4*cs : 7*cs])
	}
	mustClose(t, s)
	return f, disk
}

// holds tells what is wrong with what a crash, or an amendment, has left in f.
func holds(f file, disk []byte, leaks bool) error {
	s, err := openImage(req(), config{file: f, readOnly: true, options: quiet})
	if err != nil {
		return err
	}
	s.mu.Lock()
	res, err := s.check(req(), false)
	s.mu.Unlock()
	if err != nil || res.Corruptions+res.Errors > 0 || !leaks && res.Leaks > 0 {
		return fmt.Errorf("%v %+v", err, *res)
	}
	b := make([]byte, len(disk))
	if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, disk) {
		return fmt.Errorf("the disk is another: %v", err)
	}
	return nil
}

// TestAmend changes images step by step: each time nothing is wrong with them, for QEMU neither,
// and they work on. Power fails after each write: what is left is sound, too.
func TestAmend(t *testing.T) {
	off, on := false, true
	steps := []amendment{
		toWidth(1), toWidth(64), toWidth(2), toWidth(32), toWidth(8), toWidth(4), toWidth(16),
		{LazyRefcounts: &on}, {LazyRefcounts: &off}, toVersion("v2"), toVersion("v2"), toVersion("v3"),
		{Version: ptr(types.BlockdevQcow2VersionV3), RefcountBits: ptr(int64(64)), LazyRefcounts: &on},
		{Version: ptr(types.BlockdevQcow2VersionV2), RefcountBits: ptr(int64(16)), LazyRefcounts: &off},
	}
	for _, cs := range []uint64{512, 4096, 65536} {
		t.Run(fmt.Sprint(cs), func(t *testing.T) {
			t.Parallel()
			img, disk := amendable(t, CreateOptions{Size: 200 * cs, ClusterSize: &cs})
			for i, a := range steps {
				f := drivertest.CrashFileOf(img)
				s := mustOpen(t, mem{f}, config{})
				n := 0
				f.After(func(i int) {
					n++
					if err := holds(mem{f.CrashLocked(uint64(i))}, disk, true); err != nil {
						t.Errorf("power failed after write %d: %v", i, err)
					}
				})
				if err := amendTo(s, &a); err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
				f.After(nil)
				if n == 0 && i < 9 {
					t.Errorf("step %d has written nothing", i)
				}
				b := disk[:cs]
				fill(rand.New(rand.NewPCG(uint64(i), 1)), b)
				if err := s.WriteAt(req(), blk.Buf(b), 0, 0); err != nil {
					t.Fatal(err)
				}
				mustClose(t, s)
				if err := holds(mem{f}, disk, false); err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
				img = f.Clone()
				qemuFindsNothing(t, img.Bytes())
			}
		})
	}
}

// TestAmendEachFailure: a write that fails leaves an image that works, with the old or the new
// counts.
func TestAmendEachFailure(t *testing.T) {
	cs := uint64(512)
	for i := range 40 {
		img, disk := amendable(t, CreateOptions{Size: 200 * cs, ClusterSize: &cs})
		f, size := drivertest.NewFault(img), img.Size()
		s := mustOpen(t, mem{f}, config{})
		f.FailAt(i, syscall.EIO)
		err := amendTo(s, ptr(toWidth(64)))
		f.Clear()
		if s.dead.Load() {
			t.Fatalf("failure %d: the image was given up: %v", i, err)
		}
		if s.geo.RefcountOrder == 4 && img.Size() > size {
			t.Errorf("failure %d (%v): the file has grown by %d bytes", i, err, img.Size()-size)
		}
		mustClose(t, s)
		if e := holds(mem{img}, disk, true); e != nil {
			t.Fatalf("failure %d (%v): %v", i, err, e)
		}
	}
}

// TestAmendImageRefused: what cannot be is refused in QEMU's words, and changes nothing.
func TestAmendImageRefused(t *testing.T) {
	cs, on := uint64(4096), true
	for _, c := range []struct {
		o    CreateOptions
		a    amendment
		text string
	}{
		{CreateOptions{}, toWidth(3), "Refcount width must be a power of two and may not exceed 64 bits"},
		{CreateOptions{}, toWidth(128), "Refcount width must be a power of two and may not exceed 64 bits"},
		{CreateOptions{Version: "v2"}, toWidth(8),
			"Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"},
		{CreateOptions{Version: "v2"}, amendment{LazyRefcounts: &on},
			"Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"},
		{CreateOptions{RefcountBits: ptr(int64(8))}, toVersion("v2"), "compat=0.10 requires refcount_bits=16"},
		{CreateOptions{CompressionType: "zstd"}, toVersion("v2"), "Cannot downgrade an image with incompatible features set"},
		{CreateOptions{}, amendment{DataFile: ptr("x")}, "data-file can only be set for images that use an external data file"},
		{CreateOptions{}, amendment{DataFileRaw: &on}, "data-file-raw cannot be set on existing images"},
		{CreateOptions{}, amendment{BackingFile: ptr("x")}, "Cannot amend the backing file"},
		{CreateOptions{}, amendment{BackingFmt: ptr(types.BlockdevDriver("raw"))}, "Cannot amend the backing file"},
	} {
		c.o.Size, c.o.ClusterSize = 50*cs, &cs
		f, disk := amendable(t, c.o)
		s := mustOpen(t, mem{f}, config{})
		was := f.Bytes()
		if err := amendTo(s, &c.a); err == nil || err.Error() != c.text {
			t.Errorf("%+v: %v, not %q", c.a, err, c.text)
		}
		if !bytes.Equal(was, f.Bytes()) {
			t.Errorf("%s: the image has changed", c.text)
		}
		mustClose(t, s)
		if err := holds(mem{f}, disk, false); err != nil {
			t.Error(err)
		}
	}
}

// TestAmendShared: counts that do not fit are refused, and snapshots keep what they have.
func TestAmendShared(t *testing.T) {
	cs := uint64(4096)
	f, disk := amendable(t, CreateOptions{Size: 50 * cs, ClusterSize: &cs, Version: "v2"})
	s := mustOpen(t, mem{f}, config{})
	for i := range 3 {
		if _, err := s.CreateSnapshot(req(), fmt.Sprint(i), time.Unix(1, 0), 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []amendment{toVersion("v3"), toWidth(4), toWidth(16), toVersion("v2"), toVersion("v3")} {
		if err := amendTo(s, &a); err != nil {
			t.Fatal(err)
		}
		sound(t, s, false)
	}
	const want = "Cannot decrease refcount entry width to 2 bits: Cluster at offset "
	if err := amendTo(s, ptr(toWidth(2))); err == nil || err.Error()[:len(want)] != want {
		t.Error(err)
	}
	if err := s.DeleteSnapshot(req(), "2", "1"); err != nil {
		t.Fatal(err)
	}
	if err := amendTo(s, ptr(toWidth(2))); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	if err := holds(mem{f}, disk, false); err != nil {
		t.Error(err)
	}
	qemuFindsNothing(t, f.Bytes())
}

// TestAmendCutOff: what the tables of an image refer to behind the end of its file, which was cut
// off, stays free of new counts.
func TestAmendCutOff(t *testing.T) {
	cs := int64(4096)
	f, _ := amendable(t, CreateOptions{Size: uint64(50 * cs), ClusterSize: ptr(uint64(cs))})
	if err := f.Resize(t.Context(), f.Size()-8*cs, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	disk := make([]byte, 50*cs)
	s := mustOpen(t, mem{f}, config{})
	if err := s.ReadAt(req(), blk.Buf(disk), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := amendTo(s, ptr(toWidth(64))); err != nil {
		t.Fatal(err)
	}
	sound(t, s, false)
	mustClose(t, s)
	if err := holds(mem{f}, disk, false); err != nil {
		t.Error(err)
	}
	qemuFindsNothing(t, f.Bytes())
}

// TestDowngradeAboveBacking: zeroes stay zeroes above a backing file that the header does not name.
func TestDowngradeAboveBacking(t *testing.T) {
	cs := uint64(4096)
	lower, _ := amendable(t, CreateOptions{Size: 50 * cs, ClusterSize: &cs})
	back := mustOpen(t, mem{lower}, config{readOnly: true})
	f, disk := amendable(t, CreateOptions{Size: 50 * cs, ClusterSize: &cs})
	s := mustOpen(t, mem{f}, config{backing: func() file { return imageFileOf{back} }})
	if err := s.Zero(req(), 0, int64(50*cs), blk.MayUnmap); err != nil {
		t.Fatal(err)
	}
	clear(disk)
	over, end := context.WithCancel(context.Background())
	end()
	if err := (&amender{s}).amendTo(&blk.Req{Ctx: over}, ptr(toVersion("v2"))); err == nil {
		t.Error("it did not end with its context")
	}
	if err := amendTo(s, ptr(toVersion("v2"))); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(disk))
	if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, disk) {
		t.Errorf("zeroes are none any more: %v", err)
	}
	mustClose(t, s)
	mustClose(t, back)
}
