package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// exchange is one shape of the images that are exchanged with QEMU's tools.
type exchange struct {
	cs       uint64
	v        string
	bits     int64
	ext      bool
	data     string // "", "data", "raw"
	back     bool
	size     int
	prealloc blk.Prealloc
	crypt    string // as encryption has it, "" for none
}

func (x exchange) String() string {
	s := fmt.Sprintf("%d,%s,%d,ext=%v,data=%s,back=%v,%d,%s", x.cs, x.v, x.bits, x.ext, x.data, x.back, x.size, x.prealloc)
	if x.crypt != "" {
		s += "," + x.crypt
	}
	return s
}

// options are those of qemu-img for x in dir.
func (x exchange) options() string {
	o := fmt.Sprintf("cluster_size=%d,refcount_bits=%d,compat=%s", x.cs, x.bits, map[string]string{"v2": "0.10", "v3": "1.1"}[x.v])
	if x.ext {
		o += ",extended_l2=on"
	}
	if x.data != "" {
		o += ",data_file=data.bin"
	}
	if x.data == "raw" {
		o += ",data_file_raw=on"
	}
	if x.back {
		o += ",backing_file=back.bin,backing_fmt=raw"
	}
	if x.prealloc != "" {
		o += ",preallocation=" + string(x.prealloc)
	}
	if x.crypt != "" {
		o += "," + encryption(x.crypt)
	}
	return o
}

// named is how QEMU's tools are told the image.
func (x exchange) named() []string {
	if x.crypt == "" {
		return []string{"-f", "qcow2", exchanged}
	}
	return []string{"--object", "secret,id=k,data=key", "--image-opts",
		"driver=qcow2,encrypt.key-secret=k,file.driver=file,file.filename=" + exchanged}
}

// exchanges are the shapes: each cluster size with each kind of table and place of the data, and
// with versions, widths, sizes and backing files by turns.
func exchanges() (l []exchange) {
	widths := []int64{16, 1, 64, 8, 2, 32, 4}
	sizes := []int{1 << 20, 1<<20 + 512, 3<<20 - 512, 5<<19 + 40960}
	modes := []blk.Prealloc{"", blk.PreallocMetadata, "", blk.PreallocFalloc, blk.PreallocFull}
	for _, cs := range []uint64{512, 4 << 10, 16 << 10, 64 << 10, 512 << 10, 2 << 20} {
		for _, ext := range []bool{false, true} {
			for _, data := range []string{"", "data", "raw"} {
				for _, back := range []bool{false, true} {
					if ext && cs < 16<<10 || data == "raw" && back {
						continue
					}
					x := exchange{cs, "v3", widths[len(l)%len(widths)], ext, data, back, sizes[len(l)%len(sizes)], "", ""}
					if !back || ext {
						x.prealloc = modes[len(l)%len(modes)]
					}
					l = append(l, x)
				}
			}
		}
		for _, back := range []bool{false, true} {
			l = append(l, exchange{cs, "v2", 16, false, "", back, sizes[len(l)%len(sizes)], "", ""})
		}
	}
	return l
}

// party is who makes images and works on them: we, or a version of QEMU's tools.
type party interface {
	create(t *testing.T, dir string, x exchange)
	// work writes, zeroes and discards, and keeps disk up to date.
	work(t *testing.T, dir string, x exchange, rnd *rand.Rand, disk []byte)
	// look compares what is read with disk.
	look(t *testing.T, dir string, x exchange, disk []byte)
}

const exchanged = "a.qcow2"

// TestExchange has images of all shapes made by one party, worked on and read by the others, in
// turn, and checked by all after each of them.
func TestExchange(t *testing.T) { testExchanges(t, exchanges()) }

