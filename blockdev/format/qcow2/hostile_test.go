package qcow2

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// poke is a change of an image.
type poke struct {
	off int64
	b   []byte
}

func u32(off int64, v uint32) poke { return poke{off, binary.BigEndian.AppendUint32(nil, v)} }
func u64(off int64, v uint64) poke { return poke{off, binary.BigEndian.AppendUint64(nil, v)} }

// hostile are images with one fault each, and what opening them says.
var hostile = []struct {
	name  string
	v     string // version
	pokes []poke
	want  string // "" opens
}{
	{"magic", "v3", []poke{u32(0, 1)}, "Image is not in qcow2 format"},
	{"version1", "v3", []poke{u32(4, 1)}, "Unsupported qcow2 version 1"},
	{"version9", "v3", []poke{u32(4, 9)}, "Unsupported qcow2 version 9"},
	{"bits5", "v3", []poke{u32(20, 5)}, "Unsupported cluster size: 2^5"},
	{"bits22", "v3", []poke{u32(20, 22)}, "Unsupported cluster size: 2^22"},
	{"short header", "v3", []poke{u32(100, 100)}, "qcow2 header too short"},
	{"long header", "v3", []poke{u32(100, 65537)}, "qcow2 header exceeds cluster size"},
	{"backing offset", "v3", []poke{u64(8, 65537)}, "Invalid backing file offset"},
	{"backing length", "v3", []poke{u64(8, 1000), u32(16, 1024)}, "Backing file name too long"},
	{"compression", "v3", []poke{{104, []byte{2}}}, "qcow2: unknown compression type: 2"},
	{"compression bit", "v3", []poke{u64(72, 8)}, "qcow2: Compression type incompatible feature bit must not be set"},
	{"compression no bit", "v3", []poke{{104, []byte{1}}}, "qcow2: Compression type incompatible feature bit must be set"},
	{"feature", "v3", []poke{u64(72, 1<<63)}, "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000"},
	{"features", "v3", []poke{u64(72, 1<<40|1<<5)}, "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000020"},
	{"corrupt", "v3", []poke{u64(72, 2)}, "qcow2: Image is corrupt; cannot be opened read/write"},
	{"refcount width", "v3", []poke{u32(96, 7)}, "Reference count entry width too large; may not exceed 64 bits"},
	{"encryption", "v3", []poke{u32(32, 3)}, "Unsupported encryption method 3"},
	{"no reftable", "v3", []poke{u32(56, 0)}, "Image does not contain a reference count table"},
	{"reftable size", "v3", []poke{u32(56, 129)}, "Reference count table too large"},
	{"reftable offset", "v3", []poke{u64(48, 7)}, "Reference count table offset invalid"},
	{"reftable far", "v3", []poke{u64(48, 1<<63)}, "Reference count table offset invalid"},
	{"snapshots", "v3", []poke{u32(60, 65537)}, "Snapshot table too large"},
	{"snapshot offset", "v3", []poke{u32(60, 1), u64(64, 5)}, "Snapshot table offset invalid"},
	{"snapshot extra", "v3", []poke{u32(60, 1), u64(64, 0x30000), u32(0x30000+36, 1025)}, "Too much extra metadata in snapshot table entry 0"},
	{"l1 size", "v3", []poke{u32(36, 4<<20+1)}, "Active L1 table too large"},
	{"l1 offset", "v3", []poke{u64(40, 7)}, "Active L1 table offset invalid"},
	{"l1 short", "v3", []poke{u32(36, 0)}, "L1 table is too small"},
	{"size", "v3", []poke{u64(24, 1<<63)}, "Image is too big"},
	{"extension", "v3", []poke{u32(112, 0x12345678), u32(116, 70000)}, "Header extension too large"},
	{"backing format", "v3", []poke{u32(112, 0xe2792aca), u32(116, 16)}, "ERROR: ext_backing_format: len=16 too large (>=16)"},
	{"crypto", "v3", []poke{u32(112, 0x0537be77), u32(116, 16)}, "CRYPTO header extension only expected with LUKS encryption method"},
	{"raw bit", "v3", []poke{u64(88, 2)}, "data-file-raw requires a data file"},
	{"bitmaps length", "v3", []poke{u64(88, 1), u32(112, 0x23852875), u32(116, 8)}, "bitmaps_ext: Invalid extension length"},
	{"bitmaps none", "v3", []poke{u64(88, 1), u32(112, 0x23852875), u32(116, 24), u64(120, 0)}, "found bitmaps extension with zero bitmaps"},
	{"bitmaps many", "v3", []poke{u64(88, 1), u32(112, 0x23852875), u32(116, 24), u64(120, 70000<<32)}, "bitmaps_ext: Image has 70000 bitmaps, exceeding the QEMU supported maximum of 65535"},
	{"v2 magic", "v2", []poke{u32(0, 1)}, "Image is not in qcow2 format"},
	{"v2 bits", "v2", []poke{u32(20, 8)}, "Unsupported cluster size: 2^8"},
	{"unknown autoclear", "v3", []poke{u64(88, 1<<40)}, ""},
	{"unknown compatible", "v3", []poke{u64(80, 1<<40)}, ""},
	{"dirty", "v3", []poke{u64(72, 1)}, ""},
	{"refcount zero", "v3", []poke{u64(0x10000, 0)}, ""},
}

