package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// marked is an image with live bitmaps, and what was recorded in them by the operations that have
// ended.
type marked struct {
	t    *testing.T
	f    *drivertest.CrashFile
	s    *image
	k    *memKeeper
	rnd  *rand.Rand
	held map[string]*bitmap.Bitmap // at least this is in the bitmap of that name

	// A write that is under way, and the byte that it is of.
	off, n int64
	data   byte

	trusted, crashes int
}

// crash opens what a power failure leaves.
func (d *marked) crash(i int) {
	for seed := range uint64(2) {
		d.crashes++
		k := &memKeeper{}
		s := mustOpen(d.t, mem{d.f.CrashLocked(seed)}, config{keeper: k, readOnly: true})
		if peek(s).hdr.IncompatibleFeatures&layout.IncompatDirty == 0 {
			sound(d.t, s, true)
		}
		for _, p := range k.list {
			have := d.held[p.name]
			if p.inconsistent || have == nil {
				continue
			}
			d.trusted++
			all := p.bits.Clone()
			all.Merge(have)
			if all.Count() != p.bits.Count() {
				d.t.Fatalf("operation %d, crash %d: bitmap %s is short and trusted", i, seed, p.name)
			}
			if now := find(d.k.list, p.name); d.n > 0 && now != nil && now.enabled && d.off+d.n <= s.size.Load() {
				b := make([]byte, d.n)
				if err := s.ReadAt(req(), blk.Buf(b), d.off, 0); err != nil {
					d.t.Fatal(err)
				}
				for j := 0; j < len(b); j += 512 {
					if b[j] == d.data && !p.bits.Get(d.off+int64(j)) {
						d.t.Fatalf("operation %d, crash %d: bitmap %s has missed the write under way", i, seed, p.name)
					}
				}
			}
		}
		mustClose(d.t, s)
	}
}

// settle takes over what is recorded, as nothing is under way.
func (d *marked) settle() {
	d.n = 0
	d.held = map[string]*bitmap.Bitmap{}
	for _, p := range d.k.list {
		if !p.inconsistent {
			d.held[p.name] = p.bits.Clone()
		}
	}
}

func (d *marked) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// step does something to the disk or its bitmaps.
func (d *marked) step() {
	rnd := d.rnd
	size := d.s.size.Load()
	n := int64(1+rnd.IntN(24)) * 512
	off := rnd.Int64N((size-n)/512) * 512
	record := func() {
		for i := range d.k.list {
			if d.k.list[i].enabled && !d.k.list[i].inconsistent {
				d.k.list[i].bits.Set(off, n)
			}
		}
	}
	switch k := rnd.IntN(20); {
	case k < 8:
		d.off, d.n, d.data = off, n, d.data%250+1
		d.must(d.s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{d.data}, int(n))), off, 0))
		record()
	case k < 9:
		off, n = blk.AlignDown(off, 4096), 8192
		n = min(n, size-off)
		if err := d.s.Zero(req(), off, n, blk.MayUnmap); err == nil {
			record()
		}
	case k < 10:
		off, n = blk.AlignDown(off, 4096), 4096
		d.must(d.s.Discard(req(), off, n))
		record()
	case k < 12:
		d.must(d.s.Flush(req()))
	case k < 19:
		d.stepBitmaps(k)
	default:
		d.held = nil // while the size changes nobody trusts them
		to := int64(4+rnd.IntN(6))<<20 + int64(rnd.IntN(16))*512
		d.must(d.s.Resize(req(), to, ""))
		for i := range d.k.list {
			d.k.list[i].bits.Resize(to)
		}
	}
	d.settle()
}

// stepBitmaps does something to the bitmaps.
func (d *marked) stepBitmaps(k int) {
	rnd := d.rnd
	switch {
	case k < 14:
		if len(d.k.list) < 4 {
			name := fmt.Sprint("b", rnd.IntN(1000))
			if find(d.k.list, name) == nil {
				g := int64(512) << rnd.IntN(8)
				p := persisted{name: name, bits: bitmap.New(d.s.size.Load(), g), enabled: rnd.IntN(3) > 0}
				d.k.list = append([]persisted{p}, d.k.list...)
				d.must(d.s.HoldBitmap(req(), name))
			}
		}
	case k < 15:
		if len(d.k.list) > 2 {
			i := rnd.IntN(len(d.k.list))
			name := d.k.list[i].name
			delete(d.held, name)
			d.k.list = append(d.k.list[:i:i], d.k.list[i+1:]...)
			d.must(d.s.RemoveBitmap(req(), name))
		}
	case k < 17:
		if p := d.any(); p != nil {
			p.enabled = !p.enabled
			d.must(d.s.HoldBitmap(req(), p.name))
		}
	case k < 18:
		if p := d.any(); p != nil {
			p.bits.Take()
		}
	default:
		if p, q := d.any(), d.any(); p != nil && q != p {
			p.bits.Merge(q.bits)
			d.must(d.s.HoldBitmap(req(), p.name))
		}
	}
}

func (d *marked) any() *persisted {
	if len(d.k.list) == 0 {
		return nil
	}
	return &d.k.list[d.rnd.IntN(len(d.k.list))]
}

