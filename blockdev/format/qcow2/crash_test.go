package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// ledger knows for each sector which contents a crash may leave: what was flushed and all
// that was written since.
type ledger struct {
	cur  []uint64
	may  [][]uint64
	next uint64
}

func newLedger(sectors int) *ledger {
	l := &ledger{cur: make([]uint64, sectors), may: make([][]uint64, sectors), next: 1}
	for i := range l.may {
		l.may[i] = []uint64{0}
	}
	return l
}

// mark fills sectors with a new value and returns the bytes.
func (l *ledger) mark(first, n int) []byte {
	b := make([]byte, n*512)
	for i := range n {
		v := l.next
		l.next++
		for k := 0; k < 512; k += 8 {
			binary.LittleEndian.PutUint64(b[i*512+k:], v)
		}
		l.cur[first+i] = v
		l.may[first+i] = append(l.may[first+i], v)
	}
	return b
}

func (l *ledger) zero(first, n int) {
	for i := first; i < first+n; i++ {
		l.cur[i] = 0
		l.may[i] = append(l.may[i], 0)
	}
}

func (l *ledger) flushed() {
	for i := range l.may {
		l.may[i] = append(l.may[i][:0], l.cur[i])
	}
}

// verify checks that the image shows only what it may.
func (l *ledger) verify(s *image) error {
	b := make([]byte, len(l.cur)*512)
	if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil {
		return err
	}
	for i := range l.cur {
		v := binary.LittleEndian.Uint64(b[i*512:])
		ok := false
		for _, m := range l.may[i] {
			ok = ok || m == v
		}
		for k := 0; k < 512; k += 8 {
			ok = ok && binary.LittleEndian.Uint64(b[i*512+k:]) == v
		}
		if !ok {
			return fmt.Errorf("sector %d is %d, may be %v", i, v, l.may[i])
		}
	}
	return nil
}

// afterCrash opens what a crash left and tells what is wrong with it.
func afterCrash(f, data *drivertest.MemFile, l *ledger, lazy bool) error {
	c := config{file: mem{f}, options: quiet}
	if data != nil {
		c.external = mem{data}
	}
	c = keyed(c)
	if !lazy {
		c.readOnly = true
		s, err := openImage(req(), c)
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		s.mu.Lock()
		res, err := s.check(req(), false)
		s.mu.Unlock()
		if err != nil || res.Corruptions > 0 {
			return fmt.Errorf("check: %v %+v", err, *res)
		}
		if err := l.verify(s); err != nil {
			return err
		}
	}
	c.readOnly = false
	s, err := openImage(req(), c)
	if err != nil {
		return fmt.Errorf("open for writing: %w", err)
	}
	if err := l.verify(s); err != nil {
		return err
	}
	// It works on.
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 1024)), s.size.Load()/2&^511, 0); err != nil {
		return err
	}
	if err := s.Inactivate(req()); err != nil {
		return err
	}
	s.mu.Lock()
	res, err := s.check(req(), false)
	s.mu.Unlock()
	if err != nil || res.Corruptions > 0 {
		return fmt.Errorf("check after going on: %v %+v", err, *res)
	}
	return nil
}

