package file

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
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
