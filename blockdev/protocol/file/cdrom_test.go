package file

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// TestCdrom: a drive works while there is a disc in it, and shows the length of that one.
func TestCdrom(t *testing.T) {
	back := mustFile(t, t.TempDir(), "backing", 1<<20)
	dev := mustLoop(t, back)
	d := mustOpen(t, settings{name: dev, driver: "host_cdrom", device: true, drive: true})
	inserted := false
	c := &cdrom{d, func(int) bool { return inserted }}
	want := pattern(4096, 3)
	write := func() error { return c.WriteAt(bg, blk.Buf(want), 8192, 0) }
	got := make([]byte, 4096)
	read := func() error { return c.ReadAt(bg, blk.Buf(got), 8192, 0) }
	if err := errors.Join(change(t, d, formatWriter), c.Flush(bg)); err != nil {
		t.Fatal(err)
	}
	if err := write(); err != blk.ErrNoMedium {
		t.Error(err)
	}
	if err := read(); err != blk.ErrNoMedium {
		t.Error(err)
	}
	if err := c.Resize(context.Background(), 0, ""); err == nil || err.Error() != "No medium inserted" {
		t.Error(err)
	}
	if err := c.ReadAt(&blk.Req{Ctx: context.Background(), NoWait: true}, blk.Buf(got), 0, 0); err != blk.ErrWouldBlock {
		t.Errorf("asking the drive may wait: %v", err)
	}
	inserted = true
	err := errors.Join(write(), read(), c.Flush(bg), c.Resize(context.Background(), 0, ""))
	if err != nil || !bytes.Equal(got, want) {
		t.Error("other data", err)
	}
	if err := os.Truncate(back, 2<<20); err != nil {
		t.Fatal(err)
	}
	ctl, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ctl)
	if err := unix.IoctlSetInt(ctl, unix.LOOP_SET_CAPACITY, 0); err != nil {
		t.Fatal(err)
	}
	if n := c.Size(); n != 2<<20 {
		t.Errorf("the new disc has %d bytes", n)
	}
	if hasDisc(d.cur.Load().fd) {
		t.Error("a loop device is a drive")
	}
}
