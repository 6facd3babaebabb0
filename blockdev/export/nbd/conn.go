package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/nbdwire"
	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/graph/blk"
)

func put64(b []byte, v uint64) { binary.BigEndian.PutUint64(b, v) }
func put16(b []byte, v uint16) { binary.BigEndian.PutUint16(b, v) }

// maxWorkers is how many goroutines a connection has for requests that wait; see the package comment.
const maxWorkers = 16

// Sizes of a connection's buffers, in bytes.
const (
	inSize    = 256 << 10 // requests, and payloads of small writes
	batchSize = 256 << 10 // replies the reader gathers
	sndBuf    = 4 << 20   // asked of the socket; the kernel may give less
)

// conn is one connection. The reader is the goroutine of run; fields without a note
// belong to it alone.
type conn struct {
	srv  *Server
	nc   net.Conn
	raw  syscall.RawConn
	unix bool // a unix socket: mapped reads

	structured bool
	ctxs       contexts
	exp        *Export
	dev        Device

	inBuf    *blk.Buffer
	in       []byte // of inBuf; [r:w) is read but not parsed
	r        int
	w        int
	batchBuf *blk.Buffer
	batch    []byte // of batchBuf: replies not sent yet
	// eager: the last request was a write larger than the buffer; read little more than the
	// next header, so that its payload goes where it belongs without a copy.
	eager bool
	maps  []*blk.Mapping // spare ones
	probe probe
	// inside is the unit of work of the request that is served in line.
	inside *blk.Req

	// ctx is done when the connection is killed: whoever waits at the gate for it gives up.
	ctx    context.Context
	cancel context.CancelFunc
	killed atomic.Bool
	// dead: killed, or no reply can be sent any more. Requests that were not begun are dropped.
	dead atomic.Bool

	sendMu sync.Mutex
	// scratch of drainLocked
	vec   net.Buffers // +checklocks:sendMu
	taken []*reply    // +checklocks:sendMu
	sf    sendfile    // +checklocks:sendMu
	// bytes put into the socket
	sent uint64 // +checklocks:sendMu
	// oldest first
	leases []lease // +checklocks:sendMu
	// released, for reuse
	spare []*blk.Mapping // +checklocks:sendMu
	// why nothing can be sent any more
	failed error // +checklocks:sendMu

	mu   sync.Mutex
	room sync.Cond // inflight or bytes went down, with mu
	// requests handed to workers and not answered
	inflight int // +checklocks:mu
	// of their data
	bytes   int64  // +checklocks:mu
	workers int    // +checklocks:mu
	worker  func() // work; made once
	// for the workers
	queue []*job // +checklocks:mu
	// of workers, to be sent
	out []*reply // +checklocks:mu

	leaseTimer *time.Timer   // set by the reader before it can fire
	leaseWait  time.Duration // +checklocks:sendMu
	// the timer runs
	leaseArmed bool // +checklocks:sendMu
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
	c := &conn{srv: s, nc: nc, raw: raw}
	_, c.unix = nc.(*net.UnixConn)
	c.room.L = &c.mu
	c.worker = c.work
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	return c, nil
}

// kill makes the connection end: its socket is shut down now, whoever waits for the gate gives
// up. Requests in the device end in their own time. Callable from anywhere, any number of times.
func (c *conn) kill() {
	if c.killed.Swap(true) {
		return
	}
	c.dead.Store(true)
	c.cancel()
	c.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

// run is the life of the connection.
func (c *conn) run() {
	defer c.cancel()
	err := c.talk(c.handshake)
	if err == nil {
		c.setUp()
		if p := &trace.NBDNegotiate; p.On() {
			p.Log(slog.String("export", c.exp.spec.Name), slog.Bool("structured", c.structured))
		}
		err = c.talk(c.transmission)
		if c.inside != nil {
			c.leave() // after a panic
		}
		c.quiesce()
		c.exp.detach(c)
	}
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, errAbort) && !c.killed.Load() {
		c.srv.log.Info("NBD client disconnected", "err", err)
	}
	c.hangUp()
}

// talk makes a panic an error of the connection.
func (c *conn) talk(f func() error) (err error) {
	defer panics.Into("an NBD connection", &err)
	return f()
}

// enter passes the gate for a request that is served in line, or returns nil where that would have to wait.
func (c *conn) enter() *blk.Req {
	c.inside = c.dev.TryBegin()
	return c.inside
}

// leave ends what enter began.
func (c *conn) leave() {
	r := c.inside
	c.inside, r.NoWait = nil, false
	c.dev.End(r)
}

// setUp prepares for transmission.
func (c *conn) setUp() {
	c.inBuf, c.batchBuf = blk.GetBuf(inSize, 0), blk.GetBuf(batchSize, 0)
	c.in, c.batch = c.inBuf.B, c.batchBuf.B[:0]
	c.sf.init() // +checklocksignore: nobody else sends yet
	c.leaseTimer = panics.AfterFunc("the leases of an NBD connection", time.Hour, c.checkLeases)
	c.leaseTimer.Stop()
	if !c.unix {
		return // TCP finds its own size
	}
	c.raw.Control(func(fd uintptr) {
		// Replies of a whole queue in one go; without privilege the system's limit holds.
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sndBuf) != nil {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, sndBuf)
		}
	})
}

