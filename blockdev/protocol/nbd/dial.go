package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/tlscreds"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// handshakeTime is how long a server may take from the connection to the first request.
const handshakeTime = 10 * time.Second

// dialTime is how long connecting may take: that of a host which does not answer would be minutes.
const dialTime = 30 * time.Second

// server is where to connect to, and what to ask for there.
type server struct {
	addr    *types.SocketAddress
	export  string
	context string
	tls     *tlscreds.Client // nil: in the clear
	fd      net.Conn         // of an address that is a descriptor: the connection, until it is used
}

// newServer checks the options and what an image may name.
func newServer(x *driver.Opening, o *types.BlockdevOptionsNbd) (*server, error) {
	s := &server{addr: &o.Server, context: contextOf(o)}
	if o.Export != nil {
		s.export = *o.Export
	}
	if o.TlsCreds != nil {
		var err error
		if s.tls, err = tlscreds.NewClient(x.Objects, *o.TlsCreds, serverHost(o)); err != nil {
			return nil, err
		}
	}
	switch a := o.Server.U.(type) {
	case *types.UnixSocketAddress:
		if x.Admit == nil {
			return s, nil
		}
		named := *a
		f := &driver.FoundFile{Name: a.Path, Socket: true}
		if !isSet(a.Abstract) {
			path, err := filepath.EvalSymlinks(a.Path)
			if err == nil {
				path, err = filepath.Abs(path)
			}
			if err != nil {
				return nil, blk.Errnof(err, "Failed to connect to '%s'", a.Path)
			}
			f.Path, named.Path = path, path
		}
		s.addr = &types.SocketAddress{Type: o.Server.Type, U: &named}
		return s, x.Admit(f)
	case *types.String:
		if x.Admit != nil {
			return nil, errors.New("An image may not name a descriptor of the daemon")
		}
		nc, err := inherited(x.Ctx, a.Str)
		s.fd = nc
		return s, err
	}
	return s, nil
}

// serverHost is whom the server's certificate must be for, "" if that is not known.
func serverHost(o *types.BlockdevOptionsNbd) string {
	if o.TlsHostname != nil {
		return *o.TlsHostname
	}
	if a, ok := o.Server.U.(*types.InetSocketAddress); ok {
		return a.Host
	}
	return ""
}

// inherited is the connection that the process has inherited as a descriptor of that number.
func inherited(ctx context.Context, number string) (net.Conn, error) {
	if !driver.IsAtStart(ctx) {
		return nil, errors.New("only QEMU supports file descriptor passing")
	}
	fd, err := strconv.Atoi(number)
	if err != nil {
		return nil, fmt.Errorf("Unable to parse FD number %s", number)
	}
	if fd < 0 {
		return nil, fmt.Errorf("File descriptor '%s' is not a socket", number)
	}
	f := os.NewFile(uintptr(fd), "nbd-server")
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("File descriptor '%s' is not a socket", number)
	}
	_ = f.Close() // nc has a duplicate
	return nc, nil
}

// dial connects.
func (s *server) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	switch a := s.addr.U.(type) {
	case *types.UnixSocketAddress:
		nc, err := sockets.DialUnix(sockets.UnixAddr{
			Path: a.Path, Abstract: isSet(a.Abstract), Padded: a.Tight != nil && !*a.Tight,
		})
		if err == nil {
			sockets.GrowQueue(nc)
		}
		return nc, err
	case *types.InetSocketAddress:
		if a.Host == "" {
			return nil, fmt.Errorf("address resolution failed for :%s: Name or service not known", a.Port)
		}
		return sockets.DialInet(ctx, a)
	}
	nc := s.fd
	s.fd = nil
	if nc == nil {
		return nil, blk.Text("Failed to connect: the descriptor was used before", syscall.ENOTCONN)
	}
	return nc, nil
}

// connect connects and asks for the export. It ends with ctx.
func (s *server) connect(ctx context.Context) (net.Conn, *export, error) {
	nc, err := s.dial(ctx)
	if err != nil {
		if ctx.Err() != nil && s.addr.Type == types.SocketAddressTypeInet {
			err = context.Cause(ctx)
		}
		return nil, nil, err
	}
	_ = nc.SetDeadline(time.Now().Add(handshakeTime)) // an error shows in what follows
	over, ended := make(chan struct{}), make(chan struct{})
	panics.Go("the watch over an NBD handshake", func() {
		defer close(ended)
		select {
		case <-ctx.Done():
			_ = nc.SetDeadline(time.Unix(1, 0))
		case <-over:
		}
	}, nil)
	plain := nc
	nc, e, err := handshake(plain, s)
	close(over)
	<-ended
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = nc.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = plain.Close()
		return nil, nil, err
	}
	return nc, e, nil
}

// close gives back what was not used.
func (s *server) close() {
	if s.fd != nil {
		_ = s.fd.Close()
	}
}

func isSet(b *bool) bool { return b != nil && *b }
