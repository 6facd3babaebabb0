package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// TestModelSubclusters is TestModel for images with extended L2 entries.
func TestModelSubclusters(t *testing.T) {
	base, _ := strconv.Atoi(os.Getenv("SEED"))
	var shapes []shape
	for i, cs := range []uint64{16 << 10, 32 << 10, 64 << 10, 512 << 10, 2 << 20} {
		comp := []string{"zlib", "zstd"}[i%2]
		shapes = append(shapes,
			shape{cs: cs, bits: 16, v: "v3", ext: true, comp: comp},
			shape{cs: cs, bits: 16, v: "v3", ext: true, back: true, comp: comp},
			shape{cs: cs, bits: 1 << i, v: "v3", ext: true, back: i%2 == 0, lazy: true},
			shape{cs: cs, bits: 64, v: "v3", ext: true, back: i%2 == 1, data: "data"})
	}
	shapes = append(shapes, shape{cs: 64 << 10, bits: 16, v: "v3", ext: true, data: "raw"})
	for i, sh := range shapes {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			t.Parallel()
			testShape(t, sh, uint64(base+i+1))
		})
	}
}

// TestCopiesSubclustersOnly: a write into a cluster of an overlay reads of the backing file what is
// around it in its subcluster, and nothing else, and the rest goes on showing the backing file.
func TestCopiesSubclustersOnly(t *testing.T) {
	back := &reads{file: mem{mustCreate(t, CreateOptions{Size: 1 << 20})}}
	f := mustCreate(t, CreateOptions{Size: 128 << 10, Extended: true})
	s := mustOpen(t, mem{f}, config{backing: func() file { return back }})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 2048+512, 0); err != nil {
		t.Fatal(err)
	}
	if back.n != 1536 {
		t.Errorf("%d bytes of the backing file were read", back.n)
	}
	for _, x := range []struct {
		off, n    int64
		allocated bool
	}{{0, 2048, false}, {2048, 2048, true}, {4096, 124 << 10, false}} {
		e, err := s.Status(req(), x.off, 128<<10-x.off)
		if err != nil || e.N != x.n || e.Allocated != x.allocated {
			t.Errorf("at %d: %+v, %v", x.off, e, err)
		}
	}
	mustClose(t, s)
}

// reads counts the bytes that are read of a file.
type reads struct {
	file
	n int64
}

func (f *reads) ReadAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	f.n += v.Len()
	return f.file.ReadAt(r, v, off, fl)
}

// TestZeroSubclusters: zeroes are made in the table for whole subclusters, and not for parts.
func TestZeroSubclusters(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 128 << 10, Extended: true})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{7}, 64<<10)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Zero(req(), 2048, 4096, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Zero(req(), 16<<10, 512, 0); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("zeroes in a subcluster with data: %v", err)
	}
	if err := s.Zero(req(), 2048, 512, 0); err != nil {
		t.Errorf("zeroes in one of zeroes: %v", err)
	}
	e, err := s.Status(req(), 2048, 64<<10)
	if err != nil || e.N != 4096 || !e.Zero {
		t.Errorf("%+v, %v", e, err)
	}
	b := make([]byte, 64<<10)
	want := bytes.Repeat([]byte{7}, len(b))
	clear(want[2048:6144])
	if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, want) {
		t.Errorf("reads something else, %v", err)
	}
	sound(t, s, false)
	mustClose(t, s)
}

// TestImpossibleSubclusters: who comes upon a bitmap that cannot be ends the use of the image; a
// check counts it.
func TestImpossibleSubclusters(t *testing.T) {
	for name, damage := range map[string]func(c cell) cell{
		"both":        func(c cell) cell { c.bits |= 1 << 32; return c },
		"no cluster":  func(c cell) cell { return cell{0, 1} },
		"unaligned":   func(c cell) cell { c.word += 512; return c },
		"not written": func(c cell) cell { return cell{c.word &^ layout.Copied, 1 | 1<<32} },
	} {
		for op, do := range map[string]func(s *image) error{
			"read":  func(s *image) error { return s.ReadAt(req(), blk.Buf(make([]byte, 512)), 0, 0) },
			"write": func(s *image) error { return s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0) },
			"status": func(s *image) error {
				_, err := s.Status(req(), 0, 4096)
				return err
			},
		} {
			f := mustCreate(t, CreateOptions{Size: 128 << 10, Extended: true})
			s := mustOpen(t, mem{f}, config{})
			if err := s.WriteAt(req(), blk.Buf(make([]byte, 2048)), 0, 0); err != nil {
				t.Fatal(err)
			}
			s.mu.Lock()
			x, err := s.sliceForWrite(req(), 0)
			if err != nil {
				t.Fatal(err)
			}
			s.setCell(x, 0, damage(s.cell(x, 0)))
			res, err := s.check(req(), false)
			s.mu.Unlock()
			if err != nil || res.Corruptions == 0 {
				t.Errorf("%s: %v %+v", name, err, res)
			}
			if err := do(s); !errors.Is(err, errIO) || !s.dead.Load() {
				t.Errorf("%s, %s: %v", name, op, err)
			}
		}
	}
}
