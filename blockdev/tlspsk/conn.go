package tlspsk

import (
	"crypto/rand"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is a connection under TLS. Any goroutine may call its methods; those who read wait for one
// another, and so do those who write.
type Conn struct {
	nc     net.Conn
	config Config
	client bool

	shaking sync.Mutex // one handshake; before in and out
	shook   atomic.Bool
	tried   bool // +checklocks:shaking
	// of the handshake, for who asks again
	err error // +checklocks:shaking

	in  input
	out output

	// owed is set when the next thing to send is another key, asking when the peer shall take
	// another one as well.
	owed   atomic.Bool
	asking atomic.Bool

	// lost is what ends both directions, found by who reads; nil: nothing does
	lost atomic.Pointer[error]

	closed atomic.Bool

	// What else there is to choose from; tests choose.
	suites     []*suite
	groups     []group
	maxRecords uint64

	// What the handshake has found; written before shook is set.
	peer  string
	suite *suite
	group uint16
}

// Client is the end that begins. It takes nc over: Close closes it.
func Client(nc net.Conn, c Config) *Conn { return newConn(nc, c, true) }

// Server is the end that answers. It takes nc over: Close closes it.
func Server(nc net.Conn, c Config) *Conn { return newConn(nc, c, false) }

func newConn(nc net.Conn, c Config, client bool) *Conn {
	return &Conn{nc: nc, config: c, client: client, suites: suites, groups: groups, maxRecords: maxRecords}
}

// Handshake agrees with the peer on keys, if that has not been done. It takes as long as the
// deadlines of the connection allow; after an error no other attempt is made. Read and Write begin
// with it. Errors are a RemoteError, a *LocalError or those of the connection below.
func (c *Conn) Handshake() error {
	if c.shook.Load() {
		return nil
	}
	c.shaking.Lock()
	defer c.shaking.Unlock()
	if c.tried {
		return c.err
	}
	c.tried = true
	c.err = c.handshakeLocked()
	return c.err
}

// +checklocks:c.shaking
func (c *Conn) handshakeLocked() error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	if err := c.config.check(c.client); err != nil {
		return err
	}
	c.in.Lock()
	defer c.in.Unlock()
	c.out.Lock()
	defer c.out.Unlock()
	s := &shake{c: c, t: transcript{hash: c.config.hash()}}
	defer s.wipe()
	run := s.server
	if c.client {
		run = s.client
	}
	err := run()
	c.config.Key = nil
	c.in.useless = 0
	if err != nil {
		c.complainLocked(err)
		c.in.err, c.out.err = err, err
		c.in.wipe()
		c.out.wipe()
		return err
	}
	c.shook.Store(true)
	return nil
}

// Peer is the name of the key that a client has shown to have, "" of a server. It is known after
// the handshake.
func (c *Conn) Peer() string {
	if !c.shook.Load() {
		return ""
	}
	return c.peer
}

// Suite is the name of what protects the records, "" before the handshake. Source: RFC 8446, B.4.
func (c *Conn) Suite() string {
	if !c.shook.Load() {
		return ""
	}
	return c.suite.name
}

// lastWords is how long the peer is given to take the news of the end.
const lastWords = time.Second

// Close tells the peer of the end if nobody is writing, closes the connection below and wipes the
// keys. It waits for those who read and write, whom it makes return, and for the peer no longer
// than a second.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	if c.shook.Load() && c.out.TryLock() {
		c.loseLocked()
		if c.out.err == nil && !c.out.over {
			_ = c.nc.SetWriteDeadline(time.Now().Add(lastWords))
			_ = c.alertLocked(CloseNotify)
		}
		c.out.Unlock() // +checklocksforce: TryLock
	}
	err := c.nc.Close()
	c.in.Lock()
	c.in.end(net.ErrClosed)
	c.in.Unlock()
	c.out.Lock()
	c.out.end(net.ErrClosed)
	c.out.Unlock()
	return err
}

// CloseWrite tells the peer that nothing more will come. What the peer sends can still be read.
func (c *Conn) CloseWrite() error {
	if err := c.Handshake(); err != nil {
		return err
	}
	c.out.Lock()
	defer c.out.Unlock()
	if c.out.err != nil || c.out.over {
		return c.out.err
	}
	err := c.alertLocked(CloseNotify)
	c.out.over = true
	return err
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.nc.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

// SetDeadline implements net.Conn. A write that was too late is the last.
func (c *Conn) SetDeadline(t time.Time) error { return c.nc.SetDeadline(t) }

// SetReadDeadline implements net.Conn. Who was too late may read again.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.nc.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn. A write that was too late is the last.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.nc.SetWriteDeadline(t) }

// shake is a handshake under way. Who runs it has locked both directions.
type shake struct {
	c     *Conn
	t     transcript
	keys  *schedule
	suite *suite
	// Secrets of both directions that are not in use yet.
	secrets [][]byte
}

func (s *shake) wipe() {
	s.keys.wipe()
	for _, b := range s.secrets {
		clear(b)
	}
}

// derive is a secret that goes with the handshake unless taken.
func (s *shake) derive(label string) []byte {
	b := s.keys.derive(label, s.t.sum())
	s.secrets = append(s.secrets, b)
	return b
}

// use begins to protect one direction with a secret; the half has its own copy.
func (s *shake) use(h *half, secret []byte) { h.set(s.suite, append([]byte(nil), secret...)) }

// message waits for a message, which must be of that type.
func (s *shake) message(want byte) ([]byte, error) {
	typ, raw, err := s.c.messageLocked()
	if err == nil && typ != want {
		err = fail(UnexpectedMessage, "a message comes at the wrong time")
	}
	return raw, err
}

// send adds messages to what is sent next.
func (s *shake) send(message []byte) {
	s.t.add(message)
	s.c.out.add(recordHandshake, message)
}

// flush sends what was added.
func (s *shake) flush() error {
	err := s.c.flushLocked()
	s.c.out.drop()
	return err
}

// changeCipherSpec adds a record that means nothing but to those in between. Source: RFC 8446, D.4.
func (s *shake) changeCipherSpec() {
	s.c.out.add(recordChangeCipherSpec, []byte{1})
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // does not fail
	return b
}
