package chardev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func isTrue(b *bool) bool  { return b != nil && *b }
func isFalse(b *bool) bool { return b != nil && !*b }

// maxUnixPath is the size of sun_path.
const maxUnixPath = 108

// unixName checks a path or abstract name and returns it as the net package wants it.
func unixName(a *types.UnixSocketAddress) (string, error) {
	limit := maxUnixPath
	if isTrue(a.Abstract) {
		limit--
	}
	if len(a.Path) > limit {
		return "", fmt.Errorf("UNIX socket path '%s' is too long", a.Path)
	}
	if !isTrue(a.Abstract) {
		return a.Path, nil
	}
	name := "\x00" + a.Path
	if isFalse(a.Tight) { // the name is the whole of sun_path
		name += strings.Repeat("\x00", maxUnixPath-len(name))
	}
	return name, nil
}

// unixSuffix is what a file name shows behind the path.
func unixSuffix(a *types.UnixSocketAddress) string {
	switch {
	case !isTrue(a.Abstract):
		return ""
	case isFalse(a.Tight):
		return ",abstract=on"
	}
	return ",abstract=on,tight=on"
}

// backlog is how many clients may wait to be accepted; the kernel applies its own bound (net.core.somaxconn). With a short
// queue a client that does not block in connect(2) is refused when many come at once.
const backlog = 4096

// listenUnix listens on a path, removing what is there; the socket has its mode from the
// moment it exists. remove takes it away again, unless somebody else's is there by then.
func listenUnix(a *types.UnixSocketAddress, mode os.FileMode) (l net.Listener, path string, remove func(), err error) {
	remove = func() {}
	if a.Path == "" && !isTrue(a.Abstract) {
		f, err := os.CreateTemp("", "qemu-socket-")
		if err != nil {
			return nil, "", nil, fmt.Errorf("Failed to make a temporary socket %s: %s", os.TempDir(), blk.ErrnoText(err))
		}
		f.Close()
		a = &types.UnixSocketAddress{Path: f.Name()}
	}
	name, err := unixName(a)
	if err != nil {
		return nil, "", nil, err
	}
	if !isTrue(a.Abstract) {
		if err := syscall.Unlink(a.Path); err != nil && err != syscall.ENOENT {
			return nil, "", nil, fmt.Errorf("Failed to unlink socket %s: %s", a.Path, blk.ErrnoText(err))
		}
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, "", nil, fmt.Errorf("Failed to create Unix socket: %s", blk.ErrnoText(err))
	}
	f := os.NewFile(uintptr(fd), a.Path)
	defer f.Close()
	// Linux gives the file that bind makes the mode of the socket, less the umask: never more
	// than wanted, for however short a time. A mode the umask cuts is set afterwards.
	_ = syscall.Fchmod(fd, uint32(mode.Perm()))
	if err := bindUnix(fd, name); err != nil {
		return nil, "", nil, fmt.Errorf("Failed to bind socket to %s: %s", a.Path, blk.ErrnoText(err))
	}
	if !isTrue(a.Abstract) {
		remove = removerOf(a.Path)
		_ = os.Chmod(a.Path, mode.Perm())
	}
	if err = syscall.Listen(fd, backlog); err == nil {
		l, err = net.FileListener(f)
	}
	if err != nil {
		remove()
		return nil, "", nil, fmt.Errorf("Failed to listen on socket: %s", blk.ErrnoText(err))
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	return l, a.Path, remove, nil
}

// bindUnix binds to a path or, after a zero byte, an abstract name.
func bindUnix(fd int, name string) error {
	if strings.HasPrefix(name, "\x00") {
		return syscall.Bind(fd, &syscall.SockaddrUnix{Name: "@" + name[1:]})
	}
	if len(name) == maxUnixPath {
		return syscall.ENAMETOOLONG // fits without its zero byte, which package syscall refuses
	}
	if strings.HasPrefix(name, "@") {
		name = "./" + name // else package syscall would take it for abstract
	}
	return syscall.Bind(fd, &syscall.SockaddrUnix{Name: name})
}

// removerOf returns a function that removes the socket at path, if it is still the same file.
func removerOf(path string) func() {
	abs, err := filepath.Abs(path)
	if err != nil {
		abs = path
	}
	was, err := os.Lstat(abs)
	if err != nil {
		return func() {}
	}
	return func() {
		if is, err := os.Lstat(abs); err == nil && os.SameFile(was, is) {
			_ = os.Remove(abs)
		}
	}
}

func dialUnix(ctx context.Context, a *types.UnixSocketAddress) (net.Conn, error) {
	name, err := unixName(a)
	if err != nil {
		return nil, err
	}
	if name == "" {
		return nil, fmt.Errorf("Failed to connect to '': %s", blk.ErrnoText(syscall.ECONNREFUSED))
	}
	if strings.HasPrefix(name, "\x00") {
		name = "@" + name[1:]
	} else if strings.HasPrefix(name, "@") {
		name = "./" + name
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", name)
	if err != nil {
		return nil, fmt.Errorf("Failed to connect to '%s': %s", a.Path, dialText(ctx, err))
	}
	return c, nil
}

// dialText words why a connection failed.
func dialText(ctx context.Context, err error) string {
	if ctx.Err() != nil {
		return blk.ErrnoText(syscall.ECANCELED)
	}
	return blk.ErrnoText(err)
}

// errServname is for a port that is neither a number nor the name of a service.
var errServname = errors.New("Servname not supported for ai_socktype")

// resolve finds the addresses and the port that a stands for, in the resolver's order.
func resolve(ctx context.Context, a *types.InetSocketAddress, passive bool) ([]netip.Addr, int, error) {
	fail := func(text string) error {
		return fmt.Errorf("address resolution failed for %s:%s: %s", a.Host, a.Port, text)
	}
	network := "ip"
	switch {
	case isFalse(a.Ipv4) && isFalse(a.Ipv6):
		return nil, 0, errors.New("Cannot disable IPv4 and IPv6 at same time")
	case isTrue(a.Ipv4) && isTrue(a.Ipv6):
	case isTrue(a.Ipv6), isFalse(a.Ipv4):
		network = "ip6"
	case isTrue(a.Ipv4), isFalse(a.Ipv6):
		network = "ip4"
	}
	port := 0
	if a.Port != "" {
		n, err := strconv.ParseUint(a.Port, 10, 16)
		if err != nil && !isTrue(a.Numeric) {
			var p int
			p, err = net.DefaultResolver.LookupPort(ctx, "tcp", a.Port)
			n = uint64(p)
		}
		if err != nil {
			return nil, 0, fail(errServname.Error())
		}
		port = int(n)
	}
	if a.Host == "" {
		v4, v6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
		if !passive {
			v4, v6 = netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
		}
		switch network {
		case "ip4":
			return []netip.Addr{v4}, port, nil
		case "ip6":
			return []netip.Addr{v6}, port, nil
		}
		return []netip.Addr{v4, v6}, port, nil
	}
	if ip, err := netip.ParseAddr(a.Host); err == nil {
		if network == "ip4" && !ip.Is4() || network == "ip6" && ip.Is4() {
			return nil, 0, fail("Address family for hostname not supported")
		}
		return []netip.Addr{ip}, port, nil
	}
	if isTrue(a.Numeric) {
		return nil, 0, fail("Name or service not known")
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, network, a.Host)
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns) && dns.IsTemporary && !dns.IsNotFound:
		return nil, 0, fail("Temporary failure in name resolution")
	case err != nil:
		return nil, 0, fail("Name or service not known")
	}
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	return ips, port, nil
}

