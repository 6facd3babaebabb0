package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestQemuBitmapList shows the bitmaps that qemu-img made; those of an image that is written to are
// in use.
func TestQemuBitmapList(t *testing.T) {
	tool(t, "qemu-img")
	name := filepath.Join(t.TempDir(), "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", name, "1M")
	run(t, "qemu-img", "bitmap", "--add", name, "one")
	run(t, "qemu-img", "bitmap", "--add", "--disable", "-g", "4096", name, "two")
	list := func(c config) []*types.Qcow2BitmapInfo {
		s := mustOpen(t, openOS(t, name), c)
		defer mustClose(t, s)
		return *s.shownBitmaps.Load()
	}
	l := list(config{readOnly: true})
	auto := []types.Qcow2BitmapInfoFlags{types.Qcow2BitmapInfoFlagsAuto}
	if len(l) != 2 || l[0].Name != "one" || l[0].Granularity != 65536 || !slices.Equal(l[0].Flags, auto) ||
		l[1].Name != "two" || l[1].Granularity != 4096 || l[1].Flags == nil || len(l[1].Flags) != 0 {
		t.Fatalf("%+v", l)
	}
	if l := list(config{}); len(l) != 2 || !slices.Contains(l[0].Flags, types.Qcow2BitmapInfoFlagsInUse) {
		t.Fatalf("bitmaps of a writable image: %+v", l)
	}
	if l := list(config{readOnly: true}); len(l) != 2 {
		t.Fatalf("bitmaps after a writable open: %+v", l)
	}
}

// TestBitmapDirectoryHostile refuses directories whose entries do not fill them.
func TestBitmapDirectoryHostile(t *testing.T) {
	parse := func(b []byte, n uint32) ([]*stored, error) {
		f := drivertest.MemFileOf(append(make([]byte, 4096), b...))
		s := &image{}
		s.file = mem{f}
		return s.readDirectory(req(), 4096, int64(len(b)), n)
	}
	good := make([]byte, 32)
	good[17], good[19], good[24] = 16, 1, 'x'
	if l, err := parse(good, 1); err != nil || len(l) != 1 || l[0].Name != "x" {
		t.Fatal(l, err)
	}
	for at, v := range map[int]byte{17: 32, 18: 4, 19: 0, 20: 255} {
		b := slices.Clone(good)
		b[at] = v
		if _, err := parse(b, 1); err == nil {
			t.Errorf("byte %d = %d is accepted", at, v)
		}
	}
	for _, n := range []uint32{0, 2, 1 << 31} {
		if _, err := parse(good, n); err == nil {
			t.Errorf("%d entries are accepted", n)
		}
	}
}

// memKeeper keeps persistent bitmaps for an image without a node.
type memKeeper struct {
	list []persisted
	ro   bool
}

func (k *memKeeper) loaded(l []persisted, _ bool) error { k.list = append(k.list, l...); return nil }
func (k *memKeeper) readOnly(ro bool)                   { k.ro = ro }
func (k *memKeeper) persisted() []persisted             { return k.list }
func (k *memKeeper) find(name string) *persisted        { return find(k.list, name) }
func (k *memKeeper) names(f func(name string)) {
	for _, p := range k.list {
		f(p.name)
	}
}
func (k *memKeeper) forget(name string) {
	k.list = slices.DeleteFunc(k.list, func(p persisted) bool { return p.name == name })
}
func (k *memKeeper) records(name string) bool {
	p := k.find(name)
	return p != nil && p.enabled && !p.inconsistent
}

// find is the bitmap of that name, or nil.
func find(l []persisted, name string) *persisted {
	for i := range l {
		if l[i].name == name {
			return &l[i]
		}
	}
	return nil
}

