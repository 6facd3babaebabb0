package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// model is an image beside the bytes that it has to show.
type model struct {
	t    testing.TB
	s    *image
	disk []byte
	back []byte
	rnd  *rand.Rand
	log  []string
	// loose: discarded bytes may show old or zero content (never without a version 3 image).
	v2 bool
}

func (m *model) fatalf(format string, args ...any) {
	m.t.Helper()
	k := max(0, len(m.log)-20)
	for _, l := range m.log[k:] {
		m.t.Log(l)
	}
	m.t.Fatalf(format, args...)
}

func (m *model) span(limit int) (off, n int) {
	off = m.rnd.IntN(len(m.disk)/512) * 512
	n = (1 + m.rnd.IntN(limit/512)) * 512
	return off, min(n, len(m.disk)-off)
}

func (m *model) verify(off, n int) {
	m.t.Helper()
	b := make([]byte, n)
	fill(m.rnd, b[:min(n, 512)])
	if err := m.s.ReadAt(req(), blk.Buf(b), int64(off), 0); err != nil {
		m.fatalf("read %d+%d: %v", off, n, err)
	}
	if !bytes.Equal(b, m.disk[off:off+n]) {
		for i := range b {
			if b[i] != m.disk[off+i] {
				m.fatalf("read %d+%d: first difference at %d: %#x instead of %#x", off, n, off+i, b[i], m.disk[off+i])
			}
		}
	}
}

func (m *model) step() {
	cs := int(m.s.cs)
	limit := min(len(m.disk), max(4*cs, 8192))
	off, n := m.span(limit)
	r := req()
	switch k := m.rnd.IntN(20); {
	case k < 8:
		b := make([]byte, n)
		fill(m.rnd, b)
		m.log = append(m.log, fmt.Sprintf("write %d+%d", off, n))
		if err := m.s.WriteAt(r, blk.Buf(b), int64(off), 0); err != nil {
			m.fatalf("write: %v", err)
		}
		copy(m.disk[off:], b)
	case k < 11:
		f := blk.Flags(0)
		if m.rnd.IntN(2) == 0 {
			f = blk.MayUnmap
		}
		m.log = append(m.log, fmt.Sprintf("zero %d+%d %d", off, n, f))
		m.zero(off, n, f)
	case k < 13:
		m.log = append(m.log, fmt.Sprintf("discard %d+%d", off, n))
		m.discard(off, n)
	case k < 14:
		m.log = append(m.log, fmt.Sprintf("compressed %d+%d", off, n))
		m.compressed(off)
	case k < 15:
		m.log = append(m.log, "flush")
		if err := m.s.Flush(r); err != nil {
			m.fatalf("flush: %v", err)
		}
	case k < 16:
		m.status(off, n)
	case k < 17 && m.rnd.IntN(3) == 0:
		m.resize()
	default:
		m.verify(off, n)
	}
}

// resize changes the size, by less than a cluster or by many, with all modes of preallocation.
func (m *model) resize() {
	cs := int(m.s.cs)
	size := len(m.disk)
	switch m.rnd.IntN(3) {
	case 0:
		size += 512 * (1 + m.rnd.IntN(cs/512+1))
	case 1:
		size += m.rnd.IntN(4*cs/512) * 512
	default:
		size -= m.rnd.IntN(min(4*cs, size)/512) * 512
	}
	mode := blk.PreallocOff
	if size > len(m.disk) {
		mode = []blk.Prealloc{blk.PreallocOff, blk.PreallocMetadata, blk.PreallocFalloc, blk.PreallocFull}[m.rnd.IntN(4)]
	}
	m.log = append(m.log, fmt.Sprintf("resize %d to %d %s", len(m.disk), size, mode))
	err := m.s.Resize(req(), int64(size), mode)
	if m.v2 && m.back != nil && errors.Is(err, blk.ErrNotSupported) {
		return // there is no way to hide the backing file
	}
	if err != nil {
		m.fatalf("resize: %v", err)
	}
	if size <= len(m.disk) {
		m.disk = m.disk[:size:size]
	} else {
		m.disk = append(m.disk[:len(m.disk):len(m.disk)], make([]byte, size-len(m.disk))...)
	}
	if m.s.size.Load() != int64(size) {
		m.fatalf("size %d instead of %d", m.s.size.Load(), size)
	}
}

