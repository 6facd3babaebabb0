package tlscreds

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

const (
	// holdSize is how many bytes of records are given to the kernel at once.
	holdSize = 256 << 10
	// aheadSize is how much is taken from the kernel at once.
	aheadSize = 64 << 10
)

// wire is the connection below TLS. What writes records writes them one by one; those of one write
// of its user are held back until they are many.
type wire struct {
	net.Conn
	raw syscall.RawConn // nil: not a socket

	// What was taken from the kernel and not from here, once ahead is set; the reader's.
	ahead []byte
	r     int
	w     int
	ended bool // nothing more comes from the kernel

	closing atomic.Bool

	mu sync.Mutex
	// records that are held back; nil: none are
	held *blk.Buffer // +checklocks:mu
	n    int         // +checklocks:mu
	// of writing what was held back
	err error // +checklocks:mu
}

func newWire(nc net.Conn) *wire {
	w := &wire{Conn: nc}
	if s, ok := nc.(syscall.Conn); ok {
		w.raw, _ = s.SyscallConn()
	}
	return w
}

// Read takes from the kernel what it has, not just a record.
func (w *wire) Read(b []byte) (int, error) {
	if w.ahead == nil {
		return w.take(b)
	}
	if w.r == w.w {
		if len(b) >= len(w.ahead) {
			return w.take(b)
		}
		n, err := w.take(w.ahead)
		if w.r, w.w = 0, n; n == 0 {
			return 0, err
		}
	}
	n := copy(b, w.ahead[w.r:w.w])
	w.r += n
	return n, nil
}

func (w *wire) take(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	w.ended = w.ended || err == io.EOF
	return n, err
}

// Write sends records, or holds them back.
func (w *wire) Write(b []byte) (int, error) {
	if w.closing.Load() {
		return w.last(b)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held == nil {
		return w.Conn.Write(b)
	}
	if w.n+len(b) > len(w.held.B) {
		w.sendLocked()
	}
	if w.err != nil {
		return 0, w.err
	}
	if len(b) > len(w.held.B) {
		return w.Conn.Write(b)
	}
	w.n += copy(w.held.B[w.n:], b)
	return len(b), nil
}

// +checklocks:w.mu
func (w *wire) sendLocked() {
	if w.n > 0 && w.err == nil {
		_, w.err = w.Conn.Write(w.held.B[:w.n])
	}
	w.n = 0
}

// hold makes Write hold records back. release sends them.
func (w *wire) hold() {
	b := blk.GetBuf(holdSize, 0)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = b
}

func (w *wire) release() error {
	w.mu.Lock()
	w.sendLocked()
	b, err := w.held, w.err
	w.held = nil
	w.mu.Unlock()
	blk.PutBuf(b)
	return err
}

// last sends what comes at the end if that can be done at once.
func (w *wire) last(b []byte) (n int, err error) {
	if w.raw == nil {
		return 0, net.ErrClosed
	}
	cerr := w.raw.Control(func(fd uintptr) {
		n, err = unix.SendmsgN(int(fd), b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
	if cerr != nil {
		err = cerr
	}
	return n, err
}

// Close leaves the connection to its user.
func (w *wire) Close() error { return nil }

// SetWriteDeadline: what comes at the end does not wait, and must not make others wait.
func (w *wire) SetWriteDeadline(t time.Time) error {
	if w.closing.Load() {
		return nil
	}
	return w.Conn.SetWriteDeadline(t)
}
