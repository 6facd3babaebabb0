package chardev

import (
	"context"
	"errors"
	"fmt"
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

// udpStream hides that a udpConn is a socket, on which short writes would be tried.
type udpStream struct{ c udpConn }

func (s udpStream) Read(b []byte) (int, error)  { return s.c.Read(b) }
func (s udpStream) Write(b []byte) (int, error) { return s.c.Write(b) }
func (s udpStream) Close() error                { return s.c.Close() }

type udp struct{ *front }

func (*udp) filename() string { return "udp" }
func (d *udp) close()         { d.end() }

func openUDP(ctx context.Context, o *types.ChardevUdp, f *front) (device, error) {
	remote, ok := o.Remote.U.(*types.InetSocketAddressWrapper)
	if !ok {
		return nil, errors.New("socket type unsupported for datagram")
	}
	peer := remote.Data
	if peer.Host == "" {
		peer.Host = "localhost"
	}
	if peer.Port == "" {
		return nil, errors.New("remote port not specified")
	}
	ips, port, err := sockets.Resolve(ctx, &peer, false)
	if err != nil {
		return nil, err
	}
	to := &net.UDPAddr{IP: ips[0].AsSlice(), Port: port, Zone: ips[0].Zone()}
	var from *net.UDPAddr
	if o.Local != nil {
		local, ok := o.Local.U.(*types.InetSocketAddressWrapper)
		if !ok {
			return nil, errors.New("socket type unsupported for datagram")
		}
		ips, port, err := sockets.Resolve(ctx, &local.Data, true)
		if err != nil {
			return nil, err
		}
		from = &net.UDPAddr{IP: ips[0].AsSlice(), Port: port, Zone: ips[0].Zone()}
	}
	c, err := net.DialUDP("udp", from, to)
	if err != nil {
		return nil, fmt.Errorf("Failed to bind socket: %s", blk.ErrnoText(err))
	}
	d := &udp{f}
	f.spawn(func() { f.serve(udpStream{udpConn{c}}) })
	return d, nil
}
