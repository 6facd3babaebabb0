package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// osFile is a real file as the file of an image.
type osFile struct{ *os.File }

func openOS(t testing.TB, name string) osFile {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return osFile{f}
}

func (f osFile) Caps() graph.Caps { return graph.Caps{ZeroInit: true} }

func (f osFile) Size() int64 {
	st, err := f.Stat()
	if err != nil {
		return 0
	}
	return st.Size()
}

func (f osFile) ReadAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) (err error) {
	v.Each(func(b []byte) {
		if err == nil {
			_, err = f.File.ReadAt(b, off)
			off += int64(len(b))
		}
	})
	return err
}

func (f osFile) WriteAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) (err error) {
	v.Each(func(b []byte) {
		if err == nil {
			_, err = f.File.WriteAt(b, off)
			off += int64(len(b))
		}
	})
	return err
}

func (f osFile) Zero(r *blk.Req, off, n int64, fl blk.Flags) error {
	return f.WriteAt(r, blk.Buf(make([]byte, n)), off, fl)
}
func (f osFile) Discard(r *blk.Req, off, n int64) error { return f.Zero(r, off, n, 0) }
func (f osFile) Flush(r *blk.Req) error                 { return nil }
func (f osFile) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Data: true, Allocated: true}, nil
}
func (f osFile) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	m.Add(blk.HostRange{FD: int(f.Fd()), Off: off, N: n})
	return nil
}
func (f osFile) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, fl blk.Flags) error {
	return blk.ErrNotSupported
}
func (f osFile) Resize(ctx context.Context, size int64, exact bool, p blk.Prealloc) error {
	return f.Truncate(size)
}

// qemuCheck has qemu-img check the image; leaks may be allowed.
func qemuCheck(t testing.TB, name string) {
	t.Helper()
	run(t, "qemu-img", "check", "-q", name)
}

// TestQemuImages opens images made by qemu-img with many options, writes to them, and has
// qemu-img check the result and qemu-io read it back.
func TestQemuImages(t *testing.T) {
	tool(t, "qemu-img")
	tool(t, "qemu-io")
	opts := []string{
		"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=4k,refcount_bits=1",
		"cluster_size=2M", "refcount_bits=64,cluster_size=512", "lazy_refcounts=on", "compression_type=zstd",
		"preallocation=metadata", "preallocation=falloc", "preallocation=full", "refcount_bits=2,cluster_size=1k",
		"extended_l2=on", "extended_l2=on,cluster_size=16k,refcount_bits=64", "extended_l2=on,cluster_size=2M",
		"extended_l2=on,preallocation=metadata", "extended_l2=on,preallocation=full,cluster_size=32k",
	}
	for _, o := range opts {
		t.Run(o, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "a.qcow2")
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, name, "4M")
			run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 64k 128k", "-c", "write -P 2 1M 100k", name)
			s := mustOpen(t, openOS(t, name), config{})
			b := make([]byte, 128<<10)
			if err := s.ReadAt(req(), blk.Buf(b), 64<<10, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{1}, len(b))) {
				t.Fatalf("read: %v", err)
			}
			for _, off := range []int64{0, 100 << 10, 3<<20 + 512, 4<<20 - 5*512} {
				if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{7}, 5*512)), off, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Discard(req(), 2<<20, 2<<20); err != nil {
				t.Fatal(err)
			}
			if err := s.Resize(req(), 6<<20, blk.PreallocOff); err != nil {
				t.Fatal(err)
			}
			sound(t, s, true)
			mustClose(t, s)
			qemuCheck(t, name)
			out := run(t, "qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 0 2560", "-c", "read -P 7 100k 2560",
				"-c", "read -P 1 64k 36k", "-c", "read -P 2 1M 100k", "-c", "read -P 0 2M 4M", name)
			if strings.Contains(out, "erification failed") {
				t.Fatal(out)
			}
		})
	}
}

// TestQemuCompressed reads what qemu-img compressed, and the other way round.
func TestQemuCompressed(t *testing.T) {
	tool(t, "qemu-img")
	for _, kind := range []string{"zlib", "zstd"} {
		for _, cs := range []string{"1024", "65536", "2097152"} {
			t.Run(kind+cs, func(t *testing.T) {
				dir := t.TempDir()
				raw, img, back := filepath.Join(dir, "raw"), filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "back")
				rnd := rand.New(rand.NewPCG(1, 2))
				data := make([]byte, 1<<20+512)
				for i := 0; i < len(data); i += 4096 {
					fill(rnd, data[i:i+100])
				}
				if err := os.WriteFile(raw, data, 0o600); err != nil {
					t.Fatal(err)
				}
				run(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size="+cs+",compression_type="+kind, raw, img)
				s := mustOpen(t, openOS(t, img), config{})
				got := make([]byte, len(data))
				if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("read: %v", err)
				}
				mustClose(t, s)
				// Ours, read by them.
				ours := filepath.Join(dir, "b.qcow2")
				if err := os.WriteFile(ours, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				f := openOS(t, ours)
				var n uint64
				fmt.Sscan(cs, &n)
				o := CreateOptions{Size: uint64(len(data)), ClusterSize: &n, CompressionType: kind}
				if err := create(req(), f, o.schema()); err != nil {
					t.Fatal(err)
				}
				s = mustOpen(t, f, config{})
				if err := s.WriteAt(req(), blk.Buf(data), 0, blk.Compressed); err != nil {
					t.Fatal(err)
				}
				mustClose(t, s)
				qemuCheck(t, ours)
				run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", ours, back)
				if b, err := os.ReadFile(back); err != nil || !bytes.Equal(b, data) {
					t.Fatalf("qemu-img reads something else: %v", err)
				}
			})
		}
	}
}

