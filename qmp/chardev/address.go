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

// unixAddr is a as package sockets wants it.
func unixAddr(a *types.UnixSocketAddress, mode os.FileMode) sockets.UnixAddr {
	return sockets.UnixAddr{
		Path: a.Path, Abstract: types.Or(a.Abstract, false), Padded: !types.Or(a.Tight, true), Mode: mode,
	}
}

// unixSuffix is what a file name shows behind the path.
func unixSuffix(a *types.UnixSocketAddress) string {
	switch {
	case !types.Or(a.Abstract, false):
		return ""
	case !types.Or(a.Tight, true):
		return ",abstract=on"
	}
	return ",abstract=on,tight=on"
}

// listenInet listens on all addresses that a stands for, on the first port of its range that is
// free.
func listenInet(ctx context.Context, a *types.InetSocketAddress) ([]net.Listener, error) {
	ips, port, err := sockets.Resolve(ctx, a, true)
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
	lc.SetMultipathTCP(types.Or(a.Mptcp, false))
	if !types.Or(a.KeepAlive, false) {
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

func dialInet(ctx context.Context, a *types.InetSocketAddress) (net.Conn, error) {
	if a.Host == "" || a.Port == "" {
		return nil, errors.New("host and/or port not specified")
	}
	return sockets.DialInet(ctx, a)
}
