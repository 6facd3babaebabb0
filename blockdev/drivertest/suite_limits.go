package drivertest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"qblockd/graph/blk"
)

// testBounds goes beyond the ends.
func testBounds(t *testing.T, x *rig) {
	size := x.root.Size()
	b := blk.Buf(make([]byte, 1024))
	before := x.read(t, size-512, 512)
	for _, off := range []int64{size, size - 512, -1, -1024, 1<<63 - 512, 1<<63 - 1} {
		errs := map[string]error{"read": x.root.ReadAt(x.req, b, off, 0)}
		if !x.c.ReadOnly {
			errs["write"] = x.root.WriteAt(x.req, b, off, 0)
			errs["zero"] = x.root.Zero(x.req, off, 1024, 0)
			errs["discard"] = x.root.Discard(x.req, off, 1024)
		}
		for what, err := range errs {
			if !errors.Is(err, blk.ErrOutOfRange) {
				t.Errorf("%s at %d of %d: %v", what, off, size, err)
			}
		}
	}
	if x.root.Size() != size {
		t.Errorf("the size went from %d to %d", size, x.root.Size())
	}
	x.same(t, "end", size-512, x.read(t, size-512, 512), before)
	x.must(t, "empty read", x.root.ReadAt(x.req, blk.Vec{}, size, 0))
	if !x.c.ReadOnly {
		x.must(t, "empty write", x.root.WriteAt(x.req, blk.Vec{}, 0, 0))
		x.must(t, "empty zero", x.root.Zero(x.req, 0, 0, 0))
	}
}

// testResize grows and shrinks; what is added reads as zeroes.
func testResize(t *testing.T, x *rig) {
	ctx := context.Background()
	size := x.root.Size()
	if x.c.Fixed {
		if err := x.root.Resize(ctx, size+4096, true, blk.PreallocOff); err == nil {
			t.Error("a fixed size was changed")
		}
		return
	}
	fill := bytes.Repeat([]byte{0x5A}, int(size))
	x.must(t, "write", x.root.WriteAt(x.req, blk.Buf(fill), 0, 0))
	step := func(to int64) {
		t.Helper()
		if err := x.root.Resize(ctx, to, true, blk.PreallocOff); err != nil {
			t.Fatalf("resize from %d to %d: %v", x.root.Size(), to, err)
		}
		if x.root.Size() != to {
			t.Fatalf("resize to %d made %d", to, x.root.Size())
		}
	}
	step(size + 65536)
	x.same(t, "old part", 0, x.read(t, 0, size), fill)
	if !x.c.Noise {
		x.same(t, "new part", size, x.read(t, size, 65536), make([]byte, 65536))
	}
	half := blk.AlignDown(size/2, 65536)
	step(half)
	x.same(t, "after shrinking", 0, x.read(t, 0, half), fill[:half])
	step(size)
	x.same(t, "kept part", 0, x.read(t, 0, half), fill[:half])
	if !x.c.Noise {
		x.same(t, "grown again", half, x.read(t, half, size-half), make([]byte, size-half))
	}
	if err := x.root.Resize(ctx, -1, true, blk.PreallocOff); err == nil {
		t.Error("negative size accepted")
	}
}

// testNoWait: a request that must not wait either does all of its work or none.
func testNoWait(t *testing.T, x *rig) {
	size := x.root.Size()
	want := bytes.Repeat([]byte{3}, int(size))
	x.fill(t, want, 0)
	gen := x.node.IO().WrHighestOffset()
	x.req.NoWait = true
	rng := rand.New(rand.NewPCG(3, 4))
	done, blocked := 0, 0
	count := func(what string, err error) bool {
		t.Helper()
		switch {
		case err == nil:
			done++
			return true
		case errors.Is(err, blk.ErrWouldBlock):
			blocked++
			return false
		}
		t.Fatalf("%s: %v", what, err)
		return false
	}
	for i := range 60 {
		off, n := randomRange(rng, size)
		b := bytes.Repeat([]byte{byte(i)}, int(n))
		op := i % 4
		if x.c.ReadOnly {
			op |= 2
		}
		switch op {
		case 0:
			if count("write", x.root.WriteAt(x.req, blk.Buf(b), off, 0)) {
				copy(want[off:], b)
			}
		case 1:
			if count("zero", x.root.Zero(x.req, off, n, 0)) {
				clear(want[off : off+n])
			}
		case 2:
			if count("read", x.root.ReadAt(x.req, blk.Buf(b), off, 0)) {
				x.same(t, "read", off, b, want[off:off+n])
			}
		case 3:
			count("flush", x.root.Flush(x.req))
		}
	}
	x.req.NoWait = false
	t.Logf("%d done, %d would have blocked", done, blocked)
	x.same(t, "content", 0, x.read(t, 0, size), want)
	if x.node.IO().WrHighestOffset() != gen {
		t.Errorf("farthest write %d, was %d", x.node.IO().WrHighestOffset(), gen)
	}
}

