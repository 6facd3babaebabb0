package qmp

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/events"
	"qblockd/events/trace"
	"qblockd/schema/value"
)

// Conn is the stream of one client. Close must make a blocked Read and Write return. A Conn may
// have more abilities: see TryWriter and HangupWaiter.
type Conn interface {
	io.Reader
	io.Writer
	Close() error
}

// TryWriter is a Conn that can write without waiting: it writes what can be taken at once and
// returns how much that was. A Conn without it is written by a goroutine of its own.
type TryWriter interface {
	TryWrite(b []byte) (int, error)
}

// HangupWaiter is a Conn that can tell when its client is gone for good (as opposed to having
// only stopped sending). It is not called while a Read is under way.
type HangupWaiter interface {
	// WaitHangup returns true when the client is gone, false when stop was called.
	WaitHangup() bool
	// StopWait makes the WaitHangup under way, or else the next one, return false.
	StopWait()
}

// Lingerer is a Conn whose output stays open when its input ends, such as stdio: then the
// session goes on delivering events.
type Lingerer interface{ Lingers() bool }

// Limits bound what a session holds for its client; zero fields take the defaults.
type Limits struct {
	HoldInput int          // bytes unsent above which nothing is read or executed; default DefaultHoldInput
	Unsent    int          // bytes unsent above which the client is disconnected; default DefaultUnsent
	Input     value.Limits // of one message
}

// Defaults of Limits, in bytes.
const (
	DefaultHoldInput = 1 << 20
	DefaultUnsent    = 64 << 20
)

const (
	maxQueued = 8       // in-band requests queued with oob enabled, as in QEMU
	minRead   = 4 << 10 // of the input buffer
	maxRead   = 64 << 10
	keepOut   = 256 << 10 // capacity up to which an output buffer is kept for reuse

	// flushDelay is how long answers wait at most for the end of their batch.
	flushDelay = time.Millisecond
	// slowDelay is after how long a command is watched for the end of its client.
	slowDelay = 20 * time.Millisecond
)

var (
	errGone     = errors.New("client is gone")
	errOverflow = errors.New("client does not read")
)

// Session is one client of a monitor.
type Session struct {
	mon  *Monitor
	d    *Dispatcher
	conn Conn
	try  TryWriter    // conn, if it can
	hang HangupWaiter // conn, if it can

	base   context.Context // cancelled when the client is gone
	ctx    context.Context // base, and leads to the session
	cancel context.CancelCauseFunc

	// Owned by the goroutine that executes in-band commands.
	neg     negotiation
	scratch []byte
	after   []func() // see AfterReply
	making  bool     // see LargeReply
	sub     *events.Subscription

	oob   atomic.Bool // neg.oob
	eof   atomic.Bool // nothing more is read
	queue requestQueue
	watch watch
	in    input
	out   output
}

// newSession prepares a session of m over c.
func newSession(m *Monitor, c Conn) *Session {
	s := &Session{mon: m, d: m.d, conn: c, neg: negotiation{readOnly: m.opts.ReadOnly}}
	s.try, _ = c.(TryWriter)
	s.hang, _ = c.(HangupWaiter)
	s.base, s.cancel = context.WithCancelCause(context.Background())
	s.ctx = context.WithValue(s.base, sessionKey{}, s)
	s.queue.changed.L = &s.queue.mu
	s.out.changed.L = &s.out.mu
	s.watch.init(s)
	return s
}

// serve runs the session to its end; all its goroutines are gone when it returns.
func (s *Session) serve() {
	s.send(appendGreeting(nil, s.d.version), true)
	s.flush()
	s.read()
	s.eof.Store(true)
	s.queue.close()
	if l, ok := s.conn.(Lingerer); ok && l.Lingers() {
		s.flush()
		<-s.base.Done()
	}
	if s.sub != nil {
		s.mon.bus.Unsubscribe(s.sub)
	}
	if !s.d.Stopped() { // otherwise Monitor.Close is the one that knows how long to wait
		s.flush()
		s.waitSent(0)
	} else {
		<-s.base.Done()
	}
	s.fail(errGone)
	s.watch.close()
	s.waitWriter()
}

func appendGreeting(b []byte, v Version) []byte {
	b = append(b, `{"QMP": {"version": `...)
	b = v.AppendJSON(b)
	return append(b, `, "capabilities": ["oob"]}}`...)
}