// TestHostile opens each of them; where QEMU is installed, it has to say the same.
func TestHostile(t *testing.T) {
	_, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Log("SKIPPED comparison: qemu-io is not installed")
	}
	for _, h := range hostile {
		t.Run(h.name, func(t *testing.T) {
			f := mustCreate(t, CreateOptions{Size: 1 << 30, Version: h.v})
			for _, p := range h.pokes {
				f.Poke(p.off, p.b)
			}
			name := filepath.Join(t.TempDir(), "a.qcow2")
			if e := os.WriteFile(name, f.Bytes(), 0o600); e != nil {
				t.Fatal(e)
			}
			s, e := openImage(req(), config{file: mem{f}})
			got := ""
			if e != nil {
				got = e.Error()
			} else {
				mustClose(t, s)
			}
			if got != h.want {
				t.Errorf("%q, want %q", got, h.want)
			}
			if err != nil {
				return
			}
			out, _ := exec.Command("qemu-io", "-f", "qcow2", "-c", "quit", name).CombinedOutput()
			ref := strings.TrimSpace(string(out))
			if i := strings.Index(ref, "can't open"); i >= 0 {
				ref = ref[i:]
				ref = ref[strings.Index(ref, ": ")+2:]
				ref, _, _ = strings.Cut(ref, "\n")
			}
			if ref != h.want {
				t.Errorf("QEMU says %q, expected %q", ref, h.want)
			}
		})
	}
}

// TestRefused: what is not supported yet is refused by name.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		pokes []poke
		want  string
	}{
		{[]poke{u64(72, 1<<4), u32(20, 13)}, "Unsupported subcluster size: 256"},
		{[]poke{u64(72, 1<<5)}, "Unsupported qcow2 feature(s): Unknown incompatible feature: 20"},
		{[]poke{u64(72, 1<<2)}, "'data-file' is required for this image"},
	} {
		f := mustCreate(t, CreateOptions{Size: 1 << 20})
		for _, p := range c.pokes {
			f.Poke(p.off, p.b)
		}
		if _, err := openImage(req(), config{file: mem{f}, readOnly: true}); err == nil || err.Error() != c.want {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

// TestReadOnlyTouchesNothing: not even the bits of a dirty image with unknown autoclear bits.
func TestReadOnlyTouchesNothing(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20, LazyRefcounts: true})
	f.Poke(72, []byte{0, 0, 0, 0, 0, 0, 0, 1})
	f.Poke(88, []byte{0, 0, 0, 0, 0, 0, 0, 0xf1})
	n := f.Writes.Load() + f.Flushes.Load()
	s := mustOpen(t, mem{f}, config{readOnly: true})
	if err := s.ReadAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	if f.Writes.Load()+f.Flushes.Load() != n {
		t.Fatal("a read-only image was written to")
	}
	s = mustOpen(t, mem{f}, config{})
	if peek(s).hdr.AutoclearFeatures != 0 || peek(s).hdr.IncompatibleFeatures != 0 {
		t.Fatalf("features %x %x after opening for writing", peek(s).hdr.AutoclearFeatures, peek(s).hdr.IncompatibleFeatures)
	}
	mustClose(t, s)
	if b := f.Bytes(); be.Uint64(b[88:]) != 0 || be.Uint64(b[72:]) != 0 {
		t.Fatal("the bits are still on disk")
	}
}

