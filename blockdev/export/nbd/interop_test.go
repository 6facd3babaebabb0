package nbd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/blockdev/nbdwire"
)

// run runs an outside client; where that is missing the test is skipped.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	exe, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIPPED: %s is not installed", name)
	}
	cmd := exec.Command(exe, args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func uri(path, export string) string { return "nbd+unix:///" + export + "?socket=" + path }

func TestInteropNbdinfo(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	s, _, path := server(t, d, Options{})
	ro := newFileDevice(t, 65536)
	spec := Spec{Name: "ro", Description: "a text", HasDescription: true, Size: 65536, ReadOnly: true, Device: ro}
	if _, err := s.Add(spec); err != nil {
		t.Fatal(err)
	}
	c := open(t, path, nbdwire.Structured)
	c.do(wr(64<<10, 64<<10), pattern(64<<10, 1)...)
	if got := run(t, "nbdinfo", "--size", uri(path, "x")); got != "1048576\n" {
		t.Error(got)
	}
	got := strings.Join(strings.Fields(run(t, "nbdinfo", "--map", uri(path, "x"))), " ")
	if got != "0 65536 3 hole,zero 65536 65536 0 data 131072 917504 3 hole,zero" {
		t.Error(got)
	}
	got = strings.Join(strings.Fields(run(t, "nbdinfo", "--map=qemu:allocation-depth", uri(path, "x"))), " ")
	if got != "0 1048576 1 local" {
		t.Error(got)
	}
	list := run(t, "nbdinfo", "--list", uri(path, ""))
	for _, want := range []string{`export="x":`, `export="ro":`, "description: a text", "is_read_only: true", "can_df: true",
		"can_fast_zero: true", "can_multi_conn: true", "block_size_minimum: 1\n", "block_size_preferred: 4096", "block_size_maximum: 33554432",
		"base:allocation", "qemu:allocation-depth"} {
		if !strings.Contains(list, want) {
			t.Errorf("no %q in\n%s", want, list)
		}
	}
}

func TestInteropCopy(t *testing.T) {
	const size = 24 << 20
	want := make([]byte, size)
	copy(want[1<<20:], pattern(5<<20+777, 1))
	copy(want[20<<20:], pattern(3<<20, 2))
	src := filepath.Join(t.TempDir(), "src")
	if err := os.WriteFile(src, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, workers := range []bool{false, true} {
		d := newFileDevice(t, size)
		d.wouldBlock.Store(workers)
		_, _, path := server(t, d, Options{})
		run(t, "nbdcopy", src, uri(path, "x"))
		got := make([]byte, size)
		d.f.ReadAt(got, 0)
		if !bytes.Equal(got, want) {
			t.Errorf("workers=%v: nbdcopy to the export: data differ", workers)
		}
		dst := filepath.Join(t.TempDir(), "dst")
		run(t, "nbdcopy", uri(path, "x"), dst)
		if got, _ := os.ReadFile(dst); !bytes.Equal(got, want) {
			t.Errorf("workers=%v: nbdcopy from the export: data differ", workers)
		}
		dst += "2"
		run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri(path, "x"), dst)
		if got, _ := os.ReadFile(dst); !bytes.Equal(got, want) {
			t.Errorf("workers=%v: qemu-img from the export: data differ", workers)
		}
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, uri(path, "x"))
		out := run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 3M 100k", "-c", "write -z -u 4M 1M", "-c", "write -f -P 8 10M 1k",
			"-c", "discard 21M 64k", "-c", "flush", "-c", "read -P 7 3M 100k", "-c", "read -P 0 4M 1M", "-c", "read -P 8 10M 1k", uri(path, "x"))
		if strings.Contains(out, "failed") {
			t.Error(out)
		}
	}
}

// libnbd's own checks: strict about the protocol, with chunks of reads seen one by one.
func TestInteropLibnbd(t *testing.T) {
	const python = "/usr/bin/python3"
	if exec.Command(python, "-c", "import nbd").Run() != nil {
		t.Skip("SKIPPED: the Python module of libnbd is not installed")
	}
	d := newFileDevice(t, 4<<20)
	_, _, path := server(t, d, Options{})
	script := fmt.Sprintf(`
import nbd, os
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(%q)
data = bytes((i * 7) & 255 for i in range(1 << 20))
h.pwrite(data, 1 << 20, nbd.CMD_FLAG_FUA)
got = bytearray(4 << 20)
holes = []
def chunk(buf, off, status, err):
    if status == nbd.READ_DATA: got[off:off+len(buf)] = buf
    elif status == nbd.READ_HOLE: holes.append(off)
    else: raise Exception("error chunk")
    return 0
h.pread_structured(4 << 20, 0, chunk)
assert bytes(got) == bytes(1 << 20) + data + bytes(2 << 20)
assert holes == [0, 2 << 20], holes
one = []
h.pread_structured(4 << 20, 0, lambda b, o, s, e: one.append(s) or 0, nbd.CMD_FLAG_DF)
assert one == [nbd.READ_DATA], one
ext = []
h.block_status(4 << 20, 0, lambda m, o, e, err: ext.extend(e) or 0)
assert ext == [1 << 20, 3, 1 << 20, 0, 2 << 20, 3], ext
h.zero(1 << 20, 1 << 20)
assert h.pread(1 << 20, 1 << 20) == bytes(1 << 20)
h.trim(1 << 20, 0); h.cache(1 << 20, 0); h.flush()
for f in (lambda: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO), lambda: h.aio_pread(nbd.Buffer(512), 1)):
    try: f()
    except nbd.Error as e: assert e.errno in ("ENOTSUP", "EOPNOTSUPP"), e.errno
h.set_strict_mode(0)
for f in (lambda: h.pread(512, 4 << 20), lambda: h.pwrite(bytes(512), (4 << 20) - 1), lambda: h.block_status(0, 0, lambda *a: 0)):
    try: f(); raise Exception("no error")
    except nbd.Error as e: assert e.errno == "EINVAL", e.errno
h.shutdown()
print("ok")
`, uri(path, "x"))
	if got := run(t, python, "-c", script); got != "ok\n" {
		t.Error(got)
	}
}
