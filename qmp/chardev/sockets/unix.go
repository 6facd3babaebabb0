// Package sockets makes the listening sockets of the daemon, those of character devices as well as
// those of exports, and watches over who accepts from them.
package sockets

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// UnixAddr is where a unix socket listens, or is connected to.
type UnixAddr struct {
	// Path is in the file system, or the name in the abstract name space. It may fill the address
	// to the last byte. Empty, and not abstract: to listen on, a new file in the directory for
	// temporary ones.
	Path string
	// Abstract: Path is no file. Padded: the name goes on with zero bytes to the end.
	Abstract, Padded bool
	// Mode is that of the socket file; 0 means 0600.
	Mode os.FileMode
}

// Backlog is how many clients may wait to be accepted; the kernel applies its own bound
// (net.core.somaxconn), which is what SOMAXCONN was meant to be. With a short queue a client that
// does not block in connect(2) is refused when many come at once.
const Backlog = 4096

const sunPathLen = len(unix.RawSockaddrUnix{}.Path)

// Check refuses what is too long for an address.
func (a UnixAddr) Check() error {
	most := sunPathLen
	if a.Abstract {
		most-- // the zero byte in front
	}
	if len(a.Path) > most {
		return blk.WithHint(fmt.Errorf("UNIX socket path '%s' is too long", a.Path),
			fmt.Sprintf("Path must be less than %d bytes", most))
	}
	return nil
}

// raw is the address as the kernel takes it, and its length. Packages net, syscall and unix take no
// path that fills it, take an @ for an abstract name, and cannot pad one.
func (a UnixAddr) raw() (sa unix.RawSockaddrUnix, n int) {
	sa.Family = unix.AF_UNIX
	name := a.Path
	if n = sunPathLen; a.Abstract {
		if name = "\x00" + name; !a.Padded {
			n = len(name)
		}
	}
	for i := range len(name) {
		sa.Path[i] = int8(name[i])
	}
	return sa, 2 + n
}

func (a UnixAddr) call(trap uintptr, fd int) error {
	sa, n := a.raw()
	if _, _, errno := unix.Syscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(n)); errno != 0 {
		return errno
	}
	return nil
}

func newUnix() (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, blk.Errnof(err, "Failed to create Unix socket")
	}
	return fd, nil
}

// ListenUnix makes a listening unix socket. A socket that is in its place is removed, any other
// file is left alone. Nobody can connect before the file has its mode. The file is removed when the
// listener is closed, unless it was replaced by then. path is where it listens.
func ListenUnix(a UnixAddr) (l net.Listener, path string, err error) {
	if err := a.Check(); err != nil {
		return nil, "", err
	}
	if a.Path == "" && !a.Abstract {
		if a.Path, err = temporary(); err != nil {
			return nil, "", err
		}
	}
	fd, err := newUnix()
	if err != nil {
		return nil, "", err
	}
	f := os.NewFile(uintptr(fd), a.Path)
	defer f.Close() // listeners have duplicates
	if a.Abstract {
		if err := a.call(unix.SYS_BIND, fd); err != nil {
			return nil, "", blk.Errnof(err, "Failed to bind socket to %s", a.Path)
		}
		l, err = listenFile(f, fd)
		return l, a.Path, err
	}
	l, err = listenPath(f, fd, a)
	return l, a.Path, err
}

// temporary is the name of a file that is not there.
func temporary() (string, error) {
	f, err := os.CreateTemp("", "qemu-socket-")
	if err != nil {
		return "", blk.Errnof(err, "Failed to make a temporary socket %s", os.TempDir())
	}
	f.Close()
	return f.Name(), os.Remove(f.Name())
}

