package file

import (
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// TestLagAsksNoServer: a file system whose server does not answer must not hold up who looks for
// what moves.
func TestLagAsksNoServer(t *testing.T) {
	kept := fstatfs
	defer func() { fstatfs = kept }()
	for _, c := range []struct {
		what  string
		magic int64
		bound bool
	}{{"a file system in user space", unix.FUSE_SUPER_MAGIC, false}, {"a local one", unix.EXT4_SUPER_MAGIC, true}} {
		fstatfs = func(_ int, st *unix.Statfs_t) error { st.Type = c.magic; return nil }
		d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "f", 1<<20)})
		fstatfs = func(int, *unix.Statfs_t) error {
			t.Errorf("%s is asked what it is while the daemon ends", c.what)
			return unix.EIO
		}
		h := d.hold() // a call under way
		if _, bound := d.Lag(); bound != c.bound {
			t.Errorf("%s: bound %v", c.what, bound)
		}
		h.Release()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLag: what was written shows until a flush has brought it to the medium, and a call under way
// on a local file system binds the driver.
func TestLag(t *testing.T) {
	d := mustOpen(t, settings{name: mustFile(t, t.TempDir(), "f", 64<<20)})
	if d.memory {
		t.Skip("SKIPPED: the directory for temporary files is in memory")
	}
	if unix.Cachestat(uint(d.cur.Load().fd), &unix.CachestatRange{}, &unix.Cachestat_t{}, 0) != nil {
		t.Skip("SKIPPED: the kernel does not tell about one file")
	}
	if err := d.WriteAt(&blk.Req{}, blk.Buf(make([]byte, 1<<20)), 0, 0); err != nil {
		t.Fatal(err)
	}
	sync := d.fdatasync
	d.fdatasync = func(fd int) error {
		if n, bound := d.Lag(); n == 0 || !bound {
			t.Errorf("before the flush: lag %d, bound %v", n, bound)
		}
		return sync(fd)
	}
	if err := d.Flush(&blk.Req{}); err != nil {
		t.Fatal(err)
	}
	if n, bound := d.Lag(); n != 0 || bound {
		t.Errorf("after the flush: lag %d, bound %v", n, bound)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n, bound := d.Lag(); n != 0 || bound {
		t.Errorf("closed: lag %d, bound %v", n, bound)
	}
}