// zero does what the generic layer does: whole clusters by Zero, the rest by writing.
func (m *model) zero(off, n int, f blk.Flags) {
	err := m.s.Zero(req(), int64(off), int64(n), f)
	if errors.Is(err, blk.ErrNotSupported) {
		err = m.s.WriteAt(req(), blk.Buf(make([]byte, n)), int64(off), 0)
	}
	if err != nil {
		m.fatalf("zero: %v", err)
	}
	clear(m.disk[off : off+n])
}

func (m *model) discard(off, n int) {
	err := m.s.Discard(req(), int64(off), int64(n))
	if errors.Is(err, blk.ErrNotSupported) {
		return
	}
	if err != nil {
		m.fatalf("discard: %v", err)
	}
	cs := int(m.s.cs)
	from, to := (off+cs-1)/cs*cs, (off+n)/cs*cs
	if off+n == len(m.disk) {
		to = off + n
	}
	if from < to {
		clear(m.disk[from:to])
	}
}

func (m *model) compressed(off int) {
	cs := int(m.s.cs)
	off = off / cs * cs
	n := min(cs, len(m.disk)-off)
	b := bytes.Repeat([]byte{byte(m.rnd.Uint32()), byte(m.rnd.Uint32())}, n/2)
	fill(m.rnd, b[:m.rnd.IntN(n)])
	err := m.s.WriteAt(req(), blk.Buf(b), int64(off), blk.Compressed)
	if errors.Is(err, errIO) || (m.s.external != nil || m.s.seal != nil) && errors.Is(err, blk.ErrNotSupported) {
		return // has data of its own
	}
	if err != nil {
		m.fatalf("compressed write: %v", err)
	}
	copy(m.disk[off:], b)
}

func (m *model) status(off, n int) {
	x, err := m.s.Status(req(), int64(off), int64(n))
	if err != nil {
		m.fatalf("status: %v", err)
	}
	if x.N < 1 || x.N > int64(n) {
		m.fatalf("status of %d+%d: %+v", off, n, x)
	}
	part := m.disk[off : off+int(x.N)]
	if x.Zero && !blk.IsZero(part) {
		m.fatalf("status of %d+%d claims zeroes: %+v", off, n, x)
	}
	if x.OffValid && x.Data {
		b := make([]byte, x.N)
		if err := m.s.readData(req(), blk.Buf(b), x.MapOff, int64(off)); err != nil || !bytes.Equal(b, part) {
			m.fatalf("status of %d+%d: wrong place: %+v", off, n, x)
		}
	}
}

type shape struct {
	cs    uint64
	bits  int64
	v     string
	back  bool
	comp  string
	lazy  bool
	ext   bool   // extended L2 entries
	data  string // "", "data", "raw": a data file
	crypt string
}

// options are those for an image of size bytes.
func (sh *shape) options(size uint64) CreateOptions {
	o := CreateOptions{
		Size: size, ClusterSize: &sh.cs, RefcountBits: &sh.bits, Version: sh.v,
		LazyRefcounts: sh.lazy, CompressionType: sh.comp, Extended: sh.ext, Crypt: sh.crypt,
	}
	if sh.data != "" {
		o.Data, o.Raw = drivertest.NewMemFile(0), sh.data == "raw"
	}
	return o
}

func shapes() []shape {
	var out []shape
	for i, cs := range []uint64{512, 1024, 4096, 65536, 2 << 20} {
		for j, bits := range []int64{1, 2, 4, 8, 16, 32, 64} {
			if cs > 4096 && j%3 != 0 {
				continue // slow ones
			}
			comp := []string{"zlib", "zstd"}[(i+j)%2]
			out = append(out, shape{cs: cs, bits: bits, v: "v3", back: (i+j)%3 == 0, comp: comp, lazy: (i+j)%4 == 1})
		}
		out = append(out,
			shape{cs: cs, bits: 16, v: "v2", back: i%2 == 0, comp: "zlib"},
			shape{cs: cs, bits: 16, v: "v2", back: i%2 == 1, comp: "zlib"})
	}
	return out
}

// TestModel does random operations on images of all shapes and compares with plain bytes;
// the image is checked now and then, and after reopening.
func TestModel(t *testing.T) {
	base, _ := strconv.Atoi(os.Getenv("SEED")) // other histories on request
	for i, sh := range shapes() {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			t.Parallel()
			testShape(t, sh, uint64(base+i+1))
		})
	}
}

