package file

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

var bg = &blk.Req{Ctx: context.Background()}

// places are directories of the kinds of file systems that there are here.
func places(t *testing.T) map[string]string {
	t.Helper()
	m := map[string]string{"disk": t.TempDir()}
	if shm, err := os.MkdirTemp("/dev/shm", "qblockd-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(shm) })
		m["memory"] = shm
	}
	return m
}

// eachPlace runs f in every place, buffered and with O_DIRECT where that works, with all
// ways into the kernel. open makes a file there and opens it.
func eachPlace(t *testing.T, f func(t *testing.T, open func(name string, size int64) *disk)) {
	ways := []struct {
		name   string
		direct bool
		aio    types.BlockdevAioOptions
	}{
		{"buffered", false, "threads"},
		{"direct", true, "threads"},
		{"buffered-uring", false, "io_uring"},
		{"direct-uring", true, "io_uring"},
		{"direct-native", true, "native"},
	}
	for kind, dir := range places(t) {
		for _, w := range ways {
			t.Run(kind+"/"+w.name, func(t *testing.T) {
				f(t, func(name string, size int64) *disk {
					t.Helper()
					s := settings{name: mustFile(t, dir, name, size), driver: "file", direct: w.direct}
					d, err := openDisk(context.Background(), s)
					if err == nil {
						t.Cleanup(func() { d.Close() })
						err = d.setAio(&types.BlockdevOptionsFile{Aio: &w.aio})
					}
					if err != nil {
						t.Skipf("SKIPPED: not to be had here: %v", err)
					}
					return d
				})
			})
		}
	}
}

func mustFile(t testing.TB, dir, name string, size int64) string {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(p, size); err != nil {
		t.Fatal(err)
	}
	return p
}

