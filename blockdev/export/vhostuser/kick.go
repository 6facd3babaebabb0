package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// kick is the descriptor by which a driver says that there is something in a ring. It is waited for
// by way of an epoll of its own that looks for nothing but input: where the runtime's polls an
// eventfd itself, each read of that makes it writable, which would wake a thread once more.
type kick struct {
	fd   int // nonblocking
	ep   *os.File
	raw  syscall.RawConn
	look func(uintptr) bool
	err  error
}

// newKick takes fd, also when it fails.
func newKick(fd int) (*kick, error) {
	ep, err := newPoll(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("a descriptor for kicks cannot be waited for: %w", err)
	}
	k := &kick{fd: fd, ep: os.NewFile(uintptr(ep), "epoll")}
	if k.raw, err = k.ep.SyscallConn(); err != nil {
		k.close()
		return nil, err
	}
	k.look = func(uintptr) bool {
		var b [8]byte
		n, err := unix.Read(k.fd, b[:])
		switch {
		case err == unix.EAGAIN || err == unix.EINTR:
			return false
		case err == nil && n == 0:
			err = errors.New("the descriptor for kicks has come to an end")
		}
		k.err = err
		return true
	}
	return k, nil
}

// newPoll makes an epoll that is readable when fd is.
func newPoll(fd int) (ep int, err error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return -1, err
	}
	if ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return -1, err
	}
	err = unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN})
	if err == nil {
		err = unix.SetNonblock(ep, true) // so that package os has the runtime poll it
	}
	if err != nil {
		unix.Close(ep)
		return -1, err
	}
	return ep, nil
}

// wait waits for a kick. Errors: there will be none any more; os.ErrDeadlineExceeded after wake.
func (k *kick) wait() error {
	k.err = nil
	if err := k.raw.Read(k.look); err != nil {
		return err
	}
	return k.err
}

var longAgo = time.Unix(1, 0)

// wake ends wait, and makes later calls end at once, until rearm. Callable from anywhere.
func (k *kick) wake() { k.ep.SetReadDeadline(longAgo) }

func (k *kick) rearm() { k.ep.SetReadDeadline(time.Time{}) }

func (k *kick) close() {
	k.ep.Close()
	unix.Close(k.fd)
}