// TestMarksAcrossCrashes lets power fail at each I/O of random histories in which bitmaps come, go
// and change, the disk changes its size, and the image is closed and opened again, also after such
// a failure. A bitmap that holds afterwards has all that was recorded in it before, and the write
// under way, if that is in the image.
func TestMarksAcrossCrashes(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			lazy := seed%3 == 2
			img := mustCreate(t, CreateOptions{Size: 6 << 20, ClusterSize: ptr(uint64(4096)), LazyRefcounts: lazy})
			d := &marked{t: t, rnd: rand.New(rand.NewPCG(7, seed)), f: drivertest.CrashFileOf(img), k: &memKeeper{}}
			d.s = mustOpen(t, mem{d.f}, config{keeper: d.k, unmap: seed%2 == 0})
			for round := range 4 {
				d.f.After(d.crash)
				for range 25 {
					d.step()
				}
				if round%2 == 0 {
					mustClose(t, d.s)
				}
				d.f.After(nil)
				if round%2 == 1 {
					img = d.f.Crash(uint64(round)) // on with what is left
					d.f = drivertest.CrashFileOf(img)
				}
				before, last := d.held, d.k.list
				d.k = &memKeeper{}
				d.s = mustOpen(t, mem{d.f}, config{keeper: d.k})
				for _, p := range d.k.list {
					if was := find(last, p.name); was != nil && p.enabled != was.enabled {
						t.Errorf("round %d: bitmap %s is enabled: %v", round, p.name, p.enabled)
					}
					if p.inconsistent {
						t.Errorf("round %d: bitmap %s does not hold", round, p.name)
					} else if have := before[p.name]; have != nil {
						all := p.bits.Clone()
						all.Merge(have)
						if all.Count() != p.bits.Count() || round%2 == 0 && have.Count() != p.bits.Count() {
							t.Errorf("round %d: bitmap %s has %d bytes, had %d", round, p.name, p.bits.Count(), have.Count())
						}
					}
				}
				if len(d.k.list) < len(before) {
					t.Errorf("round %d: of %d bitmaps %d are left", round, len(before), len(d.k.list))
				}
				d.settle()
			}
			mustClose(t, d.s)
			d.s = mustOpen(t, mem{d.f}, config{keeper: &memKeeper{}, readOnly: true})
			sound(t, d.s, true) // the crashes have lost some
			mustClose(t, d.s)
			if d.trusted < d.crashes {
				t.Errorf("only %d bitmaps held in %d crashes", d.trusted, d.crashes)
			}
			t.Logf("%d crashes, %d bitmaps that held", d.crashes, d.trusted)
		})
	}
}

// TestMarksOutlastAFullHeader: what does not fit into the header leaves the marks as they are, in
// the image and in memory.
func TestMarksOutlastAFullHeader(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(512))})
	k := &memKeeper{list: []persisted{{name: "b", bits: bitmap.New(1<<20, 65536), enabled: true}}}
	s := mustOpen(t, mem{f}, config{keeper: k})
	if err := s.HoldBitmap(req(), "b"); err != nil {
		t.Fatal(err)
	}
	if err := s.ChangeBackingFile(req(), strings.Repeat("x", 500), ""); !errors.Is(err, errNoSpace) {
		t.Fatalf("a name of 500 bytes in a header of 512: %v", err)
	}
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	crashed := &memKeeper{}
	mustClose(t, mustOpen(t, mem{drivertest.MemFileOf(bytes.Clone(f.Bytes()))}, config{keeper: crashed, readOnly: true}))
	if p := find(crashed.list, "b"); p == nil || p.inconsistent || !p.bits.Get(0) {
		t.Errorf("the bitmap after a crash: %+v", p)
	}
	mustClose(t, s)
}

