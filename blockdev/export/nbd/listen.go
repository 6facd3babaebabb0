package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"

	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// Flatten turns the older form of an address into the newer one.
func Flatten(a *types.SocketAddressLegacy) *types.SocketAddress {
	f := &types.SocketAddress{Type: a.Type}
	switch u := a.U.(type) {
	case *types.InetSocketAddressWrapper:
		f.U = &u.Data
	case *types.UnixSocketAddressWrapper:
		f.U = &u.Data
	case *types.StringWrapper:
		f.U = &u.Data
	}
	return f
}

// listen makes a listening socket.
func listen(ctx context.Context, addr *types.SocketAddress, mode os.FileMode) (net.Listener, error) {
	switch a := addr.U.(type) {
	case *types.UnixSocketAddress:
		return sockets.ListenAt(a, mode)
	case *types.InetSocketAddress:
		return listenInet(ctx, a)
	case *types.String:
		return sockets.ListenFD(a.Str)
	}
	return nil, fmt.Errorf("socket address type '%s' is not supported", addr.Type)
}

// network gives the address family for package net, as QEMU derives it.
func network(a *types.InetSocketAddress) (string, error) {
	on := func(b *bool) bool { return types.Or(b, false) }
	not := func(b *bool) bool { return !types.Or(b, true) }
	switch {
	case not(a.Ipv4) && not(a.Ipv6):
		return "", errors.New("Cannot disable IPv4 and IPv6 at same time")
	case on(a.Ipv4) && on(a.Ipv6):
		return "tcp", nil
	case on(a.Ipv6) || not(a.Ipv4):
		return "tcp6", nil
	case on(a.Ipv4) || not(a.Ipv6):
		return "tcp4", nil
	}
	return "tcp", nil
}

// listenInet makes a listening TCP socket, one for each address of the host; those that
// cannot be had do not matter as long as there is one. It blocks while names are looked up.
// keep-alive has no effect on a listener, as in QEMU.
func listenInet(ctx context.Context, a *types.InetSocketAddress) (net.Listener, error) {
	network, err := network(a)
	if err != nil {
		return nil, err
	}
	unresolved := func(why string) error {
		return fmt.Errorf("address resolution failed for %s:%s: %s", a.Host, a.Port, why)
	}
	first := 0
	if a.Port != "" {
		if first, err = strconv.Atoi(a.Port); err != nil && !types.Or(a.Numeric, false) {
			first, err = net.DefaultResolver.LookupPort(ctx, network, a.Port)
		}
		if err != nil || first < 0 || first > 65535 {
			return nil, unresolved("Servname not supported for ai_socktype")
		}
	}
	hosts, err := lookUp(ctx, network, a)
	if err != nil {
		return nil, unresolved("Name or service not known")
	}
	var ls []net.Listener
	var failed error
	for _, h := range hosts {
		l, err := listenPorts(ctx, network, h, first, a)
		if err == nil {
			ls = append(ls, l)
		} else if failed == nil {
			failed = err
		}
	}
	switch len(ls) {
	case 0:
		return nil, failed
	case 1:
		return ls[0], nil
	}
	return joinListeners(ls), nil
}

// lookUp returns the addresses of the host; "" stands for all of the machine's.
func lookUp(ctx context.Context, network string, a *types.InetSocketAddress) ([]string, error) {
	if a.Host == "" {
		return []string{""}, nil
	}
	if ip, err := netip.ParseAddr(a.Host); err == nil || types.Or(a.Numeric, false) {
		return []string{ip.String()}, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip"+network[len("tcp"):], a.Host)
	if err != nil {
		return nil, err
	}
	var hosts []string
	for _, ip := range ips {
		hosts = append(hosts, ip.Unmap().String())
	}
	return hosts, nil
}

// listenPorts listens on the first free port.
func listenPorts(
	ctx context.Context, network, host string, first int, a *types.InetSocketAddress,
) (net.Listener, error) {
	last := int(types.Or(a.To, uint16(first)))
	var lc net.ListenConfig
	lc.SetMultipathTCP(types.Or(a.Mptcp, false))
	var err error = syscall.EADDRINUSE
	for port := first; port <= last; port++ {
		var l net.Listener
		if l, err = lc.Listen(ctx, network, net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
			return l, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, blk.Errnof(err, "Failed to bind socket")
		}
	}
	return nil, blk.Errnof(err, "Failed to find an available port")
}

// joined is several listeners as one.
type joined struct {
	ls    []net.Listener
	conns chan net.Conn
	errs  chan error
	done  chan struct{}
	once  sync.Once
}

func joinListeners(ls []net.Listener) *joined {
	j := &joined{ls: ls, conns: make(chan net.Conn), errs: make(chan error), done: make(chan struct{})}
	for _, l := range ls {
		panics.Go("an NBD listener", func() {
			for {
				c, err := l.Accept()
				if err != nil {
					select {
					case j.errs <- err:
						continue
					case <-j.done:
						return
					}
				}
				select {
				case j.conns <- c:
				case <-j.done:
					c.Close()
					return
				}
			}
		}, nil)
	}
	return j
}

// Accept implements net.Listener.
func (j *joined) Accept() (net.Conn, error) {
	select {
	case c := <-j.conns:
		return c, nil
	case err := <-j.errs:
		return nil, err
	case <-j.done:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener: the first one's.
func (j *joined) Addr() net.Addr { return j.ls[0].Addr() }

// Close implements net.Listener.
func (j *joined) Close() error {
	j.once.Do(func() {
		close(j.done)
		for _, l := range j.ls {
			l.Close()
		}
	})
	return nil
}
