package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/bits"
	"runtime"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// seedImages are small images with everything in them: data, zero and compressed clusters.
func seedImages(t testing.TB) [][]byte {
	var out [][]byte
	for _, o := range []CreateOptions{
		{ClusterSize: ptr(uint64(512))},
		{ClusterSize: ptr(uint64(512)), RefcountBits: ptr(int64(1))},
		{ClusterSize: ptr(uint64(1024)), RefcountBits: ptr(int64(64)), LazyRefcounts: true, CompressionType: "zstd"},
		{ClusterSize: ptr(uint64(1024)), Version: "v2"},
		{ClusterSize: ptr(uint64(16384)), Extended: true},
		{ClusterSize: ptr(uint64(512)), Data: drivertest.NewMemFile(0)},
		{ClusterSize: ptr(uint64(16384)), Extended: true, Data: drivertest.NewMemFile(0), Raw: true},
	} {
		o.Size = 64 << 10
		f := mustCreate(t, o)
		c := config{}
		if o.Data != nil {
			c.external = mem{o.Data}
		}
		s := mustOpen(t, mem{f}, c)
		b := make([]byte, 2048)
		for i := range b {
			b[i] = byte(i / 64)
		}
		for _, off := range []int64{0, 8192, 33 << 10} {
			if err := s.WriteAt(req(), blk.Buf(b), off, 0); err != nil {
				t.Fatal(err)
			}
		}
		zipped := bytes.Repeat(b, int(max(s.cs/2048, 1)))
		if err := s.WriteAt(req(), blk.Buf(zipped), 16384, blk.Compressed); err != nil && o.Data == nil {
			t.Fatal(err)
		}
		_ = s.Zero(req(), 20<<10, 2048, blk.MayUnmap)
		_ = s.Zero(req(), 8192, 1024, 0)
		mustClose(t, s)
		out = append(out, f.Bytes())
	}
	return out
}

// FuzzOps opens damaged images and works on them. Errors are fine; crashes, hangs and memory
// out of proportion to the file are not. Input: which seed, then changes of 4 bytes (place,
// place, value, mode) up to a 0xff, then operations.
func FuzzOps(f *testing.F) {
	seeds := seedImages(f)
	f.Add([]byte{0, 0xff, 1, 2, 3, 4, 5, 6})
	f.Add([]byte{1, 0, 79, 1, 0, 0xff, 0, 1, 2, 3, 4, 5, 6, 7, 8})               // dirty
	f.Add([]byte{2, 0, 24, 0x7f, 0, 0, 36, 0xff, 0, 0xff, 0, 9, 18})             // huge
	f.Add([]byte{0, 0, 40, 0, 1, 0, 48, 0, 1, 0xff, 0, 5, 10, 15, 20})           // tables in each other
	f.Add([]byte{4, 0x40, 2, 0xff, 0, 0x40, 3, 1, 0, 0xff, 0, 1, 2, 3, 4, 5, 6}) // bitmaps of subclusters
	f.Add([]byte{3, 2, 0, 0x80, 2, 4, 0, 0xff, 3, 0xff, 9, 8, 7, 6, 5})          // refcounts
	f.Add([]byte{5, 8, 3, 9, 1, 0xff, 0, 1, 2, 3, 4, 5, 6, 7, 8, 71, 135})       // data in another file
	f.Add([]byte{6, 0x40, 2, 0xff, 0, 0xff, 0, 1, 2, 3, 4, 5, 6, 7, 71, 135})    // both
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 {
			return
		}
		img := append([]byte(nil), seeds[int(in[0])%len(seeds)]...)
		in = in[1:]
		for len(in) >= 4 && in[0] != 0xff {
			at := (int(in[0])<<8 | int(in[1])) << bits.Len(uint(len(img)>>16)) % len(img)
			switch in[3] & 3 {
			case 0:
				img[at] = in[2]
			case 1: // a whole entry
				at &^= 7
				if at+8 <= len(img) {
					binary.BigEndian.PutUint64(img[at:], uint64(in[2])<<9|uint64(in[3]&0xc0)<<56|uint64(in[3]&4)>>2)
				}
			case 2:
				img[at] ^= 1 << (in[2] & 7)
			case 3:
				img = img[:max(at, 512)]
			}
			in = in[4:]
		}
		fuzzImage(t, img, in)
	})
}

// fuzzConfig is what img is opened with.
func fuzzConfig(img []byte) config {
	c := config{file: mem{drivertest.MemFileOf(img)}, unmap: true, options: quiet}
	if be.Uint64(img[72:])&layout.IncompatDataFile != 0 {
		c.external = mem{drivertest.NewMemFile(48 << 10)} // it may be shorter than the disk
	}
	return c
}

