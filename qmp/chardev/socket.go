package chardev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"slices"
	"sync"
	"time"

	"qblockd/blockdev/tlscreds"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// socket is what servers and clients have in common.
type socket struct {
	*front
	id      string
	conf    *types.ChardevSocket
	server  bool
	address string // where it listens or connects to, without "disconnected:"
	log     *slog.Logger
	// What a server asks of its clients, and how a client connects; nil: no TLS.
	tls   *tlscreds.Server
	tlsTo *tlscreds.Client

	mu sync.Mutex
	// of the connections, the oldest first
	names []string // +checklocks:mu
}

// filename is the name of the oldest connection.
func (s *socket) filename() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.names) > 0 {
		return s.names[0]
	}
	return "disconnected:" + s.address
}

func (s *socket) protocol() string {
	if types.Or(s.conf.Telnet, false) {
		return "telnet"
	}
	return "tcp"
}

func (s *socket) suffix() string {
	if s.server {
		return ",server=on"
	}
	return ""
}

// connName describes a connection.
func (s *socket) connName(c net.Conn) string {
	switch local := c.LocalAddr().(type) {
	case *net.UnixAddr:
		name := ""
		if local != nil && len(local.Name) > 0 && local.Name[0] != '@' {
			name = local.Name
		}
		return "unix:" + name + s.suffix()
	case *net.TCPAddr:
		return s.protocol() + ":" + local.String() + s.suffix() + " <-> " + c.RemoteAddr().String()
	}
	return "unknown"
}

// run serves one connection to its end.
func (s *socket) run(c net.Conn) {
	name := s.connName(c)
	s.mu.Lock()
	s.names = append(s.names, name)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		i := slices.Index(s.names, name)
		s.names = slices.Delete(s.names, i, i+1)
	}()
	below := c
	if u, ok := c.(*tlscreds.Conn); ok {
		below = u.Below()
	}
	if t, ok := below.(*net.TCPConn); ok {
		_ = t.SetNoDelay(types.Or(s.conf.Nodelay, false))
	}
	if s.tls != nil {
		under, err := s.handshake(c, s.tls.Accept)
		if err != nil {
			s.log.Info("character device "+s.id+": a client is not wanted", "error", err)
			c.Close()
			return
		}
		c = under
	}
	var stream io.ReadWriteCloser = c
	if types.Or(s.conf.Telnet, false) {
		if s.server {
			if _, err := c.Write(telnetHello); err != nil {
				c.Close()
				return
			}
		}
		stream = &telnetConn{Conn: c}
	}
	s.serve(stream)
}

// handshakeTime is how long the handshake of TLS may take.
const handshakeTime = 10 * time.Second

// handshake goes on under TLS, unless that takes too long or the device ends.
func (s *socket) handshake(c net.Conn, f func(net.Conn) (*tlscreds.Conn, error)) (net.Conn, error) {
	_ = c.SetDeadline(time.Now().Add(handshakeTime))
	over, ended := make(chan struct{}), make(chan struct{})
	panics.Go("the watch over a handshake", func() {
		defer close(ended)
		select {
		case <-s.ending:
			_ = c.SetDeadline(time.Unix(1, 0))
		case <-over:
		}
	}, nil)
	under, err := f(c)
	close(over)
	<-ended
	if err != nil {
		return nil, err
	}
	return under, c.SetDeadline(time.Time{})
}

// findTLS looks the credentials up that the options name.
func (s *socket) findTLS(objects tlscreds.Objects) (err error) {
	o := s.conf
	switch {
	case o.TlsCreds == nil && o.TlsAuthz == nil:
		return nil
	case o.TlsCreds == nil:
		return errors.New("'tls_authz' option requires 'tls_creds' option")
	case s.server:
		s.tls, err = tlscreds.NewServer(objects, o.TlsCreds, o.TlsAuthz)
		return err
	case o.TlsAuthz != nil:
		return errors.New("'tls_authz' option is incompatible with socket in client connect mode")
	}
	host := ""
	if a, ok := o.Addr.U.(*types.InetSocketAddressWrapper); ok {
		host = a.Data.Host
	}
	s.tlsTo, err = tlscreds.NewClient(objects, *o.TlsCreds, host)
	return err
}

