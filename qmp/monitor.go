package qmp

import (
	"cmp"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"qblockd/events"
	"qblockd/events/panics"
)

// Options of a Monitor.
type Options struct {
	Pretty   bool   // indent what is sent
	ReadOnly bool   // take only commands that change nothing
	Limits   Limits // per client
	// Idle is called when clients have gone that needed much memory together, which can be given
	// back now. Called from a goroutine of its own; nil: not called.
	Idle func()
}

// Monitor is a place where clients talk QMP: any number of them at once, each with its own
// Session.
type Monitor struct {
	d    *Dispatcher
	bus  *events.Bus // may be nil
	opts Options

	garbage   atomic.Int64  // bytes that sessions which have ended took, since Idle was called
	overflows atomic.Uint64 // clients disconnected because they did not read

	mu       sync.Mutex
	sessions map[*Session]struct{} // +checklocks:mu
	closed   bool                  // +checklocks:mu
	idle     sync.WaitGroup        // counts sessions
}

// NewMonitor returns a monitor whose clients execute d's commands and hear bus's events.
func NewMonitor(d *Dispatcher, bus *events.Bus, o Options) *Monitor {
	o.Limits.HoldInput = cmp.Or(o.Limits.HoldInput, DefaultHoldInput)
	o.Limits.Unsent = cmp.Or(o.Limits.Unsent, DefaultUnsent)
	return &Monitor{d: d, bus: bus, opts: o, sessions: make(map[*Session]struct{})}
}

// Serve talks to one client, beginning with the greeting, until it leaves or the monitor is
// closed; then c is closed. It blocks as long. See NewConn for what is made of c.
func (m *Monitor) Serve(c io.ReadWriteCloser) {
	s := newSession(m, NewConn(c))
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		c.Close()
		return
	}
	m.sessions[s] = struct{}{}
	m.idle.Add(1)
	m.mu.Unlock()
	m.d.enter(s)
	defer func() {
		m.d.leave(s)
		m.mu.Lock()
		delete(m.sessions, s)
		m.mu.Unlock()
		m.ended(s)
		m.idle.Done()
	}()
	s.serve()
}

const (
	// sessionSize is about what a session takes beside its output, in bytes: stacks, input,
	// bookkeeping.
	sessionSize = 16 << 10
	// muchGarbage is how much is worth while to give back, in bytes.
	muchGarbage = 4 << 20
)

// ended counts what s leaves behind.
func (m *Monitor) ended(s *Session) {
	if m.opts.Idle == nil {
		return
	}
	s.out.mu.Lock()
	n := int64(s.out.most)
	s.out.mu.Unlock()
	if m.garbage.Add(n+sessionSize) >= muchGarbage && m.garbage.Swap(0) >= muchGarbage {
		panics.Go("giving back memory", m.opts.Idle, nil)
	}
}

// Close ends all sessions: each client is given until grace has passed to take what is queued
// for it, then its commands are cancelled and its connection is closed. Close returns when all
// commands have ended.
func (m *Monitor) Close(grace time.Duration) {
	m.mu.Lock()
	m.closed = true
	var all panics.Group
	for s := range m.sessions {
		all.Go("the end of a QMP client", func() {
			if grace > 0 {
				s.waitSent(grace)
			}
			s.fail(errGone)
		})
	}
	m.mu.Unlock()
	all.Wait()
	m.idle.Wait()
}
