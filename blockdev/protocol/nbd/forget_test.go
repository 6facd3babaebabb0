package nbd

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/events/clock"
	"qblockd/graph/blk"
)

// openLayer is a layer that leaves all as it is.
type openLayer struct{ net.Conn }

func (openLayer) Handshake() error { return nil }

// A connection that is given up takes along what was not sent: it must not come to the server
// after later writes. One that is closed does not.
func TestForgotten(t *testing.T) {
	for what, c := range map[string]struct {
		why   error
		under bool // another layer, as TLS is
		want  error
	}{
		"silent":        {errSilent, false, syscall.ECONNRESET},
		"sibling":       {errSibling, false, syscall.ECONNRESET},
		"another layer": {errSibling, true, syscall.ECONNRESET},
		"closed":        {errClosed, false, nil},
	} {
		t.Run(what, func(t *testing.T) {
			ours, theirs := tcpPair(t)
			nc := net.Conn(ours)
			if c.under {
				layer := func(nc net.Conn) openLayer { return openLayer{nc} }
				l, err := tlscreds.NewConn(ours, layer, func(openLayer) string { return "" })
				if err != nil {
					t.Fatal(err)
				}
				nc = l
			}
			conn := newConn(nc, &all, clock.Real)
			ended, lost := make(chan error, 1), make(chan bool, 1)
			go conn.run(func(err error) { ended <- err })
			go func() {
				b := body{out: blk.Buf(make([]byte, 16<<20))}
				_, l, _ := conn.do(bg, nbdwire.Request{Cmd: nbdwire.CmdWrite, Len: 16 << 20}, b)
				lost <- l
			}()
			for end := time.Now().Add(patience); unsent(t, ours) < 64<<10; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the kernel takes nothing")
				}
			}
			conn.kill(c.why)
			if err := <-ended; err != c.why || !<-lost {
				t.Errorf("it ended by %v", err)
			}
			_ = theirs.SetReadDeadline(time.Now().Add(patience))
			if n, err := io.Copy(io.Discard, theirs); !errors.Is(err, c.want) {
				t.Errorf("%d bytes came, then %v", n, err)
			}
		})
	}
}

// unsent is how many bytes the kernel has that the far end has not taken.
func unsent(t *testing.T, nc *net.TCPConn) (n int) {
	t.Helper()
	raw, err := nc.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	err = raw.Control(func(fd uintptr) { n, failed = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
	if err = errors.Join(err, failed); err != nil {
		t.Fatal(err)
	}
	return n
}

// tcpPair is a connection whose far end takes little without being read.
func tcpPair(t *testing.T) (ours, theirs *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		if err := syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 32<<10); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}
