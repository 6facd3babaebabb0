package qcow2

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// imageOf makes an image of 64 clusters of 64 KiB of which the first n have data, each its number
// plus one.
func imageOf(t *testing.T, n int64, o CreateOptions) *drivertest.MemFile {
	t.Helper()
	o.Size = 4 << 20
	f := mustCreate(t, o)
	s := mustOpen(t, mem{f}, config{})
	for c := range n {
		if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{byte(c + 1)}, 64<<10)), c<<16, 0); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
	return f
}

// l2At is where the L2 entry of guest cluster c of such an image is, and its host cluster's place.
func l2At(f *drivertest.MemFile, c int64) (at, host int64) {
	b := f.Bytes()
	at = int64(be.Uint64(b[be.Uint64(b[40:]):])&layout.OffsetMask) + 8*c
	return at, int64(be.Uint64(b[at:]) & layout.OffsetMask)
}

func wantByte(t *testing.T, s *image, c int64, v byte) {
	t.Helper()
	b := make([]byte, 64<<10)
	if err := s.ReadAt(req(), blk.Buf(b), c<<16, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{v}, 64<<10)) {
		t.Fatalf("cluster %d: %v, begins with %d, not %d", c, err, b[0], v)
	}
}

// corruptions are the reports of an image.
type corruptions struct {
	fatal []string
	other []string
}

func (c *corruptions) corrupted(msg string, _, _ int64, fatal bool) {
	if fatal {
		c.fatal = append(c.fatal, msg)
	} else {
		c.other = append(c.other, msg)
	}
}

// TestUncountedClusterIsCounted: a cluster in use whose refcount is 0 is neither given out nor
// freed a second time.
func TestUncountedClusterIsCounted(t *testing.T) {
	f := imageOf(t, 2, CreateOptions{})
	_, host := l2At(f, 1)
	f.Poke(0x20000+2*(host>>16), []byte{0, 0})
	s := mustOpen(t, mem{f}, config{unmap: true})
	if err := s.Discard(req(), 1<<16, 1<<16); err != nil {
		t.Fatal(err)
	}
	for c := int64(2); c < 10; c++ {
		if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{byte(c + 1)}, 64<<10)), c<<16, 0); err != nil {
			t.Fatal(err)
		}
		if c == 7 {
			if err := s.Flush(req()); err != nil {
				t.Fatal(err)
			}
		}
	}
	wantByte(t, s, 0, 1)
	wantByte(t, s, 1, 0)
	for c := int64(2); c < 10; c++ {
		wantByte(t, s, c, byte(c+1))
	}
	sound(t, s, true)
	mustClose(t, s)
}

// TestTwoEntriesOneCluster: where two entries take one cluster for their own, it is read, and who
// writes to it ends the use of the image.
func TestTwoEntriesOneCluster(t *testing.T) {
	f := imageOf(t, 2, CreateOptions{})
	at, _ := l2At(f, 5)
	_, host := l2At(f, 1)
	f.Poke(at, be.AppendUint64(nil, uint64(host)|layout.Copied))
	var c corruptions
	var log []string
	s := mustOpen(t, mem{f}, config{corrupted: c.corrupted, warn: func(msg string) { log = append(log, msg) }})
	wantByte(t, s, 5, 2)
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatalf("write elsewhere: %v", err)
	}
	if want := "The refcounts of 1 clusters, of which the first is at " + hex(host).String(); len(log) != 1 || !strings.HasPrefix(log[0], want) || c.other != nil {
		t.Errorf("log %q, reports %q, want %s in the log, as QEMU reports nothing", log, c.other, want)
	}
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 5<<16, 0); !errors.Is(err, syscall.EIO) {
		t.Fatalf("write: %v", err)
	}
	if len(c.fatal) != 1 || len(c.other) != 0 || f.Bytes()[79]&layout.IncompatCorrupt == 0 {
		t.Errorf("reports %q, feature bits %x", c, f.Bytes()[79])
	}
	if b := f.Bytes()[host : host+512]; b[0] != 2 {
		t.Error("the data are gone")
	}
	for what, err := range map[string]error{
		"write": s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0), "zero": s.Zero(req(), 0, 1<<16, 0), "discard": s.Discard(req(), 0, 512),
	} {
		if !errors.Is(err, blk.ErrNoMedium) {
			t.Errorf("%s afterwards: %v", what, err)
		}
	}
	s.Close()
}