// buffer returns one for the data of a request.
func (c *conn) buffer(n int) *blk.Buffer {
	if n >= largeBuf && !c.srv.large.Load() {
		c.srv.large.Store(true)
	}
	return blk.GetBuf(n, 0)
}

// quiesce waits until no request of the connection is in the device.
func (c *conn) quiesce() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.inflight > 0 {
		c.room.Wait()
	}
}

// hangUp closes the socket, at once or, when data of files are still in its queue, when
// they have been taken or after lingerMax.
func (c *conn) hangUp() {
	if c.leaseTimer != nil {
		c.leaseTimer.Stop()
	}
	c.sendMu.Lock()
	c.failed = net.ErrClosed
	linger := c.releaseLocked() > 0
	c.sendMu.Unlock()
	blk.PutBuf(c.inBuf)
	blk.PutBuf(c.batchBuf)
	c.inBuf, c.in, c.batchBuf, c.batch = nil, nil, nil, nil
	if !linger {
		c.nc.Close()
		return
	}
	c.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	panics.Go("the end of an NBD connection", c.linger, nil)
}

// transmission serves requests until the client is done (nil), the connection fails or is killed.
func (c *conn) transmission() error {
	var q nbdwire.Request
	for {
		if c.w-c.r < nbdwire.RequestSize {
			if err := c.fill(nbdwire.RequestSize); err != nil {
				return err
			}
		}
		if c.dead.Load() {
			return net.ErrClosed
		}
		b := c.in[c.r : c.r+nbdwire.RequestSize]
		c.r += nbdwire.RequestSize
		if q.Parse(b) != nil {
			err := fmt.Errorf("invalid magic (got 0x%x)", binary.BigEndian.Uint32(b))
			c.refuse(&q, err)
			c.flush()
			return err
		}
		if p := &trace.NBDRequest; p.On() {
			p.Log(slog.String("export", c.exp.spec.Name), slog.Int("command", int(q.Cmd)), slog.Uint64("offset", q.Off),
				slog.Uint64("length", uint64(q.Len)), slog.Int("flags", int(q.Flags)))
		}
		if q.Cmd == nbdwire.CmdDisc {
			return c.flush()
		}
		if err := c.request(&q); err != nil {
			return err
		}
	}
}

// fill reads until n bytes are buffered. It sends what is gathered before it may have to wait.
func (c *conn) fill(n int) error {
	if err := c.flush(); err != nil {
		return err
	}
	if c.r > 0 && (c.r == c.w || len(c.in)-c.r < n) {
		copy(c.in, c.in[c.r:c.w])
		c.w -= c.r
		c.r = 0
	}
	for c.w-c.r < n {
		end := len(c.in)
		if c.eager {
			end = min(end, c.r+4096)
		}
		k, err := c.nc.Read(c.in[c.w:end])
		if err != nil {
			return err
		}
		c.w += k
	}
	return nil
}

// refuse answers q with EINVAL without asking the device.
func (c *conn) refuse(q *nbdwire.Request, why error) { c.fail(q, nbdwire.EINVAL, why.Error()) }

// fail gathers the error reply to q.
func (c *conn) fail(q *nbdwire.Request, errno uint32, msg string) {
	c.reserve(nbdwire.ChunkSize + 6 + len(msg))
	c.batch = appendFailure(c.batch, c.structured, q.Cookie, errno, msg)
}

// done gathers the reply to q, which succeeded and has no data.
func (c *conn) done(q *nbdwire.Request) {
	c.reserve(nbdwire.SimpleSize)
	c.batch = nbdwire.AppendSimple(c.batch, q.Cookie, 0)
}

func appendFailure(b []byte, structured bool, cookie uint64, errno uint32, msg string) []byte {
	if structured {
		return nbdwire.AppendError(b, cookie, errno, msg)
	}
	return nbdwire.AppendSimple(b, cookie, errno)
}

// reserve makes room for n bytes in the batch, n at most its size. An error of sending
// shows at the next flush.
func (c *conn) reserve(n int) {
	if len(c.batch)+n > cap(c.batch) {
		c.flush()
	}
}

// flush sends the batch.
func (c *conn) flush() error {
	if len(c.batch) == 0 {
		return nil
	}
	c.sendMu.Lock()
	err := c.writeLocked(c.batch)
	c.unlockSend()
	c.batch = c.batch[:0]
	return err
}

// hungUp tells whether the peer will send nothing any more, which it may have done without our having seen it. It does not block.
func (c *conn) hungUp() bool {
	up := false
	err := c.raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		up = err == nil && n > 0
	})
	return up || err != nil // closed already
}
