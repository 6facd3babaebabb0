package chardev

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// openSerial opens a serial line: 115200 bits per second, 8 bits, no parity, one stop bit. A file
// that is no terminal is taken as it is.
func openSerial(o *types.ChardevHostdev, f *front) (device, error) {
	tty, err := openHost(o.Device, os.O_RDWR|syscall.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	if err := onFD(tty, func(fd int) error {
		if t, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
			makeRaw(t, true)
			t.Oflag |= unix.OPOST
			t.Cflag &^= unix.CSTOPB | unix.CRTSCTS | unix.CBAUD
			t.Cflag |= unix.CLOCAL | unix.CREAD | unix.B115200
			t.Ispeed, t.Ospeed = unix.B115200, unix.B115200
			_ = unix.IoctlSetTermios(fd, unix.TCSETS, t)
		}
		return nil
	}); err != nil {
		tty.Close()
		return nil, fmt.Errorf("Could not open '%s': %s", o.Device, blk.ErrnoText(err))
	}
	return newStream(f, "serial", &fdStream{in: tty, out: tty}), nil
}

// parallel is a claimed parallel port. It is driven by requests that no user here makes, and
// carries no stream.
type parallel struct {
	*front
	port *os.File
}

// Requests of linux/ppdev.h.
const (
	ppClaim   = 0x708b
	ppRelease = 0x708c
)

func openParallel(o *types.ChardevHostdev, f *front) (device, error) {
	fd, err := syscall.Open(o.Device, os.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("Could not open '%s': %s", o.Device, blk.ErrnoText(err))
	}
	if err := unix.IoctlSetInt(fd, ppClaim, 0); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("not a parallel port: %s", blk.ErrnoText(err))
	}
	return &parallel{f, os.NewFile(uintptr(fd), o.Device)}, nil
}

func (*parallel) filename() string { return "parallel" }

func (d *parallel) close() {
	_ = unix.IoctlSetInt(int(d.port.Fd()), ppRelease, 0)
	d.port.Close()
	d.end()
}
