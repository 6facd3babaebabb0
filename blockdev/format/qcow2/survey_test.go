package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// geometries are the kinds of images that damage is done to.
var geometries = []CreateOptions{
	{ClusterSize: ptr(uint64(512))},
	{ClusterSize: ptr(uint64(512)), RefcountBits: ptr(int64(1))},
	{ClusterSize: ptr(uint64(1024)), RefcountBits: ptr(int64(64)), LazyRefcounts: true},
	{ClusterSize: ptr(uint64(1024)), Version: "v2"},
	{ClusterSize: ptr(uint64(4096)), RefcountBits: ptr(int64(8))},
}

const clusters = 160 // of the disk of a sample

// sample makes an image with data, zero and compressed clusters and, unless refcounts are of one
// bit, a snapshot that shares some.
func sample(t testing.TB, o CreateOptions) *drivertest.MemFile {
	cs := int64(*o.ClusterSize)
	o.Size = uint64(clusters * cs)
	f := mustCreate(t, o)
	s := mustOpen(t, mem{f}, config{})
	rnd := rand.New(rand.NewPCG(1, 1))
	put := func(c int64, fl blk.Flags) {
		b := make([]byte, cs)
		if fl&blk.Compressed == 0 {
			fill(rnd, b)
		} else {
			copy(b, fmt.Sprint("compressed ", c))
		}
		if err := s.WriteAt(req(), blk.Buf(b), c*cs, fl); err != nil {
			t.Fatal(err)
		}
	}
	for c := int64(0); c < 40; c += 2 {
		put(c, 0)
	}
	for c := int64(50); c < 56; c++ {
		if o.RefcountBits == nil || *o.RefcountBits > 1 {
			put(c, blk.Compressed)
		}
	}
	put(130, 0)
	_ = s.Zero(req(), 4*cs, 2*cs, 0)
	_ = s.Zero(req(), 60*cs, 2*cs, blk.MayUnmap)
	if o.RefcountBits == nil || *o.RefcountBits > 1 {
		if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
			t.Fatal(err)
		}
		put(0, 0)
		put(8, 0)
		put(100, 0)
		if err := s.Discard(req(), 12*cs, 2*cs); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
	return f
}

// shown is what an image shows, cluster by cluster; nil where it cannot be read. With snapshot it
// is what its first snapshot shows.
func shown(img []byte, snapshot bool) [][]byte {
	img = bytes.Clone(img)
	if snapshot {
		s, err := openImage(req(), config{file: mem{drivertest.MemFileOf(img)}, readOnly: true, options: quiet})
		if err != nil || len(peek(s).snaps) == 0 {
			return nil
		}
		be.PutUint32(img[layout.OffL1Size:], peek(s).snaps[0].L1Size)
		be.PutUint64(img[layout.OffL1Size+4:], peek(s).snaps[0].L1TableOffset)
		s.Close()
	}
	s, err := openImage(req(), config{file: mem{drivertest.MemFileOf(img)}, readOnly: true, options: quiet})
	if err != nil {
		return nil
	}
	defer s.Close()
	out := make([][]byte, clusters)
	for c := range out {
		b := make([]byte, s.cs)
		if s.ReadAt(req(), blk.Buf(b), int64(c)*s.cs, 0) == nil {
			out[c] = b
		}
	}
	return out
}

