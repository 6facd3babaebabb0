package file

import (
	"context"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// mustLoop makes a loop device of a file, or skips where that is not allowed.
func mustLoop(t *testing.T, file string) string {
	t.Helper()
	ctl, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("SKIPPED: no loop devices: %v", err)
	}
	defer unix.Close(ctl)
	back, err := unix.Open(file, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(back)
	for range 10 { // others look for a free one, too
		n, err := unix.IoctlRetInt(ctl, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skipf("SKIPPED: no loop devices: %v", err)
		}
		dev := fmt.Sprintf("/dev/loop%d", n)
		fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Skipf("SKIPPED: %s: %v", dev, err)
		}
		err = unix.IoctlSetInt(fd, unix.LOOP_SET_FD, back)
		if err == unix.EBUSY {
			unix.Close(fd)
			continue
		}
		if err != nil {
			unix.Close(fd)
			t.Skipf("SKIPPED: %s: %v", dev, err)
		}
		t.Cleanup(func() {
			_ = unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
			unix.Close(fd)
		})
		return dev
	}
	t.Skip("SKIPPED: no free loop device")
	return ""
}

// TestDeviceLength: what becomes of a device elsewhere is noticed by the next resize.
func TestDeviceLength(t *testing.T) {
	back := mustFile(t, t.TempDir(), "backing", 4<<20)
	dev := mustLoop(t, back)
	d := mustOpen(t, settings{name: dev, driver: "host_device", device: true})
	ctl, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ctl)
	for _, c := range []struct{ now, ask, want int64 }{
		{8 << 20, 8<<20 + 1, 4 << 20}, {8 << 20, 6 << 20, 8 << 20}, {2 << 20, 4 << 20, 8 << 20}, {2 << 20, 0, 2 << 20},
	} {
		if err := os.Truncate(back, c.now); err != nil {
			t.Fatal(err)
		}
		if err := unix.IoctlSetInt(ctl, unix.LOOP_SET_CAPACITY, 0); err != nil {
			t.Fatal(err)
		}
		err := d.Resize(context.Background(), c.ask, blk.PreallocOff)
		if (err != nil) != (c.ask > c.now) || err != nil && err.Error() != "Cannot grow device files" || d.Size() != c.want {
			t.Errorf("%d of %d: %v, now %d", c.ask, c.now, err, d.Size())
		}
	}
}