// TestFlushAfterGivenUp: if what was acknowledged could not be stored any more, the flush says so.
func TestFlushAfterGivenUp(t *testing.T) {
	f := imageOf(t, 1, CreateOptions{})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 64<<10)), 9<<16, 0); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	_ = s.corrupt(req(), -1, -1, "test")
	s.mu.Unlock()
	if err := s.Flush(req()); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush with a write whose L2 entry is not there: %v", err)
	}
	s.Close()
	f = imageOf(t, 1, CreateOptions{})
	s = mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 64<<10)), 0, 0); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	_ = s.corrupt(req(), -1, -1, "test")
	s.mu.Unlock()
	if err := s.Flush(req()); err != nil {
		t.Errorf("flush of what was written in place: %v", err)
	}
	s.Close()
}

// TestCompressedEntryOverHeader: a compressed entry that points into the header is not read, and
// discarding it does not punch the header.
func TestCompressedEntryOverHeader(t *testing.T) {
	f := imageOf(t, 2, CreateOptions{})
	at, _ := l2At(f, 1)
	f.Poke(at, be.AppendUint64(nil, layout.Compressed))
	before := f.Bytes()[:4096]
	var c corruptions
	s := mustOpen(t, mem{f}, config{unmap: true, corrupted: c.corrupted})
	if err := s.ReadAt(req(), blk.Buf(make([]byte, 512)), 1<<16, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v", err)
	}
	wantByte(t, s, 0, 1)
	if err := s.Discard(req(), 1<<16, 1<<16); !errors.Is(err, syscall.EIO) || len(c.fatal) != 1 {
		t.Errorf("discard: %v, reports %q", err, c)
	}
	s.Close()
	b := f.Bytes()[:4096]
	if b[79] ^= layout.IncompatCorrupt; !bytes.Equal(b, before) {
		t.Error("the header has changed")
	}
}

// TestRefcountBlockNamedByAllEntries: a refcount table that names one block again and again says
// that 2^42 clusters are in use. Nobody counts them.
func TestRefcountBlockNamedByAllEntries(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 30, ClusterSize: ptr(uint64(2 << 20)), RefcountBits: ptr(int64(1))})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	f.Poke(2<<20, bytes.Repeat(be.AppendUint64(nil, 4<<20), 2<<20/8))
	var c corruptions
	s = mustOpen(t, mem{f}, config{corrupted: c.corrupted, allocated: func() (int64, error) { return 1 << 50, nil }})
	if _, err := s.Status(req(), 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 64<<20, 0); !errors.Is(err, syscall.EIO) || len(c.fatal) != 1 {
		t.Errorf("allocating write: %v, reports %q", err, c)
	}
	s.Close()
}

func poked(t *testing.T, f *drivertest.MemFile, pokes ...poke) *drivertest.MemFile {
	t.Helper()
	for _, p := range pokes {
		f.Poke(p.off, p.b)
	}
	return f
}

var dirtyBit = u64(layout.OffIncompatFeatures, layout.IncompatDirty)

// TestRepairWritesOverNothing: dirty images whose tables lie over something else are refused, and
// stay as they are.
func TestRepairWritesOverNothing(t *testing.T) {
	base := imageOf(t, 4, CreateOptions{LazyRefcounts: true})
	_, data := l2At(base, 2)
	l2, _ := l2At(base, 0)
	l1 := int64(be.Uint64(base.Bytes()[40:]))
	for name, p := range map[string]poke{
		"refcount table on data":   u64(48, uint64(data)),
		"refcount table on L2":     u64(48, uint64(l2)),
		"refcount table on L1":     u64(48, uint64(l1)),
		"refcount table on header": u64(48, 0),
		"L1 on refcount table":     u64(40, 0x10000),
		"refcount table far away":  u64(48, 1<<40),
	} {
		f := poked(t, base.Clone(), p, dirtyBit)
		before := f.Bytes()
		var said []string
		_, err := openImage(req(), config{file: mem{f}, warn: func(m string) { said = append(said, m) }})
		if err == nil || err.Error() != "Could not repair dirty image: Input/output error" {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(f.Bytes(), before) {
			t.Errorf("%s: the file has changed", name)
		}
		if len(said) == 0 {
			t.Errorf("%s: nothing in the log", name)
		}
	}
}

// TestRepairDropsWhatIsLost: a dirty image that has lost its tail shows zeroes there, and what is
// allocated there belongs to one cluster.
func TestRepairDropsWhatIsLost(t *testing.T) {
	f := imageOf(t, 2, CreateOptions{LazyRefcounts: true})
	at, _ := l2At(f, 1)
	poked(t, f, dirtyBit, u64(at, uint64(f.Size()-1)&^0xffff|layout.Copied), u64(at+8, 1<<50|layout.Copied))
	if err := f.Resize(context.Background(), (f.Size()-1)&^0xffff, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	var said []string
	s := mustOpen(t, mem{f}, config{warn: func(m string) { said = append(said, m) }})
	if len(said) != 1 || !strings.Contains(said[0], "has been repaired") {
		t.Errorf("in the log: %q", said)
	}
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{11}, 64<<10)), 10<<16, 0); err != nil {
		t.Fatal(err)
	}
	wantByte(t, s, 0, 1)
	wantByte(t, s, 1, 0)
	wantByte(t, s, 2, 0)
	wantByte(t, s, 10, 11)
	sound(t, s, false)
	mustClose(t, s)
}