// harm does some damage to an image; counts: only to refcounts.
func harm(rnd *rand.Rand, img []byte, counts bool) ([]byte, string) {
	s, err := openImage(req(), config{file: mem{drivertest.MemFileOf(img)}, readOnly: true, options: quiet})
	if err != nil {
		return img, ""
	}
	defer s.Close()
	p, n, end := peek(s), int64(len(img))/s.cs, int64(len(img))&^(s.cs-1)
	reft := int64(p.hdr.RefcountTableOffset)
	places := []int64{0, reft, int64(p.hdr.L1TableOffset), int64(p.hdr.SnapshotsOffset),
		end, end + 64*s.cs, 1 << 55, 8, rnd.Int64N(n) << s.cb}
	for _, e := range p.reft {
		places = append(places, int64(e))
	}
	var entries []int64 // where L2 entries are
	for i, e := p.l1.next(0); e != 0; i, e = p.l1.next(i + 1) {
		if tab := int64(e & layout.OffsetMask); tab > 0 && tab+s.cs <= int64(len(img)) {
			places = append(places, tab)
			for i := int64(0); i < s.cs; i += 8 {
				entries = append(entries, tab+i)
				if x := int64(be.Uint64(img[tab+i:]) & layout.OffsetMask); x != 0 {
					places = append(places, x)
				}
			}
		}
	}
	place := uint64(places[rnd.IntN(len(places))])
	flags := []uint64{0, layout.Copied, layout.Copied | layout.ZeroFlag, layout.Compressed,
		layout.Copied | layout.Compressed, layout.ZeroFlag, 0x1fe, 1 << 61}[rnd.IntN(8)]
	at, v, what, kind := int64(0), place, "", rnd.IntN(9)
	if counts {
		kind = 0
	}
	switch kind {
	case 0, 1: // a refcount
		b := rnd.Int64N(max(int64(len(p.reft)), 1))
		if off := int64(append(p.reft, 0)[b] & layout.ReftMask); off > 0 && off+s.cs <= int64(len(img)) {
			i := rnd.Int64N(min(n, 1<<s.geo.RefblockBits()))
			c := []uint64{0, 0, 1, 2, s.geo.RefcountMax()}[rnd.IntN(5)]
			s.geo.SetRefcount(img[off:off+s.cs], i, min(c, s.geo.RefcountMax()))
			return img, fmt.Sprintf("refcount of cluster %d is %d", i, c)
		}
		return img, ""
	case 2:
		at, what = reft+8*rnd.Int64N(3), "refcount table"
	case 3:
		at, what = int64(p.hdr.L1TableOffset)+8*rnd.Int64N(max(int64(p.hdr.L1Size), 1)), "L1"
		v |= flags & (1<<63 | 1<<61 | 0x1fe)
	case 4, 5:
		if len(entries) == 0 {
			return img, ""
		}
		at, what = entries[rnd.IntN(len(entries))], "L2"
		v |= flags
	case 6:
		at, what = []int64{40, 48, 64}[rnd.IntN(3)], "header"
	case 7:
		if len(p.snaps) == 0 {
			return img, ""
		}
		at, what = int64(p.hdr.SnapshotsOffset), "snapshot"
	case 8:
		k := rnd.Int64N(max(n-3, 1)) + min(n, 3)
		return img[:k<<s.cb], fmt.Sprintf("cut to %d clusters", k)
	}
	if at < 0 || at+8 > int64(len(img)) {
		return img, ""
	}
	be.PutUint64(img[at:], v)
	return img, fmt.Sprintf("%s at %#x is %#x", what, at, v)
}

// trial works on a damaged image and fails if what it showed, or has acknowledged since, is no
// longer what it shows, be it alive, closed or given up.
type trial struct {
	s    *image
	rnd  *rand.Rand
	may  [][][]byte // what the clusters may show after a crash
	last [][]byte   // what they show; nil: not known
	log  []string
}

func (m *trial) did(what string, c, n int64, v func(i int64) []byte, err error) {
	m.log = append(m.log, fmt.Sprintf("%s %d+%d: %v", what, c, n, err))
	for i := c; i < c+n; i++ {
		b := v(i - c)
		m.may[i] = append(m.may[i], b)
		if m.last[i] = b; err != nil {
			m.last[i] = nil
		}
	}
}

