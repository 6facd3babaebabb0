package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// wreck is an image about to be damaged.
type wreck struct {
	parts
	cs, eb int64
	rnd    *rand.Rand
	f      *drivertest.MemFile
}

func (w *wreck) at(off int64) uint64        { return be.Uint64(w.f.Bytes()[off:]) }
func (w *wreck) poke(off int64, v uint64)   { w.f.Poke(off, be.AppendUint64(nil, v)) }
func (w *wreck) table() (at int64)          { return int64(w.hdr.L1TableOffset) }
func (w *wreck) reft() int64                { return int64(w.hdr.RefcountTableOffset) }
func (w *wreck) change(off int64, x uint64) { w.poke(off, w.at(off)^x) }

// entry is the place of the L2 entry of guest cluster c, and that of its table.
func (w *wreck) entry(c int64) (at, table int64) {
	per := w.cs / w.eb
	table = int64(w.l1.at(c/per) & layout.OffsetMask)
	return table + c%per*w.eb, table
}

// wrecks are ways to damage an image of which guest clusters 0 to 39 have data, the first 20 of
// them in a snapshot, too; lost is how many of those may read as something else afterwards: all of
// a table where it is -1.
var wrecks = []struct {
	name string
	do   func(w *wreck)
	lost int
}{
	{"leaks", func(w *wreck) { w.refcounts(func(n int64) uint16 { return uint16(n % 3) }, true) }, 0},
	{"refcounts too low", func(w *wreck) { w.refcounts(func(int64) uint16 { return 0 }, false) }, 0},
	{"refcounts of anything", func(w *wreck) { w.refcounts(func(int64) uint16 { return uint16(w.rnd.Uint32()) }, false) }, 0},
	{"no refcount block", func(w *wreck) { w.poke(w.reft(), 0) }, 0},
	{"refcount block unaligned", func(w *wreck) { w.change(w.reft(), 512) }, 0},
	{"refcount block far away", func(w *wreck) { w.poke(w.reft(), 1<<40) }, 0},
	{"refcount block in the L1 table", func(w *wreck) { w.poke(w.reft(), uint64(w.table())) }, 0},
	{"copied flags", func(w *wreck) {
		for c := range int64(6) {
			at, _ := w.entry(w.rnd.Int64N(40))
			w.change(at, layout.Copied)
			w.change(w.table()+c%2*8*w.one(), layout.Copied)
		}
	}, 0},
	{"L1 entry unaligned", func(w *wreck) { w.change(w.table(), 512) }, -1},
	{"L1 entry far away", func(w *wreck) { w.poke(w.table(), 1<<63|1<<40) }, -1},
	{"L1 entry with reserved bits", func(w *wreck) { w.change(w.table(), 1<<57|4) }, 0},
	{"L1 entry to the header", func(w *wreck) { w.poke(w.table(), 1<<63) }, -1},
	{"L1 entry to the L1 table", func(w *wreck) { w.poke(w.table(), 1<<63|uint64(w.table())) }, -1},
	{"L1 entry to data", func(w *wreck) { at, _ := w.entry(30); w.poke(w.table()+8*w.last(), w.at(at)) }, -1},
	{"L2 entry unaligned", func(w *wreck) { at, _ := w.entry(3); w.change(at, 512) }, 1},
	{"L2 entry far away", func(w *wreck) { at, _ := w.entry(30); w.poke(at, 1<<63|1<<40) }, 1},
	{"L2 entry with reserved bits", func(w *wreck) { at, _ := w.entry(30); w.change(at, 1<<58|2) }, 0},
	{"L2 entry to the header's neighbour", func(w *wreck) { at, _ := w.entry(30); w.poke(at, 1<<63|uint64(w.reft())) }, 1},
	{"L2 entry to the L1 table", func(w *wreck) { at, _ := w.entry(30); w.poke(at, 1<<63|uint64(w.table())) }, 1},
	{"L2 entry to its table", func(w *wreck) { at, tab := w.entry(30); w.poke(at, 1<<63|uint64(tab)) }, 1},
	{"L2 entry to a refcount block", func(w *wreck) { at, _ := w.entry(30); w.poke(at, 1<<63|w.at(w.reft())) }, 1},
	{"two L2 entries to one cluster", func(w *wreck) {
		a, _ := w.entry(30)
		b, _ := w.entry(31)
		w.poke(a, w.at(b))
	}, 1},
	{"compressed entry far away", func(w *wreck) { at, _ := w.entry(30); w.poke(at, 1<<62|1<<40) }, 1},
	{"snapshot's L1 table unaligned", func(w *wreck) { w.change(int64(w.hdr.SnapshotsOffset), 512) }, 0},
	{"snapshot's L1 table far away", func(w *wreck) { w.poke(int64(w.hdr.SnapshotsOffset), 1<<40) }, 0},
	{"snapshot's L1 entry far away", func(w *wreck) { w.poke(int64(w.snaps[0].L1TableOffset), 1<<41) }, 0},
	{"snapshot with too much beside", func(w *wreck) { w.poke(int64(w.hdr.SnapshotsOffset)+36, 1<<62) }, 0},
	{"table of snapshots unaligned", func(w *wreck) { w.change(layout.OffSnapshots+4, 8) }, 0},
	{"table of snapshots far away", func(w *wreck) { w.poke(layout.OffSnapshots+4, 1<<40) }, 0},
	{"too many snapshots", func(w *wreck) { w.change(layout.OffSnapshots, 1<<52) }, 0},
	{"marked", func(w *wreck) { w.poke(layout.OffIncompatFeatures, w.hdr.IncompatibleFeatures|3) }, 0},
	{"bitmaps of subclusters", func(w *wreck) {
		for c := int64(30); w.eb == 16 && c < 33; c++ {
			at, _ := w.entry(c)
			w.poke(at+8, w.rnd.Uint64())
		}
	}, 3},
}