func mustOpen(t testing.TB, s settings) *disk {
	t.Helper()
	if s.driver == "" {
		s.driver = "file"
	}
	d, err := openDisk(context.Background(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func buf(n int) []byte { return alignedBuf(n, directSafe) }

func pattern(n int, b byte) []byte {
	p := buf(n)
	for i := range p {
		p[i] = b
	}
	return p
}

func mustRead(t *testing.T, d *disk, off int64, n int) []byte {
	t.Helper()
	b := pattern(n, 0xee)
	if err := d.ReadAt(bg, blk.Buf(b), off, 0); err != nil {
		t.Fatalf("read at %d: %v", off, err)
	}
	return b
}

// TestModel does random operations to a file and to a byte slice and compares.
func TestModel(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		const size = 1 << 20
		d := open("model", size)
		a := int(d.limits.RequestAlign)
		model := make([]byte, 2*size)
		end := int64(size)
		rnd := rand.New(rand.NewPCG(1, 2))
		for i := range 400 {
			n := (1 + rnd.IntN(60<<10/a)) * a
			off := int64(rnd.IntN(2*size-n) / a * a)
			var err error
			switch rnd.IntN(7) {
			case 0, 1:
				b := pattern(n, byte(i))
				if rnd.IntN(2) == 0 && !d.direct && n > 10 {
					err = d.WriteAt(bg, blk.Bufs([][]byte{b[:3], nil, b[3:7], b[7:]}), off, 0)
				} else {
					err = d.WriteAt(bg, blk.Buf(b), off, blk.Flags(rnd.IntN(2))*blk.FUA)
				}
				copy(model[off:], b)
				end = max(end, off+int64(n))
			case 2, 3:
				f := blk.MayUnmap
				if rnd.IntN(2) == 0 {
					f = 0
				}
				if err = d.Zero(bg, off, int64(n), f); err == nil {
					clear(model[off : off+int64(n)])
					end = max(end, off+int64(n))
				}
			case 4:
				if off+int64(n) <= end {
					if err = d.Discard(bg, off, int64(n)); err == nil {
						clear(model[off : off+int64(n)])
					}
				}
			case 5:
				got := mustRead(t, d, off, n)
				if !bytes.Equal(got, model[off:off+int64(n)]) {
					t.Fatalf("step %d: %d bytes at %d differ", i, n, off)
				}
			case 6:
				var e blk.Extent
				if e, err = d.Status(bg, off, int64(n)); err == nil {
					if e.N < 1 || e.N > int64(n) || e.Data == e.Zero || !e.Allocated {
						t.Fatalf("step %d: extent %+v of %d", i, e, n)
					}
					if e.Zero && len(bytes.Trim(model[off:off+e.N], "\x00")) > 0 {
						t.Fatalf("step %d: [%d, +%d) is said to be zero", i, off, e.N)
					}
				}
			}
			if err != nil && !errors.Is(err, blk.ErrNotSupported) {
				t.Fatalf("step %d: %v", i, err)
			}
		}
		if want := blk.AlignUp(end, 512); d.Size() != want {
			t.Errorf("size %d, want %d", d.Size(), want)
		}
		if err := d.Flush(bg); err != nil {
			t.Error(err)
		}
		raw, err := os.ReadFile(d.name)
		if err != nil || !bytes.Equal(raw, model[:len(raw)]) || int64(len(raw)) != d.eof.Load() {
			t.Errorf("the file differs: %d bytes, eof %d, %v", len(raw), d.eof.Load(), err)
		}
	})
}

func TestSizeRoundsUp(t *testing.T) {
	p := filepath.Join(t.TempDir(), "odd")
	if err := os.WriteFile(p, bytes.Repeat([]byte{7}, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, settings{name: p})
	if d.Size() != 1024 {
		t.Fatalf("size %d", d.Size())
	}
	want := append(bytes.Repeat([]byte{7}, 488), make([]byte, 24)...)
	if got := mustRead(t, d, 512, 512); !bytes.Equal(got, want) {
		t.Error("the last sector is not padded with zeroes")
	}
	if b := pattern(512, 1); d.ReadAt(&blk.Req{NoWait: true}, blk.Buf(b), 512, 0) == nil && !bytes.Equal(b, want) {
		t.Error("the last sector read in line is not padded with zeroes")
	}
	var m blk.Mapping
	if err := d.Map(bg, 512, 512, &m); err != nil {
		t.Fatal(err)
	}
	if len(m.Ranges) != 2 || m.Ranges[0].N != 488 || m.Ranges[1] != (blk.HostRange{FD: -1, N: 24}) {
		t.Errorf("map %+v", m.Ranges)
	}
	m.Release()
	if e, err := d.Status(bg, 0, 1024); err != nil || e.N != 1000 || !e.Data || e.EOF {
		t.Errorf("status of the file %+v, %v", e, err)
	}
	if e, err := d.Status(bg, 1000, 24); err != nil || e.N != 24 || !e.Zero || !e.EOF {
		t.Errorf("status of the padding %+v, %v", e, err)
	}
}

func TestStatusWalk(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		const step = 64 << 10
		d := open("holes", 16*step)
		for i := int64(1); i < 16; i += 2 {
			if err := d.WriteAt(bg, blk.Buf(pattern(step, 1)), i*step, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Flush(bg); err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < 16*step; {
			e, err := d.Status(bg, off, 16*step-off)
			if err != nil {
				t.Fatal(err)
			}
			data := off/step%2 == 1
			if e.N != step || e.Data != data || e.Zero == data || e.MapOff != off || e.EOF != (off == 15*step) {
				t.Fatalf("at %d: %+v", off/step, e)
			}
			off += e.N
		}
		// The middle of an extent answers in line, and shorter questions get shorter answers.
		if _, err := d.Status(bg, step, step); err != nil {
			t.Fatal(err)
		}
		e, err := d.Status(&blk.Req{NoWait: true}, step+4096, 4096)
		if err != nil || e.N != 4096 || !e.Data || e.EOF {
			t.Errorf("%+v, %v", e, err)
		}
		// What was discarded is no data any more.
		if err := d.Discard(bg, step, step); err != nil {
			t.Fatal(err)
		}
		if e, err := d.Status(bg, step, step); err != nil || !e.Zero {
			t.Errorf("after discard: %+v, %v", e, err)
		}
		if s := d.DriverStats(); s.Driver != "file" {
			t.Errorf("%+v", s)
		}
	})
}

func TestZeroPastTheEnd(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		for _, f := range []blk.Flags{0, blk.MayUnmap, blk.MayUnmap | blk.NoFallback} {
			d := open("grow", 0)
			if err := d.WriteAt(bg, blk.Buf(pattern(8192, 3)), 0, 0); err != nil {
				t.Fatal(err)
			}
			if err := d.Zero(bg, 4096, 1<<20, f); err != nil {
				t.Fatal(err)
			}
			st, _ := os.Stat(d.name)
			if st.Size() != 1<<20+4096 || d.Size() != st.Size() {
				t.Errorf("flags %v: file %d, size %d", f, st.Size(), d.Size())
			}
			if got := mustRead(t, d, 4096, 8192); !bytes.Equal(got, make([]byte, 8192)) {
				t.Errorf("flags %v: not zero", f)
			}
			n, err := d.ActualSize()
			if err != nil || (f != 0) != (n < 1<<20) {
				t.Errorf("flags %v: %d bytes allocated, %v", f, n, err)
			}
		}
	})
}