func (m *trial) op() {
	s, rnd := m.s, m.rnd
	c, n := rnd.Int64N(clusters-4), rnd.Int64N(3)+1
	zero := make([]byte, s.cs)
	zeroes := func(int64) []byte { return zero }
	switch rnd.IntN(12) {
	case 0, 1, 2, 3:
		b := make([]byte, n*s.cs)
		fill(rnd, b)
		m.did("write", c, n, func(i int64) []byte { return b[i*s.cs : (i+1)*s.cs] }, s.WriteAt(req(), blk.Buf(b), c*s.cs, 0))
	case 4, 5:
		m.did("discard", c, n, zeroes, s.Discard(req(), c*s.cs, n*s.cs))
	case 6:
		flags := []blk.Flags{0, blk.MayUnmap}[rnd.IntN(2)]
		if err := s.Zero(req(), c*s.cs, n*s.cs, flags); !errors.Is(err, blk.ErrNotSupported) {
			m.did("zero", c, n, zeroes, err)
		}
	case 7:
		b := make([]byte, s.cs)
		copy(b, strconv.Itoa(rnd.Int()))
		m.did("compressed write", c, 1, func(int64) []byte { return b }, s.WriteAt(req(), blk.Buf(b), c*s.cs, blk.Compressed))
	case 8, 9:
		if err := s.Flush(req()); err == nil {
			for i, b := range m.last {
				if b != nil {
					m.may[i] = [][]byte{b}
				}
			}
			m.log = append(m.log, "flush")
		}
	case 10:
		id, err := s.CreateSnapshot(req(), "n", time.Unix(2, 0), 0)
		m.log = append(m.log, fmt.Sprintf("snapshot: %v", err))
		if err == nil && rnd.IntN(2) == 0 {
			m.log = append(m.log, fmt.Sprintf("delete: %v", s.DeleteSnapshot(req(), id, "n")))
		}
	case 11:
		_, _ = s.Status(req(), c*s.cs, n*s.cs)
	}
}

// verify compares what is shown with what may be.
func (m *trial) verify(got [][]byte, live bool) error {
	for c := range m.may {
		ok := m.last[c] != nil && bytes.Equal(got[c], m.last[c])
		if !live || m.last[c] == nil {
			for _, b := range m.may[c] {
				ok = ok || b == nil || bytes.Equal(got[c], b)
			}
		}
		if !ok {
			return fmt.Errorf("cluster %d shows %.8x, not %.8x", c, got[c], m.last[c])
		}
	}
	return nil
}

// tryDamage is one trial; done tells what was done.
func tryDamage(t testing.TB, seed uint64) (done []string, err error) {
	rnd := rand.New(rand.NewPCG(seed, 7))
	img := sample(t, geometries[seed%uint64(len(geometries))]).Bytes()
	// While a survey is under way what others refer to may be overwritten in place, but nothing is
	// given away that is in use.
	var steps [2]int64
	stepwise := rnd.IntN(4) == 0
	if stepwise {
		steps = [2]int64{1, 1}
		done = append(done, "step by step")
	}
	for range rnd.IntN(2) + 1 {
		var what string
		img, what = harm(rnd, img, stepwise)
		done = append(done, what)
	}
	if rnd.IntN(4) == 0 && img[7] == 3 {
		img[layout.OffIncompatFeatures+7] |= layout.IncompatDirty
		done = append(done, "dirty")
	}
	before, snap := shown(img, false), shown(img, true)
	f := drivertest.MemFileOf(bytes.Clone(img))
	options := quiet
	options.PassDiscardOther = ptr(true)
	s, e := openImage(req(), config{file: mem{f}, unmap: true, vetSteps: steps, options: options})
	if e != nil || before == nil {
		if before != nil {
			m := &trial{last: before, may: anything()}
			err = m.verify(pad(shown(f.Bytes(), false)), true)
		}
		return append(done, fmt.Sprint("open: ", e)), err
	}
	m := &trial{s: s, rnd: rnd, last: before, may: make([][][]byte, clusters), log: done}
	for c, b := range before {
		m.may[c] = [][]byte{b}
	}
	for range 60 {
		m.op()
	}
	if !s.dead.Load() {
		got := make([][]byte, clusters)
		for c := range got {
			b := make([]byte, s.cs)
			if s.ReadAt(req(), blk.Buf(b), int64(c)*s.cs, 0) == nil {
				got[c] = b
			}
		}
		// Reading an impossible entry gives it up.
		if err := m.verify(got, true); err != nil && !s.dead.Load() {
			return m.log, fmt.Errorf("open: %w", err)
		}
	}
	e = s.Inactivate(req())
	clean := e == nil && !s.dead.Load()
	s.Close()
	if f.Size() > 64<<20 {
		return m.log, fmt.Errorf("the file is %d bytes long", f.Size())
	}
	if err := m.verify(pad(shown(f.Bytes(), false)), clean); err != nil {
		return m.log, fmt.Errorf("afterwards (%v, given up: %v): %w", e, s.dead.Load(), err)
	}
	m = &trial{last: snap, may: anything(), log: m.log}
	if snap == nil {
		return m.log, nil
	}
	if err := m.verify(pad(shown(f.Bytes(), true)), true); err != nil {
		return m.log, fmt.Errorf("the snapshot: %w", err)
	}
	return m.log, nil
}