// one is 0 where the disk has but one L2 table, last the index of the last one.
func (w *wreck) one() int64 { return min(1, w.last()) }

func (w *wreck) last() int64 { return int64(w.hdr.L1Size) - 1 }

// refcounts changes those of the first refcount block; those of free clusters alone, or all.
func (w *wreck) refcounts(f func(n int64) uint16, free bool) {
	b := int64(w.parts.reft[0])
	for n := range w.f.Size() / w.cs {
		if old := be.Uint16(w.f.Bytes()[b+2*n:]); !free || old == 0 {
			w.f.Poke(b+2*n, be.AppendUint16(nil, f(n)))
		}
	}
	if free {
		w.f.Poke(b+2*(w.f.Size()/w.cs-1)+2, []byte{0, 1, 0, 1})
	}
}

// wrecked makes an image, and damages it.
func wrecked(t *testing.T, o CreateOptions, do func(w *wreck), seed uint64) (f *drivertest.MemFile, disk []byte) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 7))
	f = mustCreate(t, o)
	cs := int64(*o.ClusterSize)
	disk = make([]byte, o.Size)
	s := mustOpen(t, mem{f}, config{})
	for c := range int64(40) {
		if c == 20 {
			if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
				t.Fatal(err)
			}
		}
		b := disk[c*cs : (c+1)*cs]
		fill(rnd, b)
		if err := s.WriteAt(req(), blk.Buf(b), c*cs, 0); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
	s = mustOpen(t, mem{f}, config{readOnly: true})
	do(&wreck{peek(s), cs, 1 << s.eb, rnd, f})
	return f, disk
}

// forCheck is quiet for images whose snapshots may be lost.
var forCheck = func() Options { o := quiet; o.XQblockdForCheck = ptr(true); return o }()

// TestUnknownSnapshots: an image whose table of snapshots cannot be read is opened for a check
// alone, and what its snapshots may refer to is no leak.
func TestUnknownSnapshots(t *testing.T) {
	cs := uint64(4096)
	damage := func(w *wreck) { w.poke(int64(w.hdr.SnapshotsOffset)+36, 1<<62) }
	f, _ := wrecked(t, CreateOptions{Size: 100 * cs, ClusterSize: &cs}, damage, 1)
	for _, c := range []config{{}, {readOnly: true}, {options: forCheck}} {
		c.file = mem{f}
		if _, err := openImage(req(), c); err == nil {
			t.Errorf("%+v: opened", c)
		}
	}
	was := f.Bytes()
	s := mustOpen(t, mem{f}, config{readOnly: true, options: forCheck})
	for _, m := range []mend{mendNothing, mendLeaks} {
		res, err := s.checkImage(req(), m, nil)
		if err != nil || res.Corruptions == 0 || res.LeaksFixed > 0 {
			t.Errorf("%d: %v %+v", m, err, res)
		}
	}
	if err := s.PrepareReadOnly(req(), false); err == nil {
		t.Error("it becomes writable")
	}
	if !bytes.Equal(was, f.Bytes()) {
		t.Error("the image has changed")
	}
	if _, err := s.checkImage(req(), mendAll, nil); err != nil {
		t.Error(err)
	}
	if err := s.PrepareReadOnly(req(), false); err != nil {
		t.Error(err)
	}
}