// checkSocket refuses options that do not go together.
func checkSocket(o *types.ChardevSocket, server bool) error {
	again := "reconnect"
	if o.ReconnectMs != nil {
		again = "reconnect-ms"
	}
	reconnects := o.Reconnect != nil || o.ReconnectMs != nil
	switch {
	case o.Reconnect != nil && o.ReconnectMs != nil:
		return errors.New("'reconnect' and 'reconnect-ms' are mutually exclusive")
	case o.Addr.Type == types.SocketAddressTypeFd && reconnects:
		return errors.New("'" + again + "' option is incompatible with 'fd' address type")
	case o.TlsCreds != nil && o.Addr.Type == types.SocketAddressTypeUnix:
		return errors.New("'tls_creds' option is incompatible with 'unix' address type")
	case o.TlsCreds != nil && o.Addr.Type == types.SocketAddressTypeFd && !server:
		return errors.New("'tls_creds' option is incompatible with 'fd' address type as client")
	case server && reconnects:
		return errors.New("'" + again + "' option is incompatible with socket in server listen mode")
	case !server && o.Wait != nil:
		return errors.New("'wait' option is incompatible with socket in client connect mode")
	}
	return nil
}

// openSocket makes a server or client.
func (t *Table) openSocket(
	ctx context.Context, id string, o *types.ChardevSocket, from Origin, f *front,
) (device, error) {
	server := types.Or(o.Server, true)
	s := &socket{front: f, id: id, conf: o, server: server, log: t.opts.Log}
	if err := s.findTLS(t.opts.Objects); err != nil {
		return nil, err
	}
	if err := checkSocket(o, server); err != nil {
		return nil, err
	}
	if server {
		return t.openServer(ctx, s, from)
	}
	return openClient(ctx, s, from)
}

// server listens. It has any number of clients once it has a user; before, it takes one, and
// the others wait in the kernel's queue.
type server struct {
	*socket
	listeners []net.Listener
	slots     chan struct{} // one element for each client
	first     chan struct{} // closed when the first client has come
	once      sync.Once
}

func (t *Table) openServer(ctx context.Context, s *socket, from Origin) (device, error) {
	d := &server{socket: s, slots: make(chan struct{}, t.opts.MaxClients), first: make(chan struct{})}
	switch u := s.conf.Addr.U.(type) {
	case *types.UnixSocketAddressWrapper:
		l, path, err := sockets.ListenUnix(unixAddr(&u.Data, t.opts.SocketMode))
		if err != nil {
			return nil, err
		}
		d.listeners = []net.Listener{l}
		s.address = "unix:" + path + unixSuffix(&u.Data) + s.suffix()
	case *types.InetSocketAddressWrapper:
		all, err := listenInet(ctx, &u.Data)
		if err != nil {
			return nil, err
		}
		d.listeners = all
		a := all[0].Addr().(*net.TCPAddr).AddrPort()
		s.address = fmt.Sprintf("%s:%s:%d%s", s.protocol(), a.Addr().Unmap().WithZone(""), a.Port(), s.suffix())
	case *types.StringWrapper:
		f, err := inherited(u.Data.Str, from)
		if err != nil {
			return nil, err
		}
		l, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("Failed to listen on fd socket: %s", blk.ErrnoText(err))
		}
		f.Close()
		d.listeners = []net.Listener{l}
		s.address = "fd:" + u.Data.Str + s.suffix()
		switch a := l.Addr().(type) {
		case *net.UnixAddr:
			s.address = "unix:" + a.Name + s.suffix()
		case *net.TCPAddr:
			s.address = fmt.Sprintf("%s:%s:%d%s", s.protocol(), a.IP, a.Port, s.suffix())
		}
	}
	for _, l := range d.listeners {
		s.spawn(func() { d.accept(l) })
	}
	if types.Or(s.conf.Wait, false) {
		s.log.Info("waiting for connection on: " + s.filename())
		select {
		case <-d.first:
		case <-ctx.Done():
			d.close()
			return nil, context.Cause(ctx)
		}
	}
	return d, nil
}

