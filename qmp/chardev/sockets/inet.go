package sockets

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// DialText words why a connection failed.
func DialText(ctx context.Context, err error) string {
	if ctx.Err() != nil {
		return blk.ErrnoText(syscall.ECANCELED)
	}
	return blk.ErrnoText(err)
}

// ErrServname is for a port that is neither a number nor the name of a service.
var ErrServname = errors.New("Servname not supported for ai_socktype")

// Resolve finds the addresses and the port that a stands for, in the resolver's order.
func Resolve(ctx context.Context, a *types.InetSocketAddress, passive bool) ([]netip.Addr, int, error) {
	fail := func(text string) error {
		return fmt.Errorf("address resolution failed for %s:%s: %s", a.Host, a.Port, text)
	}
	network := "ip"
	switch {
	case !types.Or(a.Ipv4, true) && !types.Or(a.Ipv6, true):
		return nil, 0, errors.New("Cannot disable IPv4 and IPv6 at same time")
	case types.Or(a.Ipv4, false) && types.Or(a.Ipv6, false):
	case types.Or(a.Ipv6, false), !types.Or(a.Ipv4, true):
		network = "ip6"
	case types.Or(a.Ipv4, false), !types.Or(a.Ipv6, true):
		network = "ip4"
	}
	port := 0
	if a.Port != "" {
		n, err := strconv.ParseUint(a.Port, 10, 16)
		if err != nil && !types.Or(a.Numeric, false) {
			var p int
			p, err = net.DefaultResolver.LookupPort(ctx, "tcp", a.Port)
			n = uint64(p)
		}
		if err != nil {
			return nil, 0, fail(ErrServname.Error())
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
	if types.Or(a.Numeric, false) {
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

// DialInet connects to the first address of a that answers.
func DialInet(ctx context.Context, a *types.InetSocketAddress) (net.Conn, error) {
	ips, port, err := Resolve(ctx, a, false)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	d.SetMultipathTCP(types.Or(a.Mptcp, false))
	if !types.Or(a.KeepAlive, false) {
		d.KeepAlive = -1
	}
	for _, ip := range ips {
		var c net.Conn
		if c, err = d.DialContext(ctx, "tcp", netip.AddrPortFrom(ip, uint16(port)).String()); err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("Failed to connect to '%s:%s': %s", a.Host, a.Port, DialText(ctx, err))
}
