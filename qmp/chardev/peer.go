package chardev

import (
	"errors"
	"io"
	"net"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/tlscreds"
)

// local tells whether all clients are processes of this machine.
func (d *server) local() bool {
	for _, l := range d.listeners {
		if _, ok := l.Addr().(*net.UnixAddr); !ok {
			return false
		}
	}
	return true
}

var errNoPeer = errors.New("not a unix socket")

// peerUID is the user of the process at the other end of a stream, as it was when it connected. One
// that has no number in our user namespace has the overflow number, 65534 as a rule.
func peerUID(c io.ReadWriteCloser) (uint32, error) {
	switch c := c.(type) {
	case *loggedStream:
		return peerUID(c.ReadWriteCloser)
	case *telnetConn:
		return peerUID(c.Conn)
	case *tlscreds.Conn:
		return peerUID(c.Below())
	case *net.UnixConn:
		raw, err := c.SyscallConn()
		if err != nil {
			return 0, err
		}
		var cred *unix.Ucred
		if e := raw.Control(func(fd uintptr) {
			cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		}); e != nil {
			return 0, e
		}
		if err != nil {
			return 0, err
		}
		return cred.Uid, nil
	}
	return 0, errNoPeer
}