// TestCrash lets power fail after writes of a random history: the image opens, has no
// corruption, and shows what was flushed.
func TestCrash(t *testing.T) {
	base, _ := strconv.Atoi(os.Getenv("SEED"))
	for i, sh := range []shape{
		{cs: 512, bits: 16, v: "v3"}, {cs: 512, bits: 64, v: "v3"}, {cs: 512, bits: 1, v: "v3"}, {cs: 1024, bits: 16, v: "v2"},
		{cs: 4096, bits: 16, v: "v3"}, {cs: 512, bits: 16, v: "v3", lazy: true}, {cs: 65536, bits: 16, v: "v3"},
		{cs: 512, bits: 64, v: "v3", comp: "grow"},
		{cs: 512, bits: 16, v: "v3", data: "data"}, {cs: 4096, bits: 16, v: "v3", data: "raw"}, {cs: 65536, bits: 16, v: "v3", data: "data", lazy: true},
		{cs: 16384, bits: 16, v: "v3", ext: true}, {cs: 65536, bits: 64, v: "v3", ext: true, lazy: true},
		{cs: 16384, bits: 16, v: "v3", ext: true, data: "data"},
		{cs: 4096, bits: 16, v: "v3", crypt: "luks"}, {cs: 4096, bits: 16, v: "v2", crypt: "aes"},
		{cs: 16384, bits: 16, v: "v3", ext: true, data: "raw", crypt: "luks"},
	} {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			t.Parallel()
			crashShape(t, sh, uint64(base+i))
		})
	}
}

func crashShape(t *testing.T, sh shape, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 99))
	sectors, every := 600, 6
	if sh.cs > 4096 {
		sectors, every = 1500, 20
	}
	span := int(sh.cs/512)*3 + 2
	if sh.comp == "grow" { // more refcount blocks than fit into the table
		sectors, span, every = 5000, 200, 100
	}
	o := sh.options(uint64(sectors) * 512)
	img := mustCreate(t, o)
	f := drivertest.CrashFileOf(img)
	l := newLedger(sectors)
	c := config{unmap: true, options: smallCaches}
	var data *drivertest.CrashFile
	if o.Data != nil {
		data = drivertest.CrashFileOf(o.Data)
		c.external = mem{data}
	}
	s := mustOpen(t, mem{f}, c)
	setCaches(s, 4, 4) // evictions
	crashes := 0
	crash := func(i int, image, data func(seed uint64) *drivertest.MemFile) {
		if rnd.IntN(every) != 0 || t.Failed() {
			return
		}
		for range 3 {
			crashes++
			cs := rnd.Uint64()
			if err := afterCrash(image(cs), data(cs+1), l, sh.lazy); err != nil {
				t.Errorf("after operation %d, crash %d: %v", i, cs, err)
			}
		}
	}
	if data == nil {
		f.After(func(i int) { crash(i, f.CrashLocked, func(uint64) *drivertest.MemFile { return nil }) })
	} else {
		f.After(func(i int) { crash(i, f.CrashLocked, data.Crash) })
		data.After(func(i int) { crash(i, f.Crash, data.CrashLocked) })
	}
	work(t, s, l, rnd, span)
	if crashes < 12 {
		t.Fatalf("only %d crashes", crashes)
	}
	mustClose(t, s)
	f.After(nil)
	if data != nil {
		data.After(nil)
	}
}

// work does random operations on s, of up to span sectors, and keeps l up to date.
func work(t *testing.T, s *image, l *ledger, rnd *rand.Rand, span int) {
	sectors, per := len(l.cur), int(s.cs/512)
	steps := 250
	if testing.Short() {
		steps = 120
	}
	for i := 0; i < steps && !t.Failed(); i++ {
		first := rnd.IntN(sectors)
		n := min(1+rnd.IntN(span), sectors-first)
		off, size := int64(first)*512, int64(n)*512
		var err error
		switch k := rnd.IntN(12); {
		case k < 7:
			err = s.WriteAt(req(), blk.Buf(l.mark(first, n)), off, 0)
		case k < 8:
			l.zero(first, n)
			if err = s.Zero(req(), off, size, blk.MayUnmap); errors.Is(err, blk.ErrNotSupported) {
				err = s.WriteAt(req(), blk.Buf(make([]byte, size)), off, 0)
			}
		case k < 10:
			from, to := (first+per-1)/per*per, (first+n)/per*per
			if first+n == sectors {
				to = sectors
			}
			if from < to {
				l.zero(from, to-from)
			}
			err = s.Discard(req(), off, size)
		default:
			if err = s.Flush(req()); err == nil {
				l.flushed()
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
