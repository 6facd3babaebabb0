package qmp

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pollable is what network connections and files that the runtime polls have in common.
type pollable interface {
	io.ReadWriteCloser
	syscall.Conn
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// NewConn makes a Conn of a stream. A network connection, or a file of a kind for which
// waiting does not hold a thread (pipe, terminal, socket, opened non-blocking), becomes a
// TryWriter and a HangupWaiter; anything else is used as it is.
func NewConn(c io.ReadWriteCloser) Conn {
	if _, ok := c.(TryWriter); ok {
		return c
	}
	p, ok := c.(pollable)
	if !ok || p.SetWriteDeadline(time.Time{}) != nil {
		return c
	}
	raw, err := p.SyscallConn()
	if err != nil {
		return c
	}
	f := &polledConn{pollable: p, raw: raw}
	f.tryWrite = f.writeOnce
	return f
}

// polledConn is a stream whose file descriptor the runtime polls.
type polledConn struct {
	pollable
	raw      syscall.RawConn
	stopping sync.Mutex  // held while stopped and the deadline that goes with it change
	stopped  atomic.Bool // StopWait was called
	tryWrite func(fd uintptr) bool

	// Arguments and results of tryWrite; owned by the one goroutine in TryWrite.
	buf []byte
	n   int
	err error
}

// Lingers passes the question on to the stream.
func (c *polledConn) Lingers() bool {
	l, ok := c.pollable.(Lingerer)
	return ok && l.Lingers()
}

// TryWrite implements TryWriter.
func (c *polledConn) TryWrite(b []byte) (int, error) {
	c.buf, c.n, c.err = b, 0, nil
	err := c.raw.Write(c.tryWrite)
	c.buf = nil
	if err == nil {
		err = c.err
	}
	return c.n, err
}

func (c *polledConn) writeOnce(fd uintptr) bool {
	for c.n < len(c.buf) {
		n, err := syscall.Write(int(fd), c.buf[c.n:])
		if n > 0 {
			c.n += n
		}
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return true
		case err != nil:
			c.err = err
			return true
		case n == 0:
			return true
		}
	}
	return true
}

// WaitHangup implements HangupWaiter: poll's POLLHUP, which for a socket means that nothing can
// be sent in either direction, and POLLERR.
func (c *polledConn) WaitHangup() bool {
	hup := false
	err := c.raw.Read(func(fd uintptr) bool {
		if c.stopped.Load() {
			return true
		}
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		hup = err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
		return hup
	})
	c.stopping.Lock()
	defer c.stopping.Unlock()
	if c.stopped.Swap(false) {
		_ = c.SetReadDeadline(time.Time{}) // the connection works or is closed
	} else if err != nil {
		return true // closed under us
	}
	return hup
}

// StopWait implements HangupWaiter.
func (c *polledConn) StopWait() {
	// Both or none is seen by WaitHangup as it ends, else the deadline would stay and end the
	// connection.
	c.stopping.Lock()
	defer c.stopping.Unlock()
	c.stopped.Store(true)
	// Makes the runtime call WaitHangup's function, or return at once, also if it is not there yet.
	_ = c.SetReadDeadline(time.Unix(1, 0))
}