// anything is what clusters may show of which nothing is known.
func anything() [][][]byte {
	m := make([][][]byte, clusters)
	for c := range m {
		m[c] = [][]byte{nil}
	}
	return m
}

func pad(b [][]byte) [][]byte {
	if b == nil {
		b = make([][]byte, clusters)
	}
	return b
}

// TestDamagedImagesKeepWhatTheyShow damages tables and refcounts of images at random, and works on
// them. What an image showed when it was opened, and what it has acknowledged since, stays; also
// what its snapshot shows. Requests may fail, and the image may be given up. QBLOCKD_TRIALS sets
// their number.
func TestDamagedImagesKeepWhatTheyShow(t *testing.T) {
	n := uint64(600)
	if v, err := strconv.ParseUint(os.Getenv("QBLOCKD_TRIALS"), 10, 64); err == nil {
		n = v
	}
	for seed := range n {
		done, err := tryDamage(t, seed)
		if err != nil {
			for _, d := range done {
				t.Log(d)
			}
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// TestSurveyOnDevice: as long as the references of an image have not all been counted, clusters are
// taken behind the end of its file. A file that cannot grow, as a device cannot, has none there; so
// those that are free in it have to be found: for data, snapshots and bitmaps, old and new ones.
func TestSurveyOnDevice(t *testing.T) {
	for name, slack := range map[string]int64{"full": 0, "with a free end": 1 << 20} {
		for _, what := range []string{"data", "snapshot", "bitmap", "bitmap later"} {
			t.Run(name+", "+what, func(t *testing.T) {
				cs := int64(512)
				img := sample(t, CreateOptions{ClusterSize: ptr(uint64(cs))})
				k := &memKeeper{}
				s := mustOpen(t, mem{img}, config{keeper: k})
				k.list = []persisted{{name: "old", bits: bitmap.New(s.size.Load(), 512), enabled: true}}
				if err := s.WriteAt(req(), blk.Buf(make([]byte, 60*cs)), 100*cs, 0); err != nil {
					t.Fatal(err)
				}
				mustClose(t, s)
				s = mustOpen(t, mem{img}, config{keeper: &memKeeper{}})
				if err := s.Discard(req(), 100*cs, 60*cs); err != nil {
					t.Fatal(err)
				}
				mustClose(t, s)
				if err := img.Resize(context.Background(), (img.Size()+slack)&^511, ""); err != nil {
					t.Fatal(err)
				}
				k = &memKeeper{}
				s = mustOpen(t, limited{mem{img}, img.Size()}, config{keeper: k, vetSteps: [2]int64{1, 1}})
				hold := func() {
					t.Helper()
					k.list = append(k.list, persisted{name: "new", bits: bitmap.New(s.size.Load(), 512), enabled: true})
					if err := s.HoldBitmap(req(), "new"); err != nil {
						t.Errorf("new bitmap: %v", err)
					}
				}
				switch what {
				case "snapshot":
					if _, err := s.CreateSnapshot(req(), "n", time.Unix(2, 0), 0); err != nil {
						t.Errorf("snapshot: %v", err)
					}
				case "bitmap":
					hold()
				}
				for c := range int64(8) {
					if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{7}, int(cs))), (110+c)*cs, 0); err != nil {
						t.Errorf("write: %v", err)
					}
				}
				if what == "bitmap later" {
					hold()
				}
				if err := s.Flush(req()); err != nil {
					t.Errorf("flush: %v", err)
				}
				for _, b := range peek(s).stored {
					if !b.live {
						t.Errorf("bitmap %s would not outlive a kill", b.Name)
					}
				}
				b := make([]byte, 8*cs)
				if err := s.ReadAt(req(), blk.Buf(b), 110*cs, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{7}, len(b))) {
					t.Errorf("read: %v, begins with %d", err, b[0])
				}
				sound(t, s, true)
				mustClose(t, s)
			})
		}
	}
}