// TestQemuSnapshots writes to an image with internal snapshots; the snapshot keeps its content.
func TestQemuSnapshots(t *testing.T) {
	tool(t, "qemu-img")
	tool(t, "qemu-io")
	for _, o := range []string{"cluster_size=64k", "cluster_size=512", "compat=0.10,cluster_size=4k", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=128k"} {
		t.Run(o, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "a.qcow2")
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, name, "1M")
			run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 512k", name)
			run(t, "qemu-img", "snapshot", "-c", "one", name)
			run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", name)
			run(t, "qemu-img", "snapshot", "-c", "two", name)
			s := mustOpen(t, openOS(t, name), config{options: checks("all")})
			if len(peek(s).snaps) != 2 || peek(s).snaps[0].Name != "one" || peek(s).snaps[1].ID != "2" {
				t.Fatalf("snapshots: %+v", peek(s).snaps)
			}
			sound(t, s, false)
			if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{3}, 200<<10)), 30<<10, 0); err != nil {
				t.Fatal(err)
			}
			if err := s.Discard(req(), 256<<10, 128<<10); err != nil {
				t.Fatal(err)
			}
			sound(t, s, true)
			mustClose(t, s)
			qemuCheck(t, name)
			out := run(t, "qemu-io", "-f", "qcow2", "-c", "read -P 2 0 30k", "-c", "read -P 3 30k 200k", "-c", "read -P 0 256k 128k", name)
			run(t, "qemu-img", "snapshot", "-a", "one", name)
			out += run(t, "qemu-io", "-f", "qcow2", "-c", "read -P 1 0 512k", name)
			if strings.Contains(out, "erification failed") {
				t.Fatal(out)
			}
			qemuCheck(t, name)
		})
	}
}

// TestCreateLikeQemu compares what qemu-img says about images made by us and by it.
func TestCreateLikeQemu(t *testing.T) {
	tool(t, "qemu-img")
	cases := []struct {
		opt string
		o   CreateOptions
	}{
		{"compat=1.1", CreateOptions{Size: 1 << 30}},
		{"compat=0.10", CreateOptions{Size: 1 << 30, Version: "v2"}},
		{"cluster_size=512", CreateOptions{Size: 64 << 20, ClusterSize: ptr(uint64(512))}},
		{"cluster_size=2M,refcount_bits=1", CreateOptions{Size: 64 << 30, ClusterSize: ptr(uint64(2 << 20)), RefcountBits: ptr(int64(1))}},
		{"refcount_bits=64,lazy_refcounts=on", CreateOptions{Size: 0, RefcountBits: ptr(int64(64)), LazyRefcounts: true}},
		{"extended_l2=on", CreateOptions{Size: 1 << 30, Extended: true}},
		{"extended_l2=on,cluster_size=16k", CreateOptions{Size: 64 << 20, Extended: true, ClusterSize: ptr(uint64(16384))}},
		{"extended_l2=on,preallocation=metadata", CreateOptions{Size: 32 << 20, Extended: true, Preallocation: blk.PreallocMetadata}},
		{"compression_type=zstd", CreateOptions{Size: 512, CompressionType: "zstd"}},
		{"preallocation=metadata", CreateOptions{Size: 32 << 20, Preallocation: blk.PreallocMetadata}},
		{"preallocation=falloc,cluster_size=1k", CreateOptions{Size: 4 << 20, Preallocation: blk.PreallocFalloc, ClusterSize: ptr(uint64(1024))}},
		{"preallocation=full", CreateOptions{Size: 4<<20 + 512, Preallocation: blk.PreallocFull}},
		{"backing_file=base,backing_fmt=raw", CreateOptions{Size: 1 << 20, BackingFile: ptr("base"), BackingFormat: ptr("raw")}},
	}
	for _, c := range cases {
		t.Run(c.opt, func(t *testing.T) {
			dir := t.TempDir()
			infos := make([]string, 2)
			files := make([][]byte, 2)
			sizes := make([]int64, 2)
			for i := range infos {
				name := filepath.Join(dir, fmt.Sprint("d", i), "x.qcow2")
				if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(filepath.Dir(name), "base"), make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
				if i == 0 {
					run(t, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", c.opt, name, fmt.Sprint(c.o.Size))
				} else {
					if err := os.WriteFile(name, nil, 0o600); err != nil {
						t.Fatal(err)
					}
					if err := create(req(), openOS(t, name), c.o.schema()); err != nil {
						t.Fatal(err)
					}
				}
				qemuCheck(t, name)
				var x map[string]any
				if err := json.Unmarshal([]byte(run(t, "qemu-img", "info", "--output=json", name)), &x); err != nil {
					t.Fatal(err)
				}
				delete(x, "filename")
				delete(x, "actual-size")
				delete(x, "full-backing-filename")
				infos[i] = desc(x)
				st, _ := os.Stat(name)
				sizes[i] = st.Size()
				files[i], _ = os.ReadFile(name)
			}
			if c.o.Preallocation == "" && !bytes.Equal(files[0], files[1]) {
				t.Error("the files differ")
			}
			if infos[0] != infos[1] {
				t.Errorf("qemu-img info differs:\n%s\n%s", infos[0], infos[1])
			}
			if sizes[0] != sizes[1] {
				t.Logf("file sizes: theirs %d, ours %d", sizes[0], sizes[1])
			}
		})
	}
}