func TestCannotZero(t *testing.T) {
	d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "z", 8192)})
	d.canZero.Store(false)
	d.canPunch.Store(false)
	if err := d.Zero(bg, 0, 4096, blk.MayUnmap); !errors.Is(err, blk.ErrNotSupported) {
		t.Error(err)
	}
	if err := d.Discard(bg, 0, 4096); !errors.Is(err, blk.ErrNotSupported) || d.discardErr.Load() != 1 {
		t.Error(err)
	}
	if err := d.Zero(bg, 8192, 4096, 0); err != nil || d.Size() != 12288 {
		t.Errorf("growing: %v, size %d", err, d.Size())
	}
	d.canAllocate.Store(false)
	if err := d.Zero(bg, 12288, 4096, 0); !errors.Is(err, blk.ErrNotSupported) {
		t.Error(err)
	}
}

func TestNoWait(t *testing.T) {
	nw := &blk.Req{Ctx: context.Background(), NoWait: true}
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		d := open("nw", 1<<20)
		b := pattern(4096, 9)
		if err := d.WriteAt(bg, blk.Buf(b), 0, 0); err != nil {
			t.Fatal(err)
		}
		got := buf(4096)
		err := d.ReadAt(nw, blk.Buf(got), 0, 0)
		switch {
		case d.direct:
			if err != blk.ErrWouldBlock {
				t.Errorf("O_DIRECT in line: %v", err)
			}
		case err != nil && d.nowaitRead.Load() || err == nil && !bytes.Equal(got, b):
			t.Errorf("cached read: %v", err)
		}
		err = d.WriteAt(nw, blk.Buf(b), 1<<20, 0)
		if d.memory != (err == nil) {
			t.Errorf("growing write: %v", err)
		}
		err = d.Zero(nw, 0, 4096, 0)
		if d.memory != (err == nil) {
			t.Errorf("zero: %v", err)
		}
		err = d.Flush(nw)
		if d.memory != (err == nil) {
			t.Errorf("flush: %v", err)
		}
	})
}

func TestPace(t *testing.T) {
	var p pace
	if p.begin() {
		t.Fatal("in line before anything is known")
	}
	for range shortRun {
		p.note(shortLatency)
	}
	for range inlineCalls {
		if !p.begin() {
			t.Fatal("refused after short writes")
		}
	}
	if p.begin() {
		t.Fatal("too many inside")
	}
	p.end(0)
	if !p.begin() {
		t.Fatal("refused after one left")
	}
	p.end(time.Second)
	if p.begin() {
		t.Fatal("in line after a long one")
	}
}