// testReadOnly: a read-only node refuses what changes it.
func testReadOnly(t *testing.T, x *rig) {
	b := blk.Buf(make([]byte, 512))
	x.must(t, "read", x.root.ReadAt(x.req, b, 0, 0))
	x.must(t, "flush", x.root.Flush(x.req))
	for what, err := range map[string]error{
		"write":   x.root.WriteAt(x.req, b, 0, 0),
		"zero":    x.root.Zero(x.req, 0, 512, 0),
		"discard": x.root.Discard(x.req, 0, 512),
		"resize":  x.root.Resize(context.Background(), 512, true, blk.PreallocOff),
	} {
		if !errors.Is(err, blk.ErrReadOnly) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// testMap: a mapping holds what a read gives.
func testMap(t *testing.T, x *rig) {
	size := blk.AlignDown(x.root.Size(), 4096)
	rng := rand.New(rand.NewPCG(5, 6))
	for at := int64(0); at < size; at += 8192 {
		b := make([]byte, min(8192, size-at))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		if at%24576 != 0 {
			x.fill(t, b, at)
		}
	}
	x.must(t, "flush", x.root.Flush(x.req))
	want := x.read(t, 0, size)
	var m blk.Mapping
	mapped := int64(0)
	for range 40 {
		off, n := randomRange(rng, size)
		x.must(t, "map", x.root.Map(x.req, off, n, &m))
		if m.N() > n {
			t.Fatalf("map of [%d, +%d) gives %d bytes", off, n, m.N())
		}
		pos := off
		for _, h := range m.Ranges {
			buf := blk.GetBuf(int(h.N), 4096) // the file may be open with O_DIRECT
			b := buf.B
			clear(b)
			if h.FD >= 0 {
				if k, err := syscall.Pread(h.FD, b, h.Off); err != nil || int64(k) < h.N {
					t.Fatalf("reading a mapping: %d of %d bytes, %v", k, h.N, err)
				}
			}
			x.same(t, "mapping", pos, b, want[pos:pos+h.N])
			blk.PutBuf(buf)
			pos += h.N
		}
		mapped += m.N()
		m.Release()
	}
	t.Logf("%d bytes mapped", mapped)
}

// testCopy: copying from a file is writing what it has.
func testCopy(t *testing.T, x *rig) {
	want := x.fresh(x.root.Size())
	copy(want, bytes.Repeat([]byte{5}, 20000)) // a part only, for formats
	x.fill(t, want[:20000], 0)
	src := NewHostFile(t, 1<<20)
	defer src.Close()
	x.must(t, "source", src.WriteAt(nil, blk.Buf(bytes.Repeat([]byte{0x77}, 64<<10)), 4096, 0))
	fd := int(src.f.Fd())
	runs := []blk.HostRange{{FD: fd, Off: 4096, N: 8192}, {FD: -1, N: 4096}, {FD: fd, Off: 20480, N: 4096}}
	err := x.root.CopyFrom(x.req, 12288, runs, 0)
	if errors.Is(err, blk.ErrNotSupported) || errors.Is(err, syscall.EXDEV) {
		t.Log("copy-range is not supported")
		return
	}
	x.must(t, "copy", err)
	copy(want[12288:], bytes.Repeat([]byte{0x77}, 16384))
	clear(want[12288+8192 : 12288+12288])
	x.same(t, "copied", 0, x.read(t, 0, x.root.Size()), want)
	if err := x.root.CopyFrom(x.req, x.root.Size(), runs, 0); !errors.Is(err, blk.ErrOutOfRange) {
		t.Errorf("copy beyond the end: %v", err)
	}
}