// TestBitmapsAcrossCrashes lets power fail after each write of a time in which an image is opened,
// written to and closed: a bitmap that is trusted afterwards has not missed a write that is in the
// image.
func TestBitmapsAcrossCrashes(t *testing.T) {
	const at = 100 << 10
	img := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(4096))})
	k := &memKeeper{}
	s := mustOpen(t, mem{img}, config{keeper: k})
	k.list = []persisted{
		{name: "a", bits: bitmap.New(s.size.Load(), 512), enabled: true}, {name: "gone", bits: bitmap.New(s.size.Load(), 512)},
	}
	k.list[0].bits.Set(8192, 512)
	k.list[1].bits.SetAll()
	mustClose(t, s)
	f := drivertest.CrashFileOf(img)
	trusted, crashes := map[bool]int{}, 0
	f.After(func(i int) {
		for seed := range uint64(4) {
			crashes++
			k := &memKeeper{}
			s := mustOpen(t, mem{f.CrashLocked(seed)}, config{keeper: k, readOnly: true})
			sound(t, s, true)
			b := make([]byte, 512)
			if err := s.ReadAt(req(), blk.Buf(b), at, 0); err != nil {
				t.Fatal(err)
			}
			for _, p := range k.list {
				if p.inconsistent || p.name != "a" {
					continue
				}
				written := b[0] != 0
				if written && !p.bits.Get(at) || !p.bits.Get(8192) {
					t.Errorf("operation %d, crash %d: a bitmap is short and trusted", i, seed)
				}
				trusted[written]++
			}
			mustClose(t, s)
		}
	})
	k = &memKeeper{}
	s = mustOpen(t, mem{f}, config{keeper: k})
	if len(k.list) != 2 || k.list[0].inconsistent || k.list[0].bits.Count() != 512 ||
		!k.list[0].enabled || k.list[1].enabled {
		t.Fatalf("loaded: %+v", k.list)
	}
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 512)), at, 0); err != nil {
		t.Fatal(err)
	}
	k.list[0].bits.Set(at, 512)
	k.list = append(k.list[:1], persisted{name: "b", bits: bitmap.New(s.size.Load(), 65536)})
	mustClose(t, s)
	f.After(nil)
	if trusted[false] == 0 || trusted[true] == 0 || crashes < 20 {
		t.Errorf("%v trusted of %d crashes", trusted, crashes)
	}
	s = mustOpen(t, mem{f}, config{keeper: &memKeeper{}, readOnly: true})
	sound(t, s, false)
	mustClose(t, s)
}

// TestBitmapsWithFaults fails the i-th I/O of a time like that: what is in the image then is not
// short and trusted either.
func TestBitmapsWithFaults(t *testing.T) {
	for i := 0; ; i++ {
		img := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(4096))})
		k := &memKeeper{}
		s := mustOpen(t, mem{img}, config{keeper: k})
		k.list = []persisted{{name: "a", bits: bitmap.New(s.size.Load(), 512), enabled: true}}
		mustClose(t, s)
		f := drivertest.NewFault(img)
		f.FailAt(i, syscall.EIO)
		k = &memKeeper{}
		if s, err := openImage(req(), config{file: mem{f}, keeper: k, options: quiet}); err == nil {
			if s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 512)), 4096, 0) == nil {
				k.list[0].bits.Set(4096, 512)
			}
			_ = s.Inactivate(req())
			_ = s.Close()
		}
		failed := f.Failed() > 0
		f.Clear()
		k = &memKeeper{}
		s = mustOpen(t, mem{img}, config{keeper: k, readOnly: true})
		sound(t, s, true)
		b := make([]byte, 512)
		if err := s.ReadAt(req(), blk.Buf(b), 4096, 0); err != nil {
			t.Fatal(err)
		}
		for _, p := range k.list {
			if !p.inconsistent && b[0] != 0 && !p.bits.Get(4096) {
				t.Errorf("I/O %d fails: a bitmap is short and trusted", i)
			}
		}
		mustClose(t, s)
		if !failed {
			return
		}
	}
}