func TestLostWritesAreRemembered(t *testing.T) {
	d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "lost", 4096)})
	d.fdatasync = func(int) error { return unix.EIO }
	if err := d.Flush(bg); err != unix.EIO {
		t.Fatal(err)
	}
	d.fdatasync = func(int) error { return nil }
	if err := d.Flush(bg); err != unix.EIO {
		t.Errorf("forgotten: %v", err)
	}
	if err := d.WriteAt(bg, blk.Buf(pattern(512, 1)), 0, blk.FUA); err != unix.EIO {
		t.Errorf("FUA: %v", err)
	}
	if err := d.WriteAt(bg, blk.Buf(pattern(512, 1)), 0, 0); err != nil {
		t.Errorf("plain write: %v", err)
	}
}

func TestCopyFrom(t *testing.T) {
	dir := t.TempDir()
	src := mustOpen(t, settings{name: mustFile(t, dir, "src", 0)})
	dst := mustOpen(t, settings{name: mustFile(t, dir, "dst", 0)})
	want := make([]byte, 300<<10)
	for i := range want {
		want[i] = byte(i * 7 >> 3)
	}
	if err := src.WriteAt(bg, blk.Buf(want), 0, 0); err != nil {
		t.Fatal(err)
	}
	before := openFDs(t)
	var m blk.Mapping
	if err := src.Map(bg, 0, 300<<10, &m); err != nil {
		t.Fatal(err)
	}
	src.Close() // the lease keeps the file
	err := dst.CopyFrom(bg, 4096, m.Ranges, blk.FUA)
	m.Release() // closes it
	if errors.Is(err, blk.ErrNotSupported) || errors.Is(err, unix.EXDEV) {
		t.Skip("no copy_file_range here")
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, dst, 4096, len(want)); !bytes.Equal(got, want) {
		t.Error("copy differs")
	}
	waitFDs(t, before-1)
}

// Who maps a file is told whether its cache is gone round.
func TestMapDirect(t *testing.T) {
	for _, direct := range []bool{false, true} {
		d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "f", 64<<10), direct: direct})
		var m blk.Mapping
		if err := d.Map(bg, 0, 64<<10, &m); err != nil || m.N() != 64<<10 {
			t.Fatalf("%d bytes, %v", m.N(), err)
		}
		if got := m.Ranges[0].Direct; got != d.direct {
			t.Errorf("direct=%v (%v): told %v", direct, d.direct, got)
		}
		m.Release()
	}
}

func TestBusyLimit(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &blk.Req{Ctx: ctx}
	d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "busy", 4096)})
	for range maxBusy {
		if err := d.enter(r); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := d.ReadAt(r, blk.Buf(buf(512)), 0, 0); err != unix.ECANCELED {
		t.Errorf("one too many: %v", err)
	}
	for range maxBusy {
		d.leave()
	}
}

func TestNoAllocations(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		d := open("a", 1<<20)
		b, c := pattern(4096, 1), pattern(4096, 2)
		two := [][]byte{b, c}
		nw := &blk.Req{NoWait: true}
		for name, f := range map[string]func(){
			"read":         func() { _ = d.ReadAt(bg, blk.Buf(b), 0, 0) },
			"write":        func() { _ = d.WriteAt(bg, blk.Buf(b), 0, 0) },
			"FUA":          func() { _ = d.WriteAt(bg, blk.Buf(b), 0, blk.FUA) },
			"readv":        func() { _ = d.ReadAt(bg, blk.Bufs(two), 0, 0) },
			"writev":       func() { _ = d.WriteAt(bg, blk.Bufs(two), 0, 0) },
			"inline read":  func() { _ = d.ReadAt(nw, blk.Buf(b), 0, 0) },
			"inline write": func() { _ = d.WriteAt(nw, blk.Buf(b), 0, 0) },
		} {
			if n := testing.AllocsPerRun(20, f); n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
		}
	})
}