// TestResizeWithMarks grows a disk whose last cluster has to be cleared behind its end, in a region
// that is not marked.
func TestResizeWithMarks(t *testing.T) {
	img := mustCreate(t, CreateOptions{Size: 1<<20 - 512})
	k := &memKeeper{}
	s := mustOpen(t, mem{img}, config{keeper: k})
	defer mustClose(t, s)
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 512)), 1<<20-1024, 0); err != nil {
		t.Fatal(err)
	}
	k.list = []persisted{{name: "a", bits: bitmap.New(1<<20-512, 512), enabled: true}}
	if err := s.HoldBitmap(req(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.Resize(req(), 1<<20, ""); err != nil {
		t.Fatal(err)
	}
	k.list[0].bits.Resize(1 << 20)
	b := make([]byte, 1024)
	if err := s.ReadAt(req(), blk.Buf(b), 1<<20-1024, 0); err != nil || b[0] != 1 || b[512] != 0 {
		t.Fatal(err, b[0], b[512])
	}
}

// TestBitmapsBeginWithWhatIsFlushed: what was written before a bitmap was added, or before it
// forgot that for a backup, is in the image when the program is killed: the bitmap does not have
// it.
func TestBitmapsBeginWithWhatIsFlushed(t *testing.T) {
	const off, n = 128 << 10, 64 << 10
	want := bytes.Repeat([]byte{5}, n)
	for what, do := range map[string]func(s *image, k *memKeeper) error{
		"added": func(s *image, k *memKeeper) error {
			k.list = []persisted{{name: "a", bits: bitmap.New(s.size.Load(), 512), enabled: true}}
			return s.HoldBitmap(req(), "a")
		},
		"cleared, and the disk resized twice": func(s *image, k *memKeeper) error {
			for range 2 {
				k.list[0].bits = bitmap.New(s.size.Load()+512, 512)
				if err := s.Resize(req(), s.size.Load()+512, ""); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		img := mustCreate(t, CreateOptions{Size: 1 << 20})
		k := &memKeeper{}
		s := mustOpen(t, mem{img}, config{keeper: k})
		if what != "added" {
			k.list = []persisted{{name: "a", bits: bitmap.New(s.size.Load(), 512), enabled: true}}
			if err := s.HoldBitmap(req(), "a"); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.WriteAt(req(), blk.Buf(want), off, 0); err != nil {
			t.Fatal(err)
		}
		if err := do(s, k); err != nil {
			t.Fatal(err)
		}
		left := &memKeeper{}
		killed := mustOpen(t, mem{drivertest.MemFileOf(bytes.Clone(img.Bytes()))}, config{keeper: left, readOnly: true})
		if len(left.list) != 1 || left.list[0].inconsistent || left.list[0].bits.Get(off) {
			t.Fatalf("%s: the bitmaps are %+v", what, left.list)
		}
		got := make([]byte, n)
		if err := killed.ReadAt(req(), blk.Buf(got), off, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v, and the disk begins with %d", what, err, got[0])
		}
		mustClose(t, killed)
		mustClose(t, s)
	}
}

// TestQemuAndMarks looks at an image whose writer was killed: for qemu-img its bitmaps are in use
// and the image is sound; for us they hold, until qemu-io has written to it.
func TestQemuAndMarks(t *testing.T) {
	tool(t, "qemu-img")
	dir := t.TempDir()
	name, left := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "left.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", name, "3G")
	run(t, "qemu-img", "bitmap", "--add", "-g", "4096", name, "theirs")
	k := &memKeeper{}
	s := mustOpen(t, openOS(t, name), config{keeper: k})
	k.list = append(k.list, persisted{name: "ours", bits: bitmap.New(3<<30, 65536), enabled: true})
	if err := s.HoldBitmap(req(), "ours"); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 5 << 20, 3<<30 - 512} {
		if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 512)), off, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Flush(req()); err != nil {
		t.Fatal(err)
	}
	run(t, "cp", "--sparse=always", name, left) // what is there is what a kill would leave
	mustClose(t, s)
	check := func() {
		t.Helper()
		var exit *exec.ExitError
		out, err := exec.Command("qemu-img", "check", left).CombinedOutput()
		if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 3) {
			t.Fatalf("%v: %s", err, out) // a kill may leak clusters
		}
	}
	check()
	out, err := exec.Command("qemu-img", "info", "--output=json", left).Output()
	if err != nil || bytes.Count(out, []byte(`"in-use"`)) != 2 {
		t.Fatalf("%v: %s", err, out)
	}
	state := func() (holds, count int64) {
		k := &memKeeper{}
		s := mustOpen(t, openOS(t, left), config{keeper: k, readOnly: true})
		defer mustClose(t, s)
		for _, p := range k.list {
			if !p.inconsistent {
				holds++
				count += p.bits.Count()
				for _, off := range []int64{0, 5 << 20, 3<<30 - 512} {
					if !p.bits.Get(off) {
						t.Errorf("bitmap %s misses what was written at %d", p.name, off)
					}
				}
			}
		}
		return holds, count
	}
	if holds, count := state(); holds != 2 || count != 6<<20 {
		t.Fatalf("%d bitmaps hold, %d bytes in them", holds, count)
	}
	run(t, "qemu-io", "-f", "qcow2", "-c", "write 1M 4k", left)
	if holds, _ := state(); holds != 0 {
		t.Fatalf("%d bitmaps hold after somebody else has written", holds)
	}
	check()
}

// BenchmarkMarkedWrite overwrites 4 KiB with a live bitmap, where all is marked, and without.
func BenchmarkMarkedWrite(b *testing.B) {
	for _, live := range []bool{false, true} {
		b.Run(fmt.Sprint("live=", live), func(b *testing.B) {
			img := mustCreate(b, CreateOptions{Size: 64 << 20})
			k := &memKeeper{}
			s := mustOpen(b, mem{img}, config{keeper: k})
			defer mustClose(b, s)
			if live {
				k.list = []persisted{{name: "a", bits: bitmap.New(64<<20, 65536), enabled: true}}
				if err := s.HoldBitmap(req(), "a"); err != nil {
					b.Fatal(err)
				}
			}
			buf := make([]byte, 4096)
			for off := int64(0); off < 64<<20; off += 65536 {
				if err := s.WriteAt(req(), blk.Buf(buf), off, 0); err != nil {
					b.Fatal(err)
				}
			}
			r := req()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if err := s.WriteAt(r, blk.Buf(buf), int64(i%16384)*4096, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
