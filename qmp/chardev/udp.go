package chardev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// udpConn makes a stream of datagrams. Datagrams that nobody takes are lost, and an ICMP answer
// that says so is no reason to end.
type udpConn struct{ *net.UDPConn }

// maxDatagram is the most that is sent at once, in bytes.
const maxDatagram = 32 << 10

func (c udpConn) Read(b []byte) (int, error) {
	for {
		n, err := c.UDPConn.Read(b)
		if n > 0 || err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return n, err
		}
	}
}

func (c udpConn) Write(b []byte) (int, error) {
	for n := 0; n < len(b); n += maxDatagram {
		_, err := c.UDPConn.Write(b[n:min(n+maxDatagram, len(b))])
		if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return n, err
		}
	}
	return len(b), nil
}

var errNoDatagram = errors.New("socket type unsupported for datagram")

func resolveUDP(ctx context.Context, a *types.InetSocketAddress, passive bool) (*net.UDPAddr, error) {
	ips, port, err := sockets.Resolve(ctx, a, passive)
	if err != nil {
		return nil, err
	}
	return &net.UDPAddr{IP: ips[0].AsSlice(), Port: port, Zone: ips[0].Zone()}, nil
}

func openUDP(ctx context.Context, o *types.ChardevUdp, f *front) (device, error) {
	remote, ok := o.Remote.U.(*types.InetSocketAddressWrapper)
	if !ok {
		return nil, errNoDatagram
	}
	peer := remote.Data
	if peer.Host == "" {
		peer.Host = "localhost"
	}
	if peer.Port == "" {
		return nil, errors.New("remote port not specified")
	}
	to, err := resolveUDP(ctx, &peer, false)
	if err != nil {
		return nil, err
	}
	var from *net.UDPAddr
	if o.Local != nil {
		local, ok := o.Local.U.(*types.InetSocketAddressWrapper)
		if !ok {
			return nil, errNoDatagram
		}
		if from, err = resolveUDP(ctx, &local.Data, true); err != nil {
			return nil, err
		}
	}
	c, err := net.DialUDP("udp", from, to)
	if err != nil {
		return nil, fmt.Errorf("Failed to bind socket: %s", blk.ErrnoText(err))
	}
	// It is not seen that this is a socket: short writes would be tried on one.
	return newStream(f, "udp", struct{ io.ReadWriteCloser }{udpConn{c}}), nil
}
