package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/qmp/chardev/sockets"
)

// conn is one connection: the socket, what was negotiated, and the parts that serve it (see the
// package comment).
type conn struct {
	srv  *Server
	nc   net.Conn // what clients are talked to through
	raw  syscall.RawConn
	unix bool // a unix socket
	tls  bool // nc is under TLS

	session

	// ctx is done when the connection is killed: whoever waits at the gate for it gives up.
	ctx    context.Context
	cancel context.CancelFunc
	killed atomic.Bool
	// dead: killed, or no reply can be sent any more. Requests that were not begun are dropped.
	dead atomic.Bool

	sender  sender
	workers workers
}

func newConn(s *Server, nc net.Conn) (*conn, error) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil, errors.New("not a socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	sockets.GrowQueue(nc)
	c := &conn{srv: s, nc: nc, raw: raw}
	_, c.unix = nc.(*net.UnixConn)
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	return c, nil
}

// kill makes the connection end: its socket is shut down now, whoever waits for the gate gives
// up. Requests in the device end in their own time. Callable from anywhere, any number of times.
func (c *conn) kill() {
	if !c.killed.Swap(true) {
		c.stop()
	}
}

// stop ends the transmission in both directions.
func (c *conn) stop() {
	c.dead.Store(true)
	c.cancel()
	c.shutSocket()
}

func (c *conn) shutSocket() {
	c.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

// startTLS goes on under TLS. The deadline of the handshake holds for that of TLS too.
func (c *conn) startTLS() error {
	nc, err := c.srv.opts.TLS.Accept(c.nc)
	if err != nil {
		return err
	}
	c.nc, c.tls = nc, true
	return nil
}

// run is the life of the connection.
func (c *conn) run() {
	defer c.cancel()
	err := talk(c.handshake)
	linger := false
	if err == nil {
		err, linger = c.transmission()
	}
	if c.exp != nil {
		c.exp.detach(c)
	}
	c.logEnd(err)
	if !linger {
		c.nc.Close()
		return
	}
	c.shutSocket()
	panics.Go("the end of an NBD connection", c.sender.linger, nil)
}

// logEnd tells why a connection came to an end that its client did not announce.
func (c *conn) logEnd(err error) {
	under := errors.As(err, new(*tlscreds.ChannelError))
	if err == nil || !under && errors.Is(err, io.EOF) || errors.Is(err, errAbort) || c.killed.Load() {
		return
	}
	attrs := []any{"err", err}
	if alert := tlscreds.Alert(err); alert != "" {
		attrs = append(attrs, "alert", alert)
	}
	c.srv.log.Info("NBD client disconnected", attrs...)
}

// talk makes a panic an error of the connection.
func talk(f func() error) (err error) {
	defer panics.Into("an NBD connection", &err)
	return f()
}

// transmission serves the client until it is done, and all requests have ended. linger tells that
// data of files are still in the socket's queue.
func (c *conn) transmission() (err error, linger bool) {
	if p := &trace.NBDNegotiate; p.On() {
		p.Log(slog.String("export", c.exp.spec.Name), slog.Bool("structured", c.form != nbdwire.Simple),
			slog.Bool("extended", c.form == nbdwire.Extended), slog.Bool("tls", c.tls))
	}
	c.sender.start(c)
	c.workers.start(c)
	r := newReader(c)
	r.serve()
	err = <-r.alone.done
	r.end()
	c.workers.wait()
	return err, c.sender.end()
}

// hungUp tells whether the peer will send nothing any more, which it may have done without our
// having seen it. It does not block.
func (c *conn) hungUp() bool {
	up := false
	err := c.raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		up = err == nil && n > 0
	})
	return up || err != nil // closed already
}