func testExchanges(t *testing.T, shapes []exchange) {
	tool(t, "qemu-img")
	parties := map[string]party{"ours": oursParty{}, "qemu": qemuParty("")}
	order := []string{"ours", "qemu"}
	if _, err := exec.LookPath("qemu-img10"); err == nil {
		parties["qemu10"] = qemuParty("10")
		order = append(order, "qemu10")
	} else {
		t.Log("SKIPPED: qemu-img10 is not installed, so nothing was exchanged with QEMU 10")
	}
	base, _ := strconv.Atoi(os.Getenv("SEED")) // other makers and histories on request
	for i, x := range shapes {
		if testing.Short() && i%3 != 0 {
			continue
		}
		t.Run(x.String(), func(t *testing.T) {
			t.Parallel()
			maker := order[(base+i)%len(order)]
			dir := t.TempDir()
			rnd := rand.New(rand.NewPCG(uint64(i), uint64(base)))
			disk := make([]byte, x.size)
			if x.back {
				b := make([]byte, x.size*2/3&^511)
				fill(rnd, b)
				copy(disk, b)
				if err := os.WriteFile(filepath.Join(dir, "back.bin"), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			parties[maker].create(t, dir, x)
			everybodyLooks(t, parties, dir, x, disk, maker+" made it")
			for _, worker := range order {
				parties[worker].work(t, dir, x, rnd, disk)
				everybodyLooks(t, parties, dir, x, disk, maker+" made it, "+worker+" wrote to it")
			}
		})
	}
}

func everybodyLooks(t *testing.T, parties map[string]party, dir string, x exchange, disk []byte, when string) {
	t.Helper()
	for name, p := range parties {
		if p.look(t, dir, x, disk); t.Failed() {
			t.Fatalf("%s, and %s looked", when, name)
		}
	}
	if x.data == "raw" {
		b, err := os.ReadFile(filepath.Join(dir, "data.bin"))
		// QEMU fills the last cluster.
		if err != nil || !bytes.HasPrefix(b, disk) || len(bytes.TrimLeft(b[len(disk):], "\x00")) > 0 {
			t.Fatalf("%s: the data file, of %d bytes, is not as the disk: %v", when, len(b), err)
		}
	}
}

// task is something that is done to a disk.
type task struct {
	op     byte // w, z, u (zeroes that unmap), d, c (compressed)
	off, n int
	v      byte
}

// tasks draws what to do of what ops has; disk shows it afterwards.
func tasks(x exchange, ops string, rnd *rand.Rand, disk []byte) (l []task) {
	cs := int(x.cs)
	for range 24 {
		k := task{op: ops[rnd.IntN(len(ops))], v: byte(1 + rnd.IntN(250))}
		k.off = rnd.IntN(len(disk)/512) * 512
		k.n = min((1+rnd.IntN(max(2*cs, 16<<10)/512))*512, len(disk)-k.off)
		switch k.op {
		case 'd', 'c': // whole clusters; compressed: one
			if k.off = k.off / cs * cs; k.op == 'c' {
				k.n = cs
			}
			if k.n = k.n / cs * cs; k.off+k.n > len(disk) || k.n == 0 || x.v == "v2" && x.back && k.op == 'd' {
				continue
			}
			if k.op == 'c' && (x.data != "" || x.crypt != "" || x.cs < 4096) {
				continue
			}
		}
		v := k.v
		if k.op == 'z' || k.op == 'u' || k.op == 'd' {
			v = 0
		}
		copy(disk[k.off:k.off+k.n], bytes.Repeat([]byte{v}, k.n))
		l = append(l, k)
	}
	return l
}

type oursParty struct{}

// open opens the image in dir as we do.
func (oursParty) open(t *testing.T, dir string, x exchange) *image {
	c := config{unmap: true}
	if x.data != "" {
		c.external = openOS(t, filepath.Join(dir, "data.bin"))
	}
	if x.back {
		b := openOS(t, filepath.Join(dir, "back.bin"))
		c.backing = func() file { return b }
	}
	return mustOpen(t, openOS(t, filepath.Join(dir, exchanged)), c)
}

func (oursParty) create(t *testing.T, dir string, x exchange) {
	var data file
	name := ""
	if err := os.WriteFile(filepath.Join(dir, exchanged), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if x.data != "" {
		name = "data.bin"
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		data = openOS(t, filepath.Join(dir, name))
	}
	o := CreateOptions{Size: uint64(x.size), ClusterSize: &x.cs, Version: x.v, RefcountBits: &x.bits, Extended: x.ext,
		Preallocation: x.prealloc}
	if x.back {
		o.BackingFile, o.BackingFormat = ptr("back.bin"), ptr("raw")
	}
	s := o.schema()
	if x.crypt != "" {
		s.Encrypt = encrypting(x.crypt)
	}
	if x.data != "" {
		s.DataFile, s.DataFileRaw = &types.BlockdevRef{Reference: &name}, ptr(x.data == "raw")
	}
	if err := createWith(req(), openOS(t, filepath.Join(dir, exchanged)), data, name, s, words); err != nil {
		t.Fatal(err)
	}
}

func (p oursParty) work(t *testing.T, dir string, x exchange, rnd *rand.Rand, disk []byte) {
	s := p.open(t, dir, x)
	for _, k := range tasks(x, "wwwwzudc", rnd, disk) {
		b := blk.Buf(bytes.Repeat([]byte{k.v}, k.n))
		var err error
		switch k.op {
		case 'w':
			err = s.WriteAt(req(), b, int64(k.off), 0)
		case 'c':
			if err = s.WriteAt(req(), b, int64(k.off), blk.Compressed); errors.Is(err, errIO) {
				err = s.WriteAt(req(), b, int64(k.off), 0) // there was something already
			}
		case 'd':
			err = s.Discard(req(), int64(k.off), int64(k.n))
		default:
			f := blk.Flags(0)
			if k.op == 'u' {
				f = blk.MayUnmap
			}
			if err = s.Zero(req(), int64(k.off), int64(k.n), f); unsupported(err) {
				err = s.WriteAt(req(), blk.Buf(make([]byte, k.n)), int64(k.off), 0)
			}
		}
		if err != nil {
			t.Fatalf("%c %d+%d: %v", k.op, k.off, k.n, err)
		}
	}
	sound(t, s, true)
	mustClose(t, s)
}

func (p oursParty) look(t *testing.T, dir string, x exchange, disk []byte) {
	s := p.open(t, dir, x)
	b := make([]byte, len(disk))
	if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, disk) {
		t.Errorf("we read something else: %v", err)
	}
	sound(t, s, false)
	mustClose(t, s)
}

// qemuParty is a version of QEMU's tools: what their names end in.
type qemuParty string

func (p qemuParty) run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	c := exec.Command(name+string(p), args...)
	c.Dir = dir
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s%s %s: %v\n%s", name, p, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (p qemuParty) create(t *testing.T, dir string, x exchange) {
	args := []string{"create", "-q", "-f", "qcow2", "-o", x.options(), exchanged, fmt.Sprint(x.size)}
	if x.crypt != "" {
		p.createEncrypted(t, dir, args)
		return
	}
	p.run(t, dir, "qemu-img", args...)
}

func (p qemuParty) work(t *testing.T, dir string, x exchange, rnd *rand.Rand, disk []byte) {
	args := []string{"-d", "unmap"}
	for _, k := range tasks(x, "wwwwzud", rnd, disk) { // it writes no compressed data over others
		c := fmt.Sprintf("%s %d %d", map[byte]string{
			'w': fmt.Sprintf("write -P %d", k.v), 'd': "discard", 'z': "write -z", 'u': "write -z -u",
		}[k.op], k.off, k.n)
		args = append(args, "-c", c)
	}
	if out := p.run(t, dir, "qemu-io", append(args, x.named()...)...); strings.Contains(out, "failed") {
		t.Fatal(out)
	}
}

func (p qemuParty) look(t *testing.T, dir string, x exchange, disk []byte) {
	if err := os.WriteFile(filepath.Join(dir, "disk.bin"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
	p.run(t, dir, "qemu-img", append([]string{"check", "-q"}, x.named()...)...)
	if x.crypt != "" {
		args := append([]string{"compare", "-q"}, x.named()...)
		p.run(t, dir, "qemu-img", append(args, "driver=raw,file.driver=file,file.filename=disk.bin")...)
		return
	}
	p.run(t, dir, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", exchanged, "disk.bin")
}