// TestBitmapsLostReadOnly adds a persistent bitmap to an image that ends read-only: the log says
// that it is lost, and says nothing of one that the image has.
func TestBitmapsLostReadOnly(t *testing.T) {
	img := mustCreate(t, CreateOptions{Size: 1 << 20})
	k := &memKeeper{}
	s := mustOpen(t, mem{img}, config{keeper: k})
	k.list = []persisted{{name: "kept", bits: bitmap.New(s.size.Load(), 65536), enabled: true}}
	mustClose(t, s)
	var said []string
	for i, want := range []int{0, 1} {
		k = &memKeeper{}
		s = mustOpen(t, mem{img}, config{keeper: k, readOnly: true, warn: func(m string) { said = append(said, m) }})
		if i == 1 {
			k.list = append(k.list, persisted{name: "added", bits: bitmap.New(s.size.Load(), 65536), enabled: true})
		}
		mustClose(t, s)
		if len(said) != want {
			t.Fatalf("%d bitmaps are lost: %q", want, said)
		}
	}
	if !strings.Contains(said[0], "'added'") {
		t.Errorf("it does not say which: %s", said[0])
	}
}

// TestQemuReadsBitmaps lets qemu-img read bitmaps of ours, and change them, and reads those.
func TestQemuReadsBitmaps(t *testing.T) {
	tool(t, "qemu-img")
	name := filepath.Join(t.TempDir(), "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", name, "64M")
	k := &memKeeper{}
	s := mustOpen(t, openOS(t, name), config{keeper: k})
	a := bitmap.New(64<<20, 4096)
	a.Set(5<<20, 3<<20)
	a.Set(60<<20, 4096)
	k.list = []persisted{{name: "a", bits: a, enabled: true}, {name: "b", bits: bitmap.New(64<<20, 65536)}}
	mustClose(t, s)
	run(t, "qemu-img", "check", "-q", name)
	run(t, "qemu-img", "bitmap", "--merge", "a", name, "b")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write 0 4k", name)
	run(t, "qemu-img", "check", "-q", name)
	k = &memKeeper{}
	s = mustOpen(t, openOS(t, name), config{keeper: k})
	defer mustClose(t, s)
	got := map[string]int64{}
	for _, p := range k.list {
		if !p.inconsistent {
			got[p.name] = p.bits.Count()
		}
	}
	if got["a"] != 3<<20+4096+4096 || got["b"] != 3<<20+65536 {
		t.Errorf("%v", got)
	}
}

// TestBitmapTooLongAfterResize: a disk does not become larger than its bitmaps can be stored for.
// The image would have one that is inconsistent, and others would not open it.
func TestBitmapTooLongAfterResize(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 30, ClusterSize: ptr(uint64(2 << 20))})
	k := &memKeeper{}
	s := mustOpen(t, mem{f}, config{keeper: k})
	k.list = []persisted{{name: "fine", bits: bitmap.New(1<<30, 1024), enabled: true}}
	want := "Bitmap 'fine' does not fit: Too much space will be occupied by the bitmap. Use larger granularity"
	if err := s.Resize(req(), 4<<40+1<<21, blk.PreallocOff); err == nil || err.Error() != want || s.size.Load() != 1<<30 {
		t.Errorf("%v, %d bytes", err, s.size.Load())
	}
	if err := s.Resize(req(), 4<<40, blk.PreallocOff); err != nil { // 512 MiB
		t.Error(err)
	}
	k.list = []persisted{{name: "bad", inconsistent: true}}
	if err := s.Resize(req(), 1<<43, blk.PreallocOff); err != nil {
		t.Error(err)
	}
	k.list = nil
	mustClose(t, s)
}