// mended repairs what is in f, and returns the disk.
func mended(f file, size uint64) ([]byte, error) {
	s, err := openImage(req(), config{file: f, readOnly: true, options: forCheck})
	if err != nil {
		return nil, err
	}
	res, err := s.checkImage(req(), mendAll, nil)
	if err != nil {
		return nil, err
	}
	if res.Corruptions+res.Leaks+res.Errors > 0 {
		return nil, fmt.Errorf("left: %+v", *res)
	}
	if peek(s).hdr.IncompatibleFeatures&(layout.IncompatDirty|layout.IncompatCorrupt) != 0 {
		return nil, fmt.Errorf("still marked")
	}
	b := make([]byte, size)
	return b, s.ReadAt(req(), blk.Buf(b), 0, 0)
}

// TestScrub damages images in every way and repairs them: nothing is wrong afterwards, for QEMU
// neither, no more is lost than was damaged, and the image works. Power fails in between: another
// repair comes to the same.
func TestScrub(t *testing.T) {
	for _, sh := range []struct {
		cs  uint64
		ext bool
		v   string
	}{{512, false, "v2"}, {4096, false, "v3"}, {16384, true, "v3"}} {
		for i, x := range wrecks {
			o := CreateOptions{Size: 100 * sh.cs, ClusterSize: &sh.cs, Extended: sh.ext, Version: sh.v}
			t.Run(fmt.Sprintf("%d %s", sh.cs, x.name), func(t *testing.T) {
				t.Parallel()
				if x.name == "marked" && sh.v == "v2" {
					t.SkipNow() // it has no marks
				}
				img, disk := wrecked(t, o, x.do, uint64(i))
				f := drivertest.CrashFileOf(img)
				var left []*drivertest.MemFile
				f.After(func(i int) { left = append(left, f.CrashLocked(uint64(i))) })
				got, err := mended(mem{f}, o.Size)
				if err != nil {
					t.Fatal(err)
				}
				if n := differ(got, disk, int(sh.cs)); n > x.lost && x.lost >= 0 {
					t.Errorf("%d clusters are lost", n)
				}
				qemuFindsNothing(t, f.Clone().Bytes())
				for i, l := range left {
					again, err := mended(mem{l}, o.Size)
					if err != nil || !bytes.Equal(again, got) {
						t.Fatalf("power failed after write %d: %v, %d clusters differ", i, err, differ(again, got, int(sh.cs)))
					}
				}
				worksOn(t, mem{f}, got)
			})
		}
	}
}

// worksOn writes to a repaired image.
func worksOn(t *testing.T, f file, disk []byte) {
	t.Helper()
	s := mustOpen(t, f, config{})
	b := disk[len(disk)/4 : len(disk)/2]
	fill(rand.New(rand.NewPCG(1, 1)), b)
	if err := s.WriteAt(req(), blk.Buf(b), int64(len(disk)/4), 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(disk))
	if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, disk) {
		t.Fatalf("after a write the disk is another: %v", err)
	}
	mustClose(t, s)
	sound(t, s, true)
}

// differ counts the clusters that differ.
func differ(a, b []byte, cs int) (n int) {
	for i := 0; i+cs <= min(len(a), len(b)); i += cs {
		if !bytes.Equal(a[i:i+cs], b[i:i+cs]) {
			n++
		}
	}
	return n
}

func qemuFindsNothing(t *testing.T, image []byte) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Log("SKIPPED: qemu-img is not installed and did not check the image")
		return
	}
	name := filepath.Join(t.TempDir(), "i")
	if err := os.WriteFile(name, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "check", name).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}