// listenInet listens on all addresses that a stands for, on the first port of its range that is free.
func listenInet(ctx context.Context, a *types.InetSocketAddress) ([]net.Listener, error) {
	ips, port, err := resolve(ctx, a, true)
	if err != nil {
		return nil, err
	}
	last := port
	if a.To != nil {
		last = int(*a.To)
	}
	if last < port {
		return nil, errors.New("Failed to create a socket")
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(isTrue(a.Mptcp))
	if !isTrue(a.KeepAlive) {
		lc.KeepAlive = -1
	}
	var all []net.Listener
	for _, ip := range ips {
		network := "tcp6"
		switch {
		case ip.Is4():
			network = "tcp4"
		case len(ips) == 1 && ip.IsUnspecified() && a.Ipv4 == nil && a.Ipv6 == nil:
			network = "tcp" // takes IPv4 too
		}
		var l net.Listener
		for p := port; p <= last; p++ {
			l, err = lc.Listen(ctx, network, netip.AddrPortFrom(ip, uint16(p)).String())
			if err == nil || !errors.Is(err, syscall.EADDRINUSE) {
				break
			}
		}
		if err != nil {
			continue
		}
		all = append(all, l)
		if port == 0 { // the other families get the same port
			port = l.Addr().(*net.TCPAddr).Port
			last = port
		}
	}
	switch {
	case len(all) > 0:
		return all, nil
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("Failed to find an available port: %s", blk.ErrnoText(err))
	}
	return nil, fmt.Errorf("Failed to bind socket: %s", blk.ErrnoText(err))
}

func dialInet(ctx context.Context, a *types.InetSocketAddress) (net.Conn, error) {
	if a.Host == "" || a.Port == "" {
		return nil, errors.New("host and/or port not specified")
	}
	ips, port, err := resolve(ctx, a, false)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	d.SetMultipathTCP(isTrue(a.Mptcp))
	if !isTrue(a.KeepAlive) {
		d.KeepAlive = -1
	}
	for _, ip := range ips {
		var c net.Conn
		if c, err = d.DialContext(ctx, "tcp", netip.AddrPortFrom(ip, uint16(port)).String()); err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("Failed to connect to '%s:%s': %s", a.Host, a.Port, dialText(ctx, err))
}

// inherited returns a file of the socket whose number the command line gives.
func inherited(number string, from Origin) (*os.File, error) {
	if from == Monitor {
		return nil, errors.New("only QEMU supports file descriptor passing")
	}
	fd, err := strconv.Atoi(number)
	if err != nil {
		return nil, fmt.Errorf("Unable to parse FD number %s", number)
	}
	var st syscall.Stat_t
	if fd < 0 || syscall.Fstat(fd, &st) != nil || st.Mode&syscall.S_IFMT != syscall.S_IFSOCK {
		return nil, fmt.Errorf("File descriptor '%s' is not a socket", number)
	}
	return os.NewFile(uintptr(fd), "fd:"+number), nil
}