func listenPath(f *os.File, fd int, a UnixAddr) (net.Listener, error) {
	mode := a.Mode.Perm()
	if mode == 0 {
		mode = 0o600
	}
	if st, err := os.Lstat(a.Path); err == nil && (st.Mode().Type() == os.ModeSocket || st.IsDir()) {
		if err := unix.Unlink(a.Path); err != nil && err != unix.ENOENT {
			return nil, blk.Errnof(err, "Failed to unlink socket %s", a.Path)
		}
	}
	// Linux gives the file that bind makes the mode of the socket, less the umask: never more
	// than wanted, for however short a time.
	_ = unix.Fchmod(fd, uint32(mode))
	if err := a.call(unix.SYS_BIND, fd); err != nil {
		return nil, blk.Errnof(err, "Failed to bind socket to %s", a.Path)
	}
	fl := &fileListener{path: a.Path}
	if abs, err := filepath.Abs(a.Path); err == nil {
		fl.path = abs // the daemon may change its directory
	}
	if st, err := os.Lstat(a.Path); err == nil {
		fl.made = st
	}
	err := unix.Chmod(a.Path, uint32(mode))
	if err != nil {
		err = blk.Errnof(err, "Failed to set the mode of socket %s", a.Path)
	} else {
		fl.Listener, err = listenFile(f, fd)
	}
	if err != nil {
		fl.remove()
		return nil, err
	}
	return fl, nil
}

// listenFile makes the bound socket f, which is fd, listen.
func listenFile(f *os.File, fd int) (net.Listener, error) {
	if err := unix.Listen(fd, Backlog); err != nil {
		return nil, blk.Errnof(err, "Failed to listen on socket")
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, blk.Errnof(err, "Failed to listen on socket")
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // fileListener does it, if the file is still ours
	}
	return l, nil
}

// fileListener removes its socket file when it is closed, unless that was replaced.
type fileListener struct {
	net.Listener
	path string
	made os.FileInfo
	once sync.Once
}

func (l *fileListener) remove() {
	if st, err := os.Lstat(l.path); err == nil && l.made != nil && os.SameFile(st, l.made) {
		os.Remove(l.path)
	}
}

// Close implements net.Listener.
func (l *fileListener) Close() error {
	l.once.Do(l.remove)
	return l.Listener.Close()
}

// DialUnix connects. It does not wait: a server whose queue is full refuses.
func DialUnix(a UnixAddr) (net.Conn, error) {
	if err := a.Check(); err != nil {
		return nil, err
	}
	fd, err := newUnix()
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), a.Path)
	defer f.Close() // the connection has a duplicate
	err = unix.ECONNREFUSED
	if a.Path != "" || a.Abstract {
		err = a.call(unix.SYS_CONNECT, fd)
	}
	var c net.Conn
	if err == nil {
		c, err = net.FileConn(f)
	}
	if err != nil {
		return nil, blk.Errnof(err, "Failed to connect to '%s'", a.Path)
	}
	return c, nil
}

// queueSize is the size that is asked of a socket's send queue, in bytes; the kernel may give less.
const queueSize = 4 << 20

// GrowQueue makes messages of some MiB go in one go through a unix socket; without privilege the
// system's limit holds. TCP finds its own size.
func GrowQueue(nc net.Conn) {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { // the size is not needed
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, queueSize) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, queueSize)
		}
	})
}

// ListenAt is ListenUnix for an address as QMP has it.
func ListenAt(a *types.UnixSocketAddress, mode os.FileMode) (net.Listener, error) {
	l, _, err := ListenUnix(UnixAddr{
		Path:     a.Path,
		Abstract: types.Or(a.Abstract, false),
		Padded:   !types.Or(a.Tight, true),
		Mode:     mode,
	})
	return l, err
}

// ListenFD listens on the socket that the process inherited as the descriptor of that number, which
// the listener then owns.
func ListenFD(number string) (net.Listener, error) {
	fd, err := strconv.Atoi(number)
	if err != nil || fd < 0 {
		return nil, fmt.Errorf("Unable to parse FD number %s", number)
	}
	if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		return nil, fmt.Errorf("File descriptor '%d' is not a socket", fd)
	}
	if err := unix.Listen(fd, Backlog); err != nil {
		return nil, blk.Errnof(err, "Failed to listen on fd socket")
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close() // the listener has a duplicate
	l, err := net.FileListener(f)
	if err != nil {
		return nil, blk.Errnof(err, "Failed to listen on fd socket")
	}
	return l, nil
}