// read is the session's main loop: it reads, cuts and executes until the client ends, the
// daemon stops, or the connection fails.
func (s *Session) read() {
	p := value.NewParser(s.mon.opts.Limits.Input)
	buf := make([]byte, minRead)
	defer func() { clear(buf) }()
	defer s.gathered(0)
	for s.awaitRoom() {
		n, err := s.conn.Read(buf)
		p.Feed(buf[:n])
		for {
			v, perr, ok := p.Next()
			if !ok {
				break
			}
			if !s.request(v, perr) {
				return
			}
		}
		clear(buf[:n]) // it may have been a secret
		s.gathered(p.Held())
		if !s.queue.running() {
			s.flush()
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.fail(err)
			}
			return
		}
		if n == len(buf) && n < maxRead {
			buf = make([]byte, 4*n)
		}
	}
}

// request handles one value or syntax error from the client; false ends the reading.
func (s *Session) request(v value.Value, err error) bool {
	switch {
	case !s.oob.Load():
		return s.execute(queued{v, err})
	case err == nil && isOOB(v):
		return s.executeOOB(v)
	}
	return s.queue.put(s, queued{v, err})
}

// execute executes one in-band request; false if nothing more is to be executed.
func (s *Session) execute(q queued) bool {
	if !s.awaitRoom() {
		return false
	}
	negotiated := s.neg.done
	out := s.scratch[:0]
	if q.err != nil {
		out = appendFailure(out, nil, false, q.err)
	} else {
		s.watch.begin()
		out = s.d.reply(s.ctx, &s.neg, q.v, out)
		s.watch.end()
	}
	traceReply(out)
	s.send(out, true)
	s.made()
	if s.scratch = out; cap(out) > keepOut {
		s.scratch = nil
	}
	if s.neg.done && !negotiated {
		// Subscribed after the reply is queued: no event may come before it.
		if s.mon.bus != nil {
			s.sub = s.mon.bus.Subscribe(s.event)
		}
		s.oob.Store(s.neg.oob)
	}
	if len(s.after) > 0 {
		// What comes of it is queued behind the reply: a client that does not take that holds nothing up.
		s.flush()
		for _, f := range s.after {
			f()
		}
		s.after = s.after[:0]
	}
	return s.base.Err() == nil && !s.d.Stopped()
}

// executeOOB executes an out-of-band request beside whatever runs in band.
func (s *Session) executeOOB(v value.Value) bool {
	if !s.awaitRoom() {
		return false
	}
	neg := negotiation{done: true, oob: true, readOnly: s.mon.opts.ReadOnly}
	out := s.d.reply(s.base, &neg, v, nil)
	traceReply(out)
	s.send(out, true)
	s.startWriter()
	return true
}

func traceReply(out []byte) {
	if p := &trace.Reply; p.On() {
		p.Log(slog.String("reply", string(out)))
	}
}

// event is called by the bus, with the bus locked.
func (s *Session) event(m events.Message) {
	s.send(m.Line, false)
	if !m.More {
		s.startWriter()
	}
}

// fail ends the session: the context of its commands is cancelled and the connection closed.
func (s *Session) fail(err error) {
	if s.base.Err() == nil && !errors.Is(err, errGone) {
		level := slog.LevelInfo
		if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
			level = slog.LevelDebug // it left without reading all: many do
		}
		s.d.log().Log(context.Background(), level, "monitor client disconnected", "error", err)
	}
	s.cancel(err)
	s.conn.Close()
	s.wake()
}

// wake makes whoever waits in s look again whether the session or the daemon has ended.
func (s *Session) wake() {
	s.out.mu.Lock()
	s.out.changed.Broadcast()
	s.out.mu.Unlock()
	s.queue.mu.Lock()
	s.queue.changed.Broadcast()
	s.queue.mu.Unlock()
}

type sessionKey struct{}

// AfterReply has f called when the reply of the command that is executed with ctx has been handed
// to the client's connection, as far as that takes it at once; the rest is queued before all events
// that come of f. With a context that is not that of an in-band command f is called at once.
func AfterReply(ctx context.Context, f func()) {
	if s, ok := ctx.Value(sessionKey{}).(*Session); ok {
		s.after = append(s.after, f)
		return
	}
	f()
}

// Negotiate ends the negotiation of the session whose command is executed with ctx: it is what
// qmp_capabilities does when its arguments are good. It fails if that has happened before.
func Negotiate(ctx context.Context, oob bool) error {
	s, ok := ctx.Value(sessionKey{}).(*Session)
	if !ok || s.neg.done {
		return errNegotiated
	}
	s.neg.done, s.neg.oob = true, oob
	return nil
}