// counting counts reads, and tells of each.
type counting struct {
	file
	reads int
	tell  func()
}

func (f *counting) ReadAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	if f.reads++; f.tell != nil {
		f.tell()
	}
	return f.file.ReadAt(r, v, off, fl)
}

// smallClusters is a dirty image with n clusters of 512 bytes and refcounts that are all gone.
func smallClusters(t *testing.T, n int64) *drivertest.MemFile {
	f := mustCreate(t, CreateOptions{Size: uint64(n * 512), ClusterSize: ptr(uint64(512)), LazyRefcounts: true})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, n*512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	poked(t, f, dirtyBit)
	for i, e := range peek(s).reft {
		if e != 0 && i > 0 {
			f.Poke(int64(peek(s).hdr.RefcountTableOffset)+int64(i)*8, make([]byte, 8))
		}
	}
	return f
}

// TestRepairIsLinear: an image twice as large takes twice as many reads.
func TestRepairIsLinear(t *testing.T) {
	var reads [2]int
	for i, n := range []int64{16 << 10, 32 << 10} {
		c := &counting{file: mem{smallClusters(t, n)}}
		s := mustOpen(t, c, config{})
		reads[i] = c.reads
		sound(t, s, false)
		mustClose(t, s)
	}
	if reads[1] > reads[0]*5/2 {
		t.Errorf("%d reads, and %d for twice the size", reads[0], reads[1])
	}
}

// TestRepairEndsWithItsClient: a repair whose client has gone ends, at the next table.
func TestRepairEndsWithItsClient(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	c := &counting{file: mem{smallClusters(t, 16<<10)}}
	c.tell = func() {
		if c.reads == 40 {
			cancel()
		}
	}
	_, err := openImage(&blk.Req{Ctx: ctx}, config{file: c})
	if !errors.Is(err, context.Canceled) || c.reads > 50 {
		t.Errorf("%v after %d reads", err, c.reads)
	}
}

// device is a file of fixed size.
type device struct{ mem }

func (d device) Resize(_ context.Context, size int64, exact bool, _ blk.Prealloc) error {
	if size > d.Size() || exact && size != d.Size() {
		return errors.New("Cannot grow device files")
	}
	return nil
}

// TestDeviceShowsNothingOld: on a device, what lies behind the end of an image that has become
// smaller is not taken for zeroes.
func TestDeviceShowsNothingOld(t *testing.T) {
	d := device{mem{drivertest.MemFileOf(bytes.Repeat([]byte{0xee}, 8<<20))}}
	if err := create(req(), d, CreateOptions{Size: 4 << 20}.schema()); err != nil {
		t.Fatal(err)
	}
	s := mustOpen(t, d, config{})
	for c := range int64(64) {
		if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{7}, 64<<10)), c<<16, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, size := range []int64{64 << 10, 4 << 20} {
		if err := s.Resize(req(), size, blk.PreallocOff); err != nil {
			t.Fatal(err)
		}
	}
	for c := int64(1); c < 60; c += 7 {
		if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), c<<16+4096, 0); err != nil {
			t.Fatal(err)
		}
		wantByte(t, s, c, 0)
	}
	mustClose(t, s)
}
