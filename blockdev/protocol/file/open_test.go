package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/driver"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func blkBuf(n int) blk.Vec { return blk.Buf(buf(n)) }

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	file := mustFile(t, dir, "f", 4096)
	before := openFDs(t)
	for _, c := range []struct {
		s    settings
		text string
	}{
		{settings{name: dir + "/none"}, "Could not open '" + dir + "/none': No such file or directory"},
		{settings{name: file + "/x"}, "Could not open '" + file + "/x': Not a directory"},
		{settings{name: dir}, "Could not open '" + dir + "': Is a directory"},
		{settings{name: dir, ro: true}, "'file' driver requires '" + dir + "' to be a regular file"},
		{settings{name: dir, auto: true}, "'file' driver requires '" + dir + "' to be a regular file"},
		{settings{name: "/dev/null"}, "'file' driver requires '/dev/null' to be a regular file"},
		{settings{name: "/dev/fdset/3"}, "Could not dup FD for /dev/fdset/3 flags 2: Function not implemented"},
		{
			settings{name: file, driver: "host_device", device: true},
			"'host_device' driver requires '" + file + "' to be either a character or block device",
		},
		{
			settings{name: "/proc/self/status", direct: true, ro: true},
			"Could not open '/proc/self/status': filesystem does not support O_DIRECT",
		},
	} {
		if c.s.driver == "" {
			c.s.driver = "file"
		}
		if _, err := openDisk(context.Background(), c.s); err == nil || err.Error() != c.text {
			t.Errorf("%+v: %v", c.s, err)
		}
	}
	if n := openFDs(t); n != before {
		t.Errorf("%d descriptors, before %d", n, before)
	}
	d := mustOpen(t, settings{name: file})
	native := types.BlockdevAioOptionsNative
	const refused = "aio=native was specified, but it requires cache.direct=on, which was not specified."
	if err := d.setAio(&types.BlockdevOptionsFile{Aio: &native}); err == nil || err.Error() != refused {
		t.Error(err)
	}
}

// TestFileWithoutEnd: what has no end is refused, as by QEMU: it would be written to at
// the addresses of a process.
func TestFileWithoutEnd(t *testing.T) {
	for _, ro := range []bool{true, false} {
		_, err := openDisk(context.Background(), settings{name: "/proc/self/mem", driver: "file", ro: ro})
		if err == nil || err.Error() != "Could not refresh total sector count: Invalid argument" {
			t.Errorf("read-only %v: %v", ro, err)
		}
	}
}

func TestCharacterDevice(t *testing.T) {
	d := mustOpen(t, settings{name: "/dev/zero", driver: "host_device", device: true, locks: true})
	if d.Size() != 0 {
		t.Errorf("size %d", d.Size())
	}
	if err := change(t, d, formatWriter); err != nil {
		t.Error(err)
	}
	if err := d.Flush(bg); err != nil {
		t.Error(err)
	}
	err := d.Resize(context.Background(), 4096, blk.PreallocOff)
	if err == nil || err.Error() != "Cannot grow device files" {
		t.Error(err)
	}
	err = d.Resize(context.Background(), 0, blk.PreallocFull)
	if err == nil || err.Error() != "Preallocation mode 'full' unsupported for this non-regular file" {
		t.Error(err)
	}
	if e, err := d.Status(bg, 0, 512); err != nil || !e.Data {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestResize(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		d := open("r", 0)
		ctx := context.Background()
		for _, s := range []struct {
			size int64
			m    blk.Prealloc
			text string
			used int64 // allocated at least
		}{
			{1 << 20, blk.PreallocOff, "", 0},
			{512 << 10, blk.PreallocFull, "Cannot use preallocation for shrinking files", 0},
			{512 << 10, blk.PreallocOff, "", 0},
			{2 << 20, blk.PreallocFalloc, "", 1 << 20},
			{3 << 20, blk.PreallocFull, "", 2 << 20},
			{4 << 20, blk.PreallocMetadata, "Unsupported preallocation mode: metadata", 0},
			{-1, blk.PreallocOff, "Could not resize file: Invalid argument", 0},
		} {
			old := d.Size()
			err := d.Resize(ctx, s.size, s.m)
			if s.text != "" {
				if err == nil || err.Error() != s.text || d.Size() != old {
					t.Errorf("%+v: %v, size %d", s, err, d.Size())
				}
				continue
			}
			st, serr := os.Stat(d.name)
			if err != nil || serr != nil || st.Size() != s.size || d.Size() != s.size {
				t.Errorf("%+v: %v, size %d", s, err, d.Size())
			}
			if n, _ := d.ActualSize(); n < s.used {
				t.Errorf("%+v: %d allocated", s, n)
			}
		}
		cctx, cancel := context.WithCancel(ctx)
		cancel()
		if err := d.Resize(cctx, 4<<20, blk.PreallocFull); err == nil || d.Size() != 3<<20 {
			t.Errorf("cancelled: %v", err)
		}
		if st, _ := os.Stat(d.name); st.Size() != 3<<20 {
			t.Errorf("the old length was not restored: %d", st.Size())
		}
	})
}