// TestSharedBitmapDirectory: a directory is not written to where it is, to say that its bitmaps are
// in use, if guest data may lie in the same cluster.
func TestSharedBitmapDirectory(t *testing.T) {
	for _, c := range []struct {
		name  string
		count byte
		steps [2]int64
		set   *survey
	}{
		{"counted twice, known", 2, [2]int64{}, nil},
		{"counted once, known", 1, [2]int64{}, nil},
		{"counted twice, to be found", 2, [2]int64{1, 1}, nil},
		{"counted once, to be found", 1, [2]int64{1, 1}, nil},
		{"counted twice, not to be found", 2, [2]int64{}, &survey{endless: true}},
	} {
		f := mustCreate(t, CreateOptions{Size: 2 << 30})
		k := &memKeeper{list: []persisted{{name: "a", bits: bitmap.New(2<<30, 65536), enabled: true}}}
		s := mustOpen(t, mem{f}, config{keeper: k})
		for off := int64(0); off < 2<<30; off += 512 << 20 {
			if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 64<<10)), off, 0); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, s)
		s = mustOpen(t, mem{f}, config{readOnly: true})
		dir, last := int64(peek(s).ext.Bitmaps.DirectoryOffset), int64(peek(s).l1.at(3)&layout.OffsetMask)
		mustClose(t, s)
		f.Poke(last+8, be.AppendUint64(nil, uint64(dir)))
		f.Poke(0x20000+2*(dir>>16), []byte{0, c.count})
		want := make([]byte, 64<<10) // the file may end within the cluster
		copy(want, f.Bytes()[dir:])
		cfg := config{file: mem{f}, vetSteps: c.steps, options: quiet}
		s, err := openImage(req(), cfg)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if c.set != nil {
			s.mu.Lock()
			s.survey, s.counted, s.wrong = c.set, nil, wrong{}
			for _, m := range s.stored {
				m.Flags &^= layout.BitmapInUse
			}
			err := s.claimInPlace(req())
			s.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
		}
		b := make([]byte, 64<<10)
		if err := s.ReadAt(req(), blk.Buf(b), 3*(512<<20)+64<<10, 0); err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s: what the guest has there has changed: %v", c.name, err)
		}
		mustClose(t, s)
		s = mustOpen(t, mem{f}, config{readOnly: true})
		if len(peek(s).stored) != 1 || peek(s).stored[0].Flags&layout.BitmapInUse == 0 {
			t.Errorf("%s: bitmaps afterwards: %v", c.name, peek(s).stored)
		}
		if err := s.ReadAt(req(), blk.Buf(b), 3*(512<<20)+64<<10, 0); err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s: what the guest has there has changed after closing: %v", c.name, err)
		}
		mustClose(t, s)
	}
}

// written counts the bytes that are written to a file.
type written struct {
	mem
	n int64
}

func (w *written) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	w.n += v.Len()
	return w.mem.WriteAt(r, v, off, f)
}

// TestManyLongNames: bitmaps that are added one after the other, and taken back in the opposite
// order, do not write the names of all others each time.
func TestManyLongNames(t *testing.T) {
	const n = 600
	f := &written{mem: mem{mustCreate(t, CreateOptions{Size: 1 << 20})}}
	k := &memKeeper{}
	s := mustOpen(t, f, config{keeper: k})
	name := func(i int) string { return fmt.Sprintf("%01023d", i) }
	for i := range n {
		k.list = append([]persisted{{name: name(i), bits: bitmap.New(1<<20, 65536), enabled: true}}, k.list...)
		if err := s.HoldBitmap(req(), name(i)); err != nil {
			t.Fatal(err)
		}
	}
	// Each has a page of table, a change of the header, and its entry; its data are no bytes yet.
	// The directory moves once in 60.
	if most := int64(n)*(64<<10+8<<10) + n/60*(n*1100/2)*2; f.n > most {
		t.Errorf("%d bitmaps took %d KiB of writes, of %d", n, f.n>>10, most>>10)
	}
	look := func(want int) {
		t.Helper()
		seen := &memKeeper{}
		v := mustOpen(t, f.mem, config{keeper: seen, readOnly: true})
		if len(seen.list) != want || peek(v).badBitmaps {
			t.Errorf("the image has %d bitmaps, want %d", len(seen.list), want)
		}
		for i, p := range seen.list {
			if p.name != name(i) || p.inconsistent {
				t.Fatalf("bitmap %d is %s, inconsistent %v", i, p.name, p.inconsistent)
			}
		}
		sound(t, v, true)
		mustClose(t, v)
	}
	look(n)
	f.n = 0
	for i := n - 1; i >= 10; i-- {
		k.list = k.list[1:]
		if err := s.RemoveBitmap(req(), name(i)); err != nil {
			t.Fatal(err)
		}
	}
	if most := int64(n) * (64 << 10); f.n > most {
		t.Errorf("to remove them took %d KiB of writes, of %d", f.n>>10, most>>10)
	}
	look(10)
	mustClose(t, s)
	v := mustOpen(t, f.mem, config{readOnly: true})
	sound(t, v, false)
	mustClose(t, v)
}

