package chardev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// pty is a pseudo terminal. Whoever opens its other end is a client, one at a time; there is
// no telling when that happens but by looking.
type pty struct {
	*front
	path   string // of the other end
	master *os.File
}

// ptyPoll is how often a pty without a client looks for one.
const ptyPoll = 100 * time.Millisecond

func openPty(f *front) (device, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("Failed to create PTY: %s", blk.ErrnoText(err))
	}
	d := &pty{front: f, master: master}
	if err := d.unlock(); err != nil {
		master.Close()
		return nil, fmt.Errorf("Failed to create PTY: %s", blk.ErrnoText(err))
	}
	f.spawn(d.run)
	return d, nil
}

// unlock makes the other end usable: raw, so that nothing is echoed or converted.
func (d *pty) unlock() error {
	if err := onFD(d.master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
		if err != nil {
			return err
		}
		d.path = "/dev/pts/" + strconv.Itoa(n)
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return err
		}
		makeRaw(t, false)
		t.Oflag &^= unix.OPOST
		return unix.IoctlSetTermios(fd, unix.TCSETS, t)
	}); err != nil {
		return err
	}
	// The master reports a hangup only after the other end was open once.
	other, err := os.OpenFile(d.path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	return other.Close()
}

func (d *pty) filename() string { return "pty:" + d.path }

func (d *pty) close() {
	d.end()
	d.master.Close()
}

// run serves one client after the other.
func (d *pty) run() {
	look := time.NewTicker(ptyPoll)
	defer look.Stop()
	for {
		if d.open() {
			d.serve(&ptyStream{d})
			_ = d.master.SetDeadline(time.Time{})
		}
		select {
		case <-d.ending:
			return
		case <-look.C:
		}
	}
}

// open tells whether somebody has the other end open.
func (d *pty) open() bool {
	p := []unix.PollFd{{Events: unix.POLLOUT}}
	err := onFD(d.master, func(fd int) error {
		p[0].Fd = int32(fd)
		_, err := unix.Poll(p, 0)
		return err
	})
	return err == nil && p[0].Revents&unix.POLLHUP == 0
}

// ptyStream is one client of a pty. Closing it leaves the terminal as it is.
type ptyStream struct{ d *pty }

func (s *ptyStream) Read(b []byte) (int, error) {
	n, err := s.d.master.Read(b)
	if errors.Is(err, syscall.EIO) { // the other end was closed
		err = io.EOF
	}
	return n, err
}

func (s *ptyStream) Write(b []byte) (int, error) { return s.d.master.Write(b) }

// Close makes a Read and Write under way return.
func (s *ptyStream) Close() error { return s.d.master.SetDeadline(time.Unix(1, 0)) }