func fuzzImage(t *testing.T, img, ops []byte) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	s, err := openImage(req(), fuzzConfig(img))
	runtime.ReadMemStats(&after)
	// The L1 and refcount tables are held to what lies in the file; the rest is a number of
	// clusters, counted here with those given back meanwhile.
	limit := 4<<20 + 64*uint64(len(img)) + 32<<min(img[23], layout.MaxClusterBits)
	if used := after.TotalAlloc - before.TotalAlloc; used > limit {
		t.Fatalf("opening a file of %d bytes took %d bytes", len(img), used)
	}
	if err != nil {
		return
	}
	size := s.size.Load()
	b := make([]byte, 3000)
	clusterBits := min(img[23], layout.MaxClusterBits)
	defer func() {
		runtime.ReadMemStats(&before)
		// Each request of two clusters at most touches a few tables; a resize may move the tables
		// that lie in the file. A compressed cluster may ask for a window of 8 MiB; the decoder
		// that has it is kept for the next one.
		limit := 10<<20 + uint64(min(len(ops), 64)+2)*(1<<20+4*uint64(len(img))+16<<clusterBits)
		if used := before.TotalAlloc - after.TotalAlloc; used > limit {
			t.Fatalf("%d operations on a file of %d bytes took %d bytes, limit %d", len(ops), len(img), used, limit)
		}
	}()
	for _, op := range ops[:min(len(ops), 64)] {
		off := int64(op>>3) * 1536
		if size < 1<<40 && size > 0 {
			off %= size
		}
		n := min(int64(len(b)), size-off)
		if n <= 0 {
			break
		}
		switch op & 7 {
		case 0, 1:
			_ = s.WriteAt(req(), blk.Buf(b[:n]), off, 0)
		case 2:
			_ = s.ReadAt(req(), blk.Buf(b[:n]), off, 0)
		case 3:
			_ = s.Discard(req(), off, n)
		case 4:
			_ = s.Zero(req(), off, n, blk.MayUnmap)
		case 5:
			_, _ = s.Status(req(), off, n)
		case 6:
			_ = s.Flush(req())
		case 7:
			switch op >> 6 {
			case 0:
				_ = s.WriteAt(req(), blk.Buf(b[:min(s.cs, n)]), off&^(s.cs-1), blk.Compressed)
			case 1:
				if size < 1<<24 {
					mode := []blk.Prealloc{blk.PreallocOff, blk.PreallocMetadata}[op>>3&1]
					_ = s.Resize(req(), (size+100*512)&^511, mode)
				}
			default:
				if size < 1<<24 {
					_ = s.Resize(req(), size/2&^511, blk.PreallocOff)
				}
			}
			size = s.size.Load()
		}
	}
	_ = s.Inactivate(req())
	_ = s.Close()
}

// FuzzHeader parses headers of any content.
func FuzzHeader(f *testing.F) {
	for _, s := range seedImages(f) {
		f.Add(s[:1024])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p := make([]byte, max(layout.HeaderSize, len(b)))
		copy(p, b)
		cs, err := layout.Peek(p)
		if err != nil || cs > 4096 {
			return
		}
		p = append(p, make([]byte, cs)...)
		h, err := layout.Parse(p, true)
		if err != nil {
			return
		}
		x, err := h.ParseExtensions(p)
		if err != nil {
			return
		}
		name, err := h.BackingName(p)
		if err != nil {
			return
		}
		q, err := h.Marshal(x, name)
		if err != nil {
			return
		}
		// What was written reads the same.
		q = append(q, make([]byte, cs)...)
		h2, err := layout.Parse(q, true)
		if err != nil {
			t.Fatalf("parsing what was written: %v", err)
		}
		n2, err := h2.BackingName(q)
		if err != nil || n2 != name || h2.Size != h.Size || h2.AutoclearFeatures != h.AutoclearFeatures {
			t.Fatalf("written and read differ: %v %q %q", err, name, n2)
		}
	})
}

// FuzzEncrypted opens an encrypted image with damage to its header and to the header with its keys,
// and works on it. Input: changes (place, place, value) up to a 0xff, then operations.
func FuzzEncrypted(f *testing.F) {
	o := CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(4096))}.schema()
	o.Encrypt = encrypting("luks/aes-128/cbc/essiv/sha256/sha1")
	m := drivertest.NewMemFile(0)
	if err := createWith(req(), mem{m}, nil, "", o, words); err != nil {
		f.Fatal(err)
	}
	img := m.Bytes()
	keys := int(binary.BigEndian.Uint64(img[layout.HeaderSize+8:]))
	f.Add([]byte{0xff, 0, 1, 2, 3, 4})
	f.Add([]byte{0, 35, 1, 0xff, 0, 1, 2, 3})                     // the other method
	f.Add([]byte{0, 122, 9, 0, 126, 0x10, 0xff, 0, 1, 2, 3})      // the keys lie elsewhere
	f.Add([]byte{0, 135, 0, 0, 134, 0x10, 0xff, 0, 1, 2, 3})      // there is less of them
	f.Add([]byte{2, 104, 0, 2, 166, 0xff, 0xff, 0})               // iterations without end
	f.Add([]byte{2, 109, 1, 3, 0, 0, 3, 10, 7, 0xff, 0, 1, 2, 3}) // longer keys, other places
	f.Fuzz(func(t *testing.T, in []byte) {
		b := bytes.Clone(img)
		for len(in) >= 3 && in[0] != 0xff {
			at := (int(in[0])<<8 | int(in[1])) % (512 + 592)
			if at >= 512 {
				at += keys - 512
			}
			b[at], in = in[2], in[3:]
		}
		if b[23] > 16 {
			return // reading clusters that large is all that it would do
		}
		ctx, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer stop()
		s, err := openImage(&blk.Req{Ctx: ctx}, keyed(config{file: mem{drivertest.MemFileOf(b)}, options: quiet}))
		if err != nil {
			return
		}
		data := make([]byte, 4096)
		for _, op := range in[:min(len(in), 16)] {
			off := min(int64(op>>2)*8192, s.size.Load()&^511)
			part := blk.Buf(data[:min(4096, s.size.Load()&^511-off)])
			switch op & 3 {
			case 0, 1:
				_ = s.WriteAt(req(), part, off, 0)
			case 2:
				_ = s.ReadAt(req(), part, off, 0)
			case 3:
				_ = s.Flush(req())
			}
		}
		_ = s.Inactivate(req())
		_ = s.Close()
	})
}