// TestBitmapsWhereReadOnlyFails fails the i-th I/O of a change to read-only, and then all of them:
// the node stays writable then, and its bitmaps are not trusted, should the program be killed after
// the next write, unless they have that write. Where that cannot be said in the image, there is no
// next write. The same holds of one that was read-only before.
func TestBitmapsWhereReadOnlyFails(t *testing.T) {
	for _, before := range []bool{false, true} {
		readOnlyFails(t, 1, before)
		readOnlyFails(t, 0, before)
	}
}

func readOnlyFails(t *testing.T, times int, before bool) {
	for i := 0; ; i++ {
		g := drivertest.NewGraph(t)
		img := drivertest.NewMemFile(0)
		f := drivertest.NewFault(img)
		o := &types.BlockdevCreateOptionsQcow2{Size: 1 << 20, ClusterSize: ptr(uint64(4096))}
		n := addQcow2(t, g, "q", created(t, g, f, o), false, nil)
		if _, err := n.Bitmaps().New(graph.DirtyBitmapSpec{Name: "a", Persistent: true}); err != nil {
			t.Fatal(err)
		}
		if err := n.Driver().(graph.BitmapStore).HoldBitmap(req(), "a"); err != nil {
			t.Fatal(err)
		}
		for _, ro := range []bool{true, false} {
			if !before {
				break
			}
			if err := g.SwitchReadOnly(t.Context(), ro, n); err != nil {
				t.Fatal(err)
			}
		}
		f.Inject(drivertest.Rule{Skip: i, Count: times, Err: syscall.EIO})
		switched := g.SwitchReadOnly(t.Context(), true, n) == nil
		failed := f.Failed() > 0
		f.Clear()
		if !switched {
			tx := g.Begin(t.Context())
			root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n)
			if err := errors.Join(err, tx.Commit()); err != nil {
				t.Fatal(err)
			}
			r, err := root.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := root.ReadAt(r, blk.Buf(make([]byte, 512)), 0, 0); i == 0 && err != nil {
				t.Errorf("nothing was stored: %v", err)
			}
			written := root.WriteAt(r, blk.Buf(bytes.Repeat([]byte{1}, 512)), 4096, 0) == nil && root.Flush(r) == nil
			root.End(r)
			k := &memKeeper{}
			s := mustOpen(t, mem{img.Clone()}, config{keeper: k, readOnly: true})
			if p := find(k.list, "a"); written && p != nil && !p.inconsistent && !p.bits.Get(4096) {
				t.Errorf("I/O %d fails, %d times: a bitmap is short and trusted", i, times)
			}
			mustClose(t, s)
			tx = g.Begin(t.Context())
			// A node that has failed is not closed in order.
			if err := errors.Join(tx.DetachRoot(root), tx.Delete(n.Name()), tx.Commit()); err != nil {
				t.Fatal(err)
			}
		}
		if !failed {
			return
		}
	}
}
