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

	"golang.org/x/sys/unix"

	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
)

// InetAddr is where a TCP socket listens.
type InetAddr struct {
	Host, Port string
	// To is the last port to try; nil: just Port.
	To *uint16
	// IPv4, IPv6: which protocols may be used; nil leaves it to the other one.
	IPv4, IPv6 *bool
	// Numeric: nothing is looked up.
	Numeric bool
	// Multipath: MPTCP.
	Multipath bool
}

// network gives the family for package net, as the reference derives it.
func (a *InetAddr) network() (string, error) {
	is := func(b *bool) bool { return b != nil && *b }
	not := func(b *bool) bool { return b != nil && !*b }
	switch {
	case not(a.IPv4) && not(a.IPv6):
		return "", errors.New("Cannot disable IPv4 and IPv6 at same time")
	case is(a.IPv4) && is(a.IPv6):
		return "tcp", nil
	case is(a.IPv6) || not(a.IPv4):
		return "tcp6", nil
	case is(a.IPv4) || not(a.IPv6):
		return "tcp4", nil
	}
	return "tcp", nil
}

// ListenInet makes a listening TCP socket, one for each address of the host; those that
// cannot be had do not matter as long as there is one. It blocks while names are looked up.
func ListenInet(ctx context.Context, a InetAddr) (net.Listener, error) {
	network, err := a.network()
	if err != nil {
		return nil, err
	}
	unresolved := func(why string) error {
		return fmt.Errorf("address resolution failed for %s:%s: %s", a.Host, a.Port, why)
	}
	first := 0
	if a.Port != "" {
		if first, err = strconv.Atoi(a.Port); err != nil && !a.Numeric {
			first, err = net.DefaultResolver.LookupPort(ctx, network, a.Port)
		}
		if err != nil || first < 0 || first > 65535 {
			return nil, unresolved("Servname not supported for ai_socktype")
		}
	}
	hosts, err := a.lookUp(ctx, network)
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
func (a *InetAddr) lookUp(ctx context.Context, network string) ([]string, error) {
	if a.Host == "" {
		return []string{""}, nil
	}
	if ip, err := netip.ParseAddr(a.Host); err == nil || a.Numeric {
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
func listenPorts(ctx context.Context, network, host string, first int, a InetAddr) (net.Listener, error) {
	last := first
	if a.To != nil {
		last = int(*a.To)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(a.Multipath)
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

// ListenFD listens on the socket that the process inherited as descriptor fd, which the
// listener then owns.
func ListenFD(fd int) (net.Listener, error) {
	if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		return nil, fmt.Errorf("File descriptor '%d' is not a socket", fd)
	}
	if err := unix.Listen(fd, sockets.Backlog); err != nil {
		return nil, blk.Errnof(err, "Failed to listen on fd socket")
	}
	f := os.NewFile(uintptr(fd), "nbd-listener")
	defer f.Close() // the listener has a duplicate
	l, err := net.FileListener(f)
	if err != nil {
		return nil, blk.Errnof(err, "Failed to listen on fd socket")
	}
	return l, nil
}