func TestCreate(t *testing.T) {
	ctx := context.Background()
	for _, dir := range places(t) {
		name := filepath.Join(dir, "new")
		for _, m := range []types.PreallocMode{"off", "falloc", "full", "off"} {
			yes, hint := true, uint64(65536)
			o := &types.BlockdevCreateOptionsFile{
				Filename: name, Size: 300000, Preallocation: &m, Nocow: &yes, ExtentSizeHint: &hint,
			}
			if err := Create(ctx, o, nil); err != nil {
				t.Fatalf("%s: %v", m, err)
			}
			st, err := os.Stat(name)
			if err != nil || st.Size() != 300000 {
				t.Errorf("%s: %v %v", m, st, err)
			}
			if used := st.Sys().(*syscall.Stat_t).Blocks * 512; (m != "off") != (used >= 290000) {
				t.Errorf("%s: %d bytes allocated", m, used)
			}
			b, err := os.ReadFile(name)
			if err != nil || strings.Trim(string(b), "\x00") != "" {
				t.Errorf("%s: not zero, %v", m, err)
			}
			if err := os.WriteFile(name, []byte("old contents"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	metadata, huge := types.PreallocModeMetadata, uint64(1<<32)
	name := filepath.Join(t.TempDir(), "x")
	for text, o := range map[string]*types.BlockdevCreateOptionsFile{
		"Could not create '/nonexistent-dir/x': No such file or directory": {Filename: "/nonexistent-dir/x"},
		"Could not create '/dev': Is a directory":                          {Filename: "/dev"},
		"Could not resize file: Invalid argument":                          {Filename: name, Size: 1<<64 - 1},
		"Unsupported preallocation mode: metadata":                         {Filename: name, Size: 512, Preallocation: &metadata},
		"Extent size hint is too large":                                    {Filename: name, Size: 512, ExtentSizeHint: &huge},
	} {
		if err := Create(ctx, o, nil); err == nil || err.Error() != text {
			t.Errorf("want %q, got %v", text, err)
		}
	}
	// Who uses the file keeps it.
	d := mustOpen(t, settings{name: name, locks: true})
	if err := change(t, d, formatWriter); err != nil {
		t.Fatal(err)
	}
	err := Create(ctx, &types.BlockdevCreateOptionsFile{Filename: name}, nil)
	if err == nil || err.Error() != `Failed to get "write" lock` {
		t.Error(err)
	}
}

// TestLoopDevice runs the block device paths where the host lets us make one.
func TestLoopDevice(t *testing.T) {
	dev := mustLoop(t, mustFile(t, t.TempDir(), "backing", 4<<20))
	for _, direct := range []bool{false, true} {
		d := mustOpen(t, settings{name: dev, driver: "host_device", device: true, direct: direct, locks: true})
		if d.Size() != 4<<20 || d.Caps().ZeroInit {
			t.Errorf("size %d", d.Size())
		}
		if err := change(t, d, formatWriter); err != nil {
			t.Fatal(err)
		}
		want := pattern(64<<10, 5)
		if err := d.WriteAt(bg, blk.Buf(want), 1<<20, blk.FUA); err != nil {
			t.Fatal(err)
		}
		for _, f := range []blk.Flags{blk.MayUnmap, 0} {
			err := d.Zero(bg, 1<<20, 4096, f)
			if err != nil {
				t.Logf("zero %v: %v", f, err)
				continue
			}
			if got := mustRead(t, d, 1<<20, 8192); got[4095] != 0 || got[4096] != 5 {
				t.Errorf("zero %v: wrong bytes", f)
			}
		}
		if err := d.Zero(bg, 0, 4096, blk.NoFallback); err == nil {
			t.Error("zeroes may be written by the kernel, which is no faster")
		}
		if err := d.Discard(bg, 2<<20, 1<<20); err != nil {
			t.Logf("discard: %v", err)
		}
		if err := d.WriteAt(bg, blkBuf(4096), 4<<20, 0); err != unix.ENOSPC {
			t.Errorf("past the end: %v", err)
		}
		if err := d.Resize(context.Background(), 1<<20, blk.PreallocOff); err != nil || d.Size() != 4<<20 {
			t.Errorf("shrink: %v", err)
		}
		if err := d.Flush(bg); err != nil {
			t.Error(err)
		}
		d.Close()
	}
}

// Kernels that cannot leave out the links of /proc: links lead where their words say.
func TestFindByText(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/file", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	open, err := os.Open(dir + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := errors.Join(os.Symlink("file", dir+"/link"), unix.Mkfifo(dir+"/fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]driver.FoundFile{
		dir + "/file": {Path: dir + "/file", Regular: true},
		dir + "/link": {Path: dir + "/file", Regular: true},
		dir + "/fifo": {Path: dir + "/fifo"},
		fmt.Sprintf("/proc/self/fd/%d", open.Fd()): {Path: dir + "/file", Regular: true},
		"/proc/version": {Path: "/proc/version", Regular: true, Kernel: true},
	} {
		fd, err := findByText(name, unix.O_PATH|unix.O_CLOEXEC)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want.Name = name
		if got, err := describe(fd, name); err != nil || *got != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		unix.Close(fd)
	}
	if _, err := findByText(dir+"/missing", unix.O_PATH); err != unix.ENOENT {
		t.Errorf("missing: %v", err)
	}
}
