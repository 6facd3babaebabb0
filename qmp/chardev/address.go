package chardev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

func isTrue(b *bool) bool  { return b != nil && *b }
func isFalse(b *bool) bool { return b != nil && !*b }

// unixAddr is a as package sockets wants it.
func unixAddr(a *types.UnixSocketAddress, mode os.FileMode) sockets.UnixAddr {
	return sockets.UnixAddr{Path: a.Path, Abstract: isTrue(a.Abstract), Padded: isFalse(a.Tight), Mode: mode}
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

// listenInet listens on all addresses that a stands for, on the first port of its range that is
// free.
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
