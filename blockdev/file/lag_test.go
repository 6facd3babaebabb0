package file

import (
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// TestLag: what was written shows until a flush has brought it to the medium, and a call under way on a local file system binds the driver.
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
