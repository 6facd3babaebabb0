package chardev

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"

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
	raw, err := tty.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			var t syscall.Termios
			if ioctl(int(fd), syscall.TCGETS, unsafe.Pointer(&t)) != nil {
				return
			}
			makeRaw(&t, true)
			t.Oflag |= syscall.OPOST
			t.Cflag &^= syscall.CSTOPB | crtscts | cbaud
			t.Cflag |= syscall.CLOCAL | syscall.CREAD | syscall.B115200
			t.Ispeed, t.Ospeed = syscall.B115200, syscall.B115200
			_ = ioctl(int(fd), syscall.TCSETS, unsafe.Pointer(&t))
		})
	}
	if err != nil {
		tty.Close()
		return nil, fmt.Errorf("Could not open '%s': %s", o.Device, blk.ErrnoText(err))
	}
	return newFiles(f, "serial", &fdStream{in: tty, out: tty}), nil
}

// The parts of c_cflag that package syscall does not name: the speed, flow control by wire.
const (
	cbaud   = 0o10017
	crtscts = 0x80000000
)

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
	if err := ioctl(fd, ppClaim, nil); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("not a parallel port: %s", blk.ErrnoText(err))
	}
	return &parallel{f, os.NewFile(uintptr(fd), o.Device)}, nil
}

func (*parallel) filename() string { return "parallel" }

func (d *parallel) close() {
	_ = ioctl(int(d.port.Fd()), ppRelease, nil)
	d.port.Close()
	d.end()
}
