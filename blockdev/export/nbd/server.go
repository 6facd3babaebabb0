package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
)

// Options of a Server; the zero value gives the defaults.
type Options struct {
	// SocketMode is the mode of the socket files that Type.Start makes; 0: 0600.
	SocketMode os.FileMode
	// MaxConns bounds the connections served at once, handshakes included; 0: no bound.
	MaxConns uint32
	// TLS is what clients need to use exports; nil: TLS is not to be had.
	TLS *tlscreds.Server
	// Handshake bounds the time of a handshake; 0: DefaultHandshake, negative: no bound.
	Handshake time.Duration
	// Inflight bounds the requests of a connection that have been read and not been answered;
	// InflightBytes the bytes of their data, though one request is always let through. Beyond them
	// the connection is not read. 0: DefaultInflight, DefaultInflightBytes.
	Inflight      int
	InflightBytes int64
	// Objects finds the credentials that Type.Start is told of.
	Objects tlscreds.Objects
	// Idle is called when the last connection has ended after large requests were served, and when
	// many connections have ended: memory that only they needed can be given back. Called from a
	// goroutine of its own; nil: not called.
	Idle func()
	// Log takes what happened to connections; nil: nothing is logged.
	Log *slog.Logger
}

// manyConns is the number of connections after whose end it is worth while to give their stacks
// back.
const manyConns = 256

// largeBuf is the size of buffers, in bytes, from which on it is worth while to give them back.
const largeBuf = 256 << 10

// What holds for a server that was not told otherwise.
const (
	// DefaultMaxConns is the number of connections. Serve does not apply it: it is for its callers.
	DefaultMaxConns      = 100
	DefaultHandshake     = 10 * time.Second
	DefaultInflight      = 256
	DefaultInflightBytes = 16 << 20
)

// Server serves exports to the clients of one listener.
type Server struct {
	opts Options
	log  *slog.Logger
	l    net.Listener
	sem  chan struct{} // a token for each connection; nil: no bound

	ctx    context.Context // done at Close: requests at a closed gate give up
	cancel context.CancelFunc
	wg     sync.WaitGroup // the accepting goroutine and the connections

	ended atomic.Int64 // connections that have
	large atomic.Bool  // buffers of largeBuf and more were used since Idle was called
	// overlap is the payload of a write from which on a worker writes it while the connection takes
	// the next one; see overlapMin.
	overlap int

	mu     sync.Mutex
	closed bool               // +checklocks:mu
	conns  map[*conn]struct{} // +checklocks:mu
	byName map[string]*Export // +checklocks:mu
	// oldest first
	ordered []*Export // +checklocks:mu
}

// Serve accepts connections from l until Close; l belongs to the server.
func Serve(l net.Listener, o Options) *Server {
	o.Handshake = cmp.Or(o.Handshake, DefaultHandshake)
	o.Inflight = cmp.Or(o.Inflight, DefaultInflight)
	o.InflightBytes = cmp.Or(o.InflightBytes, DefaultInflightBytes)
	s := &Server{
		opts: o, log: cmp.Or(o.Log, slog.New(slog.DiscardHandler)), l: l,
		conns: map[*conn]struct{}{}, byName: map[string]*Export{}, overlap: overlapMin,
	}
	if runtime.GOMAXPROCS(0) <= 2 {
		s.overlap = nbdwire.MaxPayload + 1
	}
	if o.MaxConns > 0 {
		s.sem = make(chan struct{}, o.MaxConns)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Add(1)
	panics.Go("the NBD server", s.accept, nil)
	return s
}

// Add makes an export. Errors: name or description too long, name taken.
func (s *Server) Add(spec Spec) (*Export, error) {
	if err := checkSpec(&spec); err != nil {
		return nil, err
	}
	if spec.Errors != nil {
		spec.Device = careful{spec.Device, spec.Errors}
	}
	e := &Export{spec: spec, srv: s, clients: map[*conn]struct{}{}, done: make(chan struct{}),
		flags: transmissionFlags(&spec, s.opts.MaxConns != 1), contexts: contexts(&spec)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrNotRunning
	}
	if err := s.checkNameLocked(spec.Name); err != nil {
		return nil, err
	}
	s.byName[spec.Name] = e
	s.ordered = append(s.ordered, e)
	return e, nil
}

// CheckName tells whether an export of that name could be added now.
func (s *Server) CheckName(spec *Spec) error {
	if err := checkSpec(spec); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checkNameLocked(spec.Name)
}

// +checklocks:s.mu
func (s *Server) checkNameLocked(name string) error {
	if s.byName[name] != nil {
		return fmt.Errorf("NBD server already has export named '%s'", name)
	}
	return nil
}

// find returns the export of that name, or nil.
func (s *Server) find(name string) *Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byName[name]
}

// exports are all exports, oldest first.
func (s *Server) exports() []*Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ordered)
}

// forget takes e off the list.
func (s *Server) forget(e *Export) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byName[e.spec.Name] != e {
		return
	}
	delete(s.byName, e.spec.Name)
	s.ordered = slices.DeleteFunc(s.ordered, func(x *Export) bool { return x == e })
}

// accept takes connections while there are tokens for them.
func (s *Server) accept() {
	defer s.wg.Done()
	var trouble sockets.Trouble
	for {
		if s.sem != nil {
			select {
			case s.sem <- struct{}{}:
			case <-s.ctx.Done():
				return
			}
		}
		nc, err := s.l.Accept()
		if err != nil {
			if s.sem != nil {
				<-s.sem
			}
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors or memory: that passes, and nobody can be told.
			select {
			case <-time.After(trouble.Failed(s.log, "NBD server cannot accept a connection", err)):
			case <-s.ctx.Done():
				return
			}
			continue
		}
		trouble.Over()
		s.serve(nc)
	}
}

// serve starts a connection that has its token.
func (s *Server) serve(nc net.Conn) {
	c, err := newConn(s, nc)
	if err != nil {
		s.log.Warn("NBD connection dropped", "err", err)
		nc.Close()
		s.putToken()
		return
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		nc.Close()
		s.putToken()
		return
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	panics.Go("an NBD connection", func() {
		defer s.wg.Done()
		defer s.putToken()
		defer s.gone(c)
		c.run()
	}, func(error) { c.kill() })
}

// gone takes a connection that has ended off the list.
func (s *Server) gone(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	last := len(s.conns) == 0
	s.mu.Unlock()
	if s.opts.Idle != nil && (s.ended.Add(1)%manyConns == 0 || last && s.large.Swap(false)) {
		s.opts.Idle()
	}
}

func (s *Server) putToken() {
	if s.sem != nil {
		<-s.sem
	}
}

// buffer returns one for the data of a request.
func (s *Server) buffer(n int) *blk.Buffer {
	if n >= largeBuf && !s.large.Load() {
		s.large.Store(true)
	}
	return blk.GetBuf(n, 0)
}

// Close ends the server: no more connections are accepted, exports and clients go. It does not
// wait; Wait does.
func (s *Server) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	exports, conns := slices.Clone(s.ordered), slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	s.cancel()
	s.l.Close()
	for _, e := range exports {
		e.Shutdown()
	}
	for _, c := range conns {
		c.kill()
	}
}

// Wait waits until all connections of a closed server are gone, or for ctx.
func (s *Server) Wait(ctx context.Context) error {
	return panics.Await(ctx, "a wait for NBD clients", s.wg.Wait)
}