// accept takes clients until the device ends.
func (d *server) accept(l net.Listener) {
	var trouble sockets.Trouble
	for {
		select {
		case d.slots <- struct{}{}:
		case <-d.ending:
			return
		}
		c, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			// Out of descriptors, or the client has gone again: neither is for good.
			<-d.slots
			select {
			case <-time.After(trouble.Failed(d.log, "cannot accept a connection", err, "chardev", d.id)):
			case <-d.ending:
				return
			}
			continue
		}
		trouble.Over()
		gone := make(chan struct{})
		if !d.spawn(func() {
			d.run(c)
			<-d.slots
			close(gone)
		}) {
			c.Close()
			return
		}
		d.once.Do(func() { close(d.first) })
		select {
		case <-d.ready:
		case <-gone:
		case <-d.ending:
			return
		}
	}
}

func (d *server) close() {
	for _, l := range d.listeners {
		l.Close()
	}
	d.end()
}

// pause is how long a client waits before it connects again; 0: it does not.
func pause(o *types.ChardevSocket) time.Duration {
	n, unit := types.Or(o.Reconnect, 0), time.Second
	if o.ReconnectMs != nil {
		n, unit = *o.ReconnectMs, time.Millisecond
	}
	return time.Duration(min(max(n, 0), math.MaxInt64/int64(unit))) * unit
}

// client connects, and again after a pause whenever it has lost its peer, if it is to.
type client struct {
	*socket
	dial   func(context.Context) (net.Conn, error)
	ctx    context.Context
	cancel context.CancelFunc
}

func openClient(ctx context.Context, s *socket, from Origin) (device, error) {
	d := &client{socket: s}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	switch u := s.conf.Addr.U.(type) {
	case *types.UnixSocketAddressWrapper:
		s.address = "unix:" + u.Data.Path + unixSuffix(&u.Data)
		d.dial = func(context.Context) (net.Conn, error) { return sockets.DialUnix(unixAddr(&u.Data, 0)) }
	case *types.InetSocketAddressWrapper:
		s.address = fmt.Sprintf("%s:%s:%s", s.protocol(), u.Data.Host, u.Data.Port)
		d.dial = func(ctx context.Context) (net.Conn, error) { return dialInet(ctx, &u.Data) }
	case *types.StringWrapper:
		s.address = "fd:" + u.Data.Str
		d.dial = func(context.Context) (net.Conn, error) {
			f, err := inherited(u.Data.Str, from)
			if err != nil {
				return nil, err
			}
			c, err := net.FileConn(f)
			if err != nil {
				// Nothing else can be wrong with a socket but its kind.
				return nil, fmt.Errorf("File descriptor '%s' is not a socket", u.Data.Str)
			}
			f.Close()
			return c, nil
		}
	}
	if s.tlsTo != nil {
		plain := d.dial
		d.dial = func(ctx context.Context) (net.Conn, error) {
			c, err := plain(ctx)
			if err != nil {
				return nil, err
			}
			under, err := s.handshake(c, s.tlsTo.Connect)
			if err != nil {
				c.Close()
				return nil, err
			}
			return under, nil
		}
	}
	if pause := pause(s.conf); pause > 0 {
		s.spawn(func() { d.keepConnected(pause) })
		return d, nil
	}
	c, err := d.dial(ctx)
	if err != nil {
		d.cancel()
		return nil, err
	}
	s.spawn(func() { d.run(c) })
	return d, nil
}

// keepConnected connects and serves until the device ends. A failure is logged once, until a
// connection has come about.
func (d *client) keepConnected(pause time.Duration) {
	reported := false
	for d.ctx.Err() == nil {
		c, err := d.dial(d.ctx)
		switch {
		case err == nil:
			reported = false
			d.run(c)
		case !reported && !errors.Is(d.ctx.Err(), context.Canceled):
			reported = true
			d.log.Warn("Unable to connect character device " + d.id + ": " + err.Error())
		}
		select {
		case <-d.ctx.Done():
		case <-time.After(pause):
		}
	}
}

func (d *client) close() {
	d.cancel()
	d.end()
}