// TestOptionErrors are the texts for bad runtime options.
func TestOptionErrors(t *testing.T) {
	i := func(v int64) *int64 { return &v }
	for _, c := range []struct {
		o    Options
		v    string
		want string
	}{
		{Options{LazyRefcounts: ptr(true)}, "v2", "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"},
		{Options{DiscardNoUnref: ptr(true)}, "v2", "discard-no-unref is only supported since qcow2 version 3"},
		{Options{L2CacheSize: i(1), CacheSize: i(1 << 20), RefcountCacheSize: i(1 << 20)}, "v3", "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"},
		{Options{L2CacheSize: i(2), CacheSize: i(1)}, "v3", "l2-cache-size may not exceed cache-size"},
		{Options{RefcountCacheSize: i(2), CacheSize: i(1)}, "v3", "refcount-cache-size may not exceed cache-size"},
		{Options{L2CacheEntrySize: i(1000)}, "v3", "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"},
		{Options{L2CacheEntrySize: i(256)}, "v3", "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"},
		{Options{CacheCleanInterval: i(1 << 33)}, "v3", "Cache clean interval too big"},
		{Options{CacheCleanInterval: i(-1)}, "v3", "Cache clean interval too big"},
		{Options{RefcountCacheSize: i(1 << 60)}, "v3", "Refcount cache size too big"},
		{Options{L2CacheSize: i(-1)}, "v3", "Parameter 'l2-cache-size' expects a non-negative number below 2^64"},
		{checks("bogus"), "v3", "Unsupported value 'bogus' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all"},
	} {
		f := mustCreate(t, CreateOptions{Size: 1 << 20, Version: c.v})
		if _, err := openImage(req(), config{file: mem{f}, options: c.o}); err == nil || err.Error() != c.want {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

// TestCreateErrors are the texts for bad create options, none of which writes anything.
func TestCreateErrors(t *testing.T) {
	for _, c := range []struct {
		o    CreateOptions
		want string
	}{
		{CreateOptions{Size: 1048577, Version: "v2", LazyRefcounts: true}, "Image size must be a multiple of 512 bytes"},
		{CreateOptions{ClusterSize: ptr(uint64(1000))}, "Cluster size must be a power of two between 512 and 2048k"},
		{CreateOptions{ClusterSize: ptr(uint64(4 << 20))}, "Cluster size must be a power of two between 512 and 2048k"},
		{CreateOptions{ClusterSize: ptr(uint64(0))}, "Cluster size must be a power of two between 512 and 2048k"},
		{CreateOptions{BackingFile: ptr("b"), Preallocation: blk.PreallocFull}, "Backing file and preallocation can only be used at the same time if extended_l2 is on"},
		{CreateOptions{BackingFormat: ptr("raw")}, "Backing format cannot be used without backing file"},
		{CreateOptions{Version: "v2", LazyRefcounts: true}, "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
		{CreateOptions{RefcountBits: ptr(int64(3))}, "Refcount width must be a power of two and may not exceed 64 bits"},
		{CreateOptions{RefcountBits: ptr(int64(128))}, "Refcount width must be a power of two and may not exceed 64 bits"},
		{CreateOptions{RefcountBits: ptr(int64(8)), Version: "v2"}, "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"},
		{CreateOptions{CompressionType: "zstd", Version: "v2"}, "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
		{CreateOptions{Size: 1 << 56}, "Could not resize image: Failed to grow the L1 table: File too large"},
		{CreateOptions{Size: 1<<63 - 512}, "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)"},
		{CreateOptions{Size: 1 << 63}, "Could not resize image: Image size cannot be negative"},
	} {
		f := drivertest.NewMemFile(0)
		err := create(req(), mem{f}, c.o.schema())
		if err == nil || err.Error() != c.want {
			t.Errorf("%v, want %q", err, c.want)
		}
		if f.Size() != 0 && c.o.Size < 1<<40 {
			t.Error("something was written")
		}
	}
}

// TestFlagsWithoutTable: an L1 entry that names no L2 table and has flags all the same is passed
// over, by discards, by status and by a resize.
func TestFlagsWithoutTable(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 2 << 30})
	l1 := int64(be.Uint64(f.Bytes()[40:]))
	for i, v := range []uint64{layout.Copied, 1 << 56, layout.Copied | 1<<62} {
		f.Poke(l1+int64(8*i), be.AppendUint64(nil, v))
	}
	s := mustOpen(t, mem{f}, config{})
	if err := s.Discard(req(), 0, 2<<30); err != nil {
		t.Error(err)
	}
	for off := int64(0); off < 2<<30; {
		x, err := s.Status(req(), off, 2<<30-off)
		if err != nil || x.N <= 0 {
			t.Fatalf("status at %d: %+v, %v", off, x, err)
		}
		off += x.N
	}
	if err := s.Resize(req(), 1<<30, blk.PreallocOff); err != nil {
		t.Error(err)
	}
	mustClose(t, s)
}
