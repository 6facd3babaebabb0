package qcow2

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"qblockd/graph/blk"
)

// nullFile answers without copying anything: what remains is the cost of the driver.
type nullFile struct{ file }

func (nullFile) ReadAt(*blk.Req, blk.Vec, int64, blk.Flags) error  { return nil }
func (nullFile) Size() int64                                       { return 1 << 50 }
func (nullFile) WriteAt(*blk.Req, blk.Vec, int64, blk.Flags) error { return nil }

func benchImage(b *testing.B) *image {
	name := filepath.Join(b.TempDir(), "a.qcow2")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	f := openOS(b, name)
	if err := create(req(), f, CreateOptions{Size: 64 << 20}.schema()); err != nil {
		b.Fatal(err)
	}
	s := mustOpen(b, f, config{})
	buf := make([]byte, 1<<20)
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		if err := s.WriteAt(req(), blk.Buf(buf), off, 0); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Flush(req()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { mustClose(b, s) })
	return s
}

func benchIO(b *testing.B, size int, null bool, do func(s *image, r *blk.Req, v blk.Vec, off int64) error) {
	s := benchImage(b)
	if null {
		f := s.file
		s.file = nullFile{f}
		b.Cleanup(func() { s.file = f })
	}
	buf := make([]byte, size)
	r := req()
	rnd := rand.New(rand.NewPCG(1, 1))
	b.ReportAllocs()
	b.SetBytes(int64(size))
	b.ResetTimer()
	for b.Loop() {
		off := int64(rnd.IntN(64<<20/size)) * int64(size)
		if err := do(s, r, blk.Buf(buf), off); err != nil {
			b.Fatal(err)
		}
	}
}

func read(s *image, r *blk.Req, v blk.Vec, off int64) error  { return s.ReadAt(r, v, off, 0) }
func write(s *image, r *blk.Req, v blk.Vec, off int64) error { return s.WriteAt(r, v, off, 0) }

func BenchmarkRead4k(b *testing.B)        { benchIO(b, 4096, false, read) }
func BenchmarkRead4kDriver(b *testing.B)  { benchIO(b, 4096, true, read) }
func BenchmarkWrite4k(b *testing.B)       { benchIO(b, 4096, false, write) }
func BenchmarkWrite4kDriver(b *testing.B) { benchIO(b, 4096, true, write) }
func BenchmarkRead1M(b *testing.B)        { benchIO(b, 1<<20, false, read) }
func BenchmarkRead1MDriver(b *testing.B)  { benchIO(b, 1<<20, true, read) }

// BenchmarkAllocate4k writes 4 KiB into each of many unallocated clusters.
func BenchmarkAllocate4k(b *testing.B) {
	name := filepath.Join(b.TempDir(), "a.qcow2")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	f := openOS(b, name)
	if err := create(req(), f, CreateOptions{Size: 64 << 30}.schema()); err != nil {
		b.Fatal(err)
	}
	s := mustOpen(b, f, config{})
	buf := make([]byte, 4096)
	off := int64(0)
	b.ReportAllocs()
	for b.Loop() {
		if err := s.WriteAt(req(), blk.Buf(buf), off%(64<<30), 0); err != nil {
			b.Fatal(err)
		}
		off += 65536
	}
	mustClose(b, s)
}

// TestNoAllocations: cached reads and overwrites allocate nothing.
func TestNoAllocations(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 65536)), 0, 0); err != nil {
		t.Fatal(err)
	}
	s.file = nullFile{s.file}
	r, buf := req(), make([]byte, 4096)
	n := testing.AllocsPerRun(100, func() {
		if err := s.ReadAt(r, blk.Buf(buf), 8192, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.WriteAt(r, blk.Buf(buf), 8192, 0); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

// flushes counts the flushes of the file.
type flushes struct {
	file
	n int
}

func (f *flushes) Flush(r *blk.Req) error {
	f.n++
	return f.file.Flush(r)
}

// TestNoNeedlessFlush: with a cache for the slices of the whole disk nothing has to go, so
// allocating all over it flushes nothing, though every slice is changed. (It once did after every
// few writes.)
func TestNoNeedlessFlush(t *testing.T) {
	const size = 2 << 30 // four slices
	s := mustOpen(t, mem{mustCreate(t, CreateOptions{Size: size})}, config{})
	f := &flushes{file: s.file}
	s.file = f
	buf := make([]byte, 4096)
	for i := range int64(400) {
		if err := s.WriteAt(req(), blk.Buf(buf), i*7919*65536%size, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.ReadAt(req(), blk.Buf(buf), i*104729*65536%size, 0); err != nil {
			t.Fatal(err)
		}
	}
	if f.n != 0 {
		t.Errorf("%d flushes", f.n)
	}
	mustClose(t, s)
}

// BenchmarkCheck looks over an image of a million clusters.
func BenchmarkCheck(b *testing.B) {
	f := mustCreate(b, CreateOptions{Size: 64 << 30, Preallocation: blk.PreallocMetadata})
	s := mustOpen(b, mem{f}, config{})
	defer mustClose(b, s)
	for b.Loop() {
		if res, err := s.checkImage(req(), mendNothing, nil); err != nil || res.Corruptions+res.Leaks > 0 {
			b.Fatal(res, err)
		}
	}
}