func testShape(t *testing.T, sh shape, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 7))
	clusters := 300
	if sh.cs > 4096 {
		clusters = 12
	}
	if sh.cs > 65536 {
		clusters = 3
	}
	size := clusters*int(sh.cs) + rnd.IntN(int(sh.cs)/512)*512
	o := sh.options(uint64(size))
	m := &model{t: t, disk: make([]byte, size), rnd: rnd, v2: sh.v == "v2"}
	c := config{unmap: rnd.IntN(2) == 0}
	if o.Data != nil {
		c.external = mem{o.Data}
	}
	if sh.back {
		m.back = make([]byte, size*2/3/512*512)
		fill(rnd, m.back)
		copy(m.disk, m.back)
		o.BackingFile = ptr("back")
		bf := mem{drivertest.MemFileOf(m.back)}
		c.backing = func() file { return bf }
	}
	if rnd.IntN(2) == 0 {
		c.options.L2CacheSize, c.options.L2CacheEntrySize = ptr(int64(1)), ptr(int64(512))
	}
	f := mustCreate(t, o)
	steps := 150
	if testing.Short() {
		steps = 60
	}
	if sh.cs > 65536 {
		steps = 12
	}
	for round := range 3 {
		m.s = mustOpen(t, mem{f}, c)
		m.verify(0, len(m.disk))
		for i := range steps {
			m.step()
			if i%50 == 0 {
				sound(t, m.s, true)
			}
			if len(m.disk) < 4*512 {
				break
			}
		}
		m.verify(0, len(m.disk))
		mustClose(t, m.s)
		s := mustOpen(t, mem{f}, config{readOnly: true, backing: c.backing, external: c.external})
		sound(t, s, false)
		const lasting = layout.IncompatDataFile | layout.IncompatExtL2
		if round == 0 && peek(s).hdr.IncompatibleFeatures&^lasting != 0 && sh.comp != "zstd" {
			t.Fatalf("features %x after close", peek(s).hdr.IncompatibleFeatures)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var data []byte
	if o.Data != nil {
		data = o.Data.Bytes()
		if len(data) != len(m.disk) || o.Raw && sh.crypt == "" && !bytes.Equal(data, m.disk) {
			t.Fatalf("the data file, of %d bytes, is not as the disk, of %d", len(data), len(m.disk))
		}
	}
	qemuChecks(t, sh.crypt, f.Bytes(), m.back, data, m.disk)
}

// qemuChecks lets all qemu-img that are installed check an image and, if disk is given, compare
// what they read with that; back is its backing file, data that with its data, or nil.
func qemuChecks(t *testing.T, crypt string, img, back, data, disk []byte) {
	t.Helper()
	tools := slices.DeleteFunc([]string{"qemu-img", "qemu-img10"}, func(name string) bool {
		_, err := exec.LookPath(name)
		return err != nil
	})
	if len(tools) == 0 {
		t.Log("SKIPPED: qemu-img is not installed and did not check the image")
		return
	}
	name := filepath.Join(t.TempDir(), "a.qcow2")
	if err := os.WriteFile(name, img, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(name), "back"), back, 0o600); err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string][]byte{"data": data, "disk": disk} {
		if err := os.WriteFile(filepath.Join(filepath.Dir(name), file), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	qemu := func(tool string, args ...string) {
		t.Helper()
		c := exec.Command(tool, args...)
		c.Dir = filepath.Dir(name) // where the header looks for the data
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", tool, args, err, out)
		}
	}
	if back != nil && crypt == "" {
		qemu(tools[0], "rebase", "-q", "-u", "-b", "back", "-F", "raw", name)
	}
	for _, tool := range tools {
		if crypt != "" {
			image := "driver=qcow2,encrypt.key-secret=k,file.driver=file,file.filename=" + name
			if back != nil {
				image += ",backing.driver=raw,backing.file.driver=file,backing.file.filename=back"
			}
			qemu(tool, "check", "-q", "--object", "secret,id=k,data=key", "--image-opts", image)
			qemu(tool, "compare", "-q", "--object", "secret,id=k,data=key", "--image-opts", image, "driver=raw,file.driver=file,file.filename=disk")
			continue
		}
		qemu(tool, "check", "-q", name)
		if disk != nil {
			qemu(tool, "compare", "-q", "-f", "qcow2", "-F", "raw", name, "disk")
		}
	}
}
