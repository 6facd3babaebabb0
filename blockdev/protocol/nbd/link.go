package nbd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/events/clock"
	"qblockd/events/panics"
	"qblockd/graph/blk"
)

// Pauses between attempts to connect again; each is twice as long as the one before.
const firstPause, lastPause = 100 * time.Millisecond, 16 * time.Second

// maxSends is how often a request is sent: one that each of so many servers did not survive may be
// the reason.
const maxSends = 10

// link is the way to a server: the connections in use, and what there is to come back to it.
type link struct {
	node  string // for the log
	dial  func(ctx context.Context) (net.Conn, *export, error)
	clock clock.Clock
	delay time.Duration        // reconnect-delay
	fits  func(e *export) bool // whether the server that has come back is the one that was lost
	most  int                  // connections at a time, where the server takes several; 0: 1

	ctx    context.Context // of attempts to connect
	cancel context.CancelFunc
	work   panics.Group // the reader and the attempt

	// how many writes were acknowledged, and how many of those are known to be on stable storage
	written atomic.Uint64
	flushed atomic.Uint64

	mu    sync.Mutex
	state state // +checklocks:mu
	// those in use, the first one first; none unless connected
	conns []*conn // +checklocks:mu
	// how often the server was connected to, apart from further connections
	age int // +checklocks:mu
	// closed when state changes
	changed chan struct{} // +checklocks:mu
	// an attempt to connect is under way
	trying bool // +checklocks:mu
	// those who must not wait for a server: drains, the end of the node
	holds int // +checklocks:mu
	// requests that wait for a server
	waiting int // +checklocks:mu
	// before the next attempt, with a reconnect-delay
	pause time.Duration // +checklocks:mu
	// when requests stop waiting, if waiting
	until time.Time   // +checklocks:mu
	timer clock.Timer // +checklocks:mu
}

// state is that of a link; see the package comment.
type state uint8

const (
	connected state = iota
	waiting
	offline
	broken // the server has broken the protocol
	closed
)

// start takes the first connection into use.
func (l *link) start(nc net.Conn, e *export) {
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.mu.Lock()
	l.changed = make(chan struct{})
	defer l.mu.Unlock()
	l.useLocked(nc, e)
}

// +checklocks:l.mu
func (l *link) useLocked(nc net.Conn, e *export) {
	l.runLocked(nc, e)
	l.age++
	l.becomeLocked(connected)
	if l.timer != nil {
		l.timer.Stop()
	}
	if age := l.age; l.most > 1 {
		l.work.Go("further connections to an NBD server", func() { l.more(age, e) })
	}
}

// +checklocks:l.mu
func (l *link) runLocked(nc net.Conn, e *export) {
	c := newConn(nc, e, l.clock)
	for range l.holds {
		c.hurry()
	}
	l.conns = append(l.conns, c)
	l.work.Go("an NBD client", func() { c.run(func(err error) { l.lost(c, err) }) })
}

// +checklocks:l.mu
func (l *link) becomeLocked(s state) {
	l.state = s
	close(l.changed)
	l.changed = make(chan struct{})
}

// do has a request executed by whatever connection there is. A flush on one of several counts for
// all of them: servers that take several say so.
func (l *link) do(r *blk.Req, q nbdwire.Request, b body) (nbdwire.Extent, error) {
	if r.NoWait {
		return nbdwire.Extent{}, blk.ErrWouldBlock
	}
	before := l.written.Load()
	for sends := range maxSends {
		c, age, err := l.get(r, sends > 0)
		if err != nil {
			return nbdwire.Extent{}, err
		}
		x, lost, err := c.do(r, q, b)
		if c.load.Add(-1); !lost {
			switch {
			case err != nil:
			case q.Cmd == nbdwire.CmdFlush:
				l.flushed.Store(before)
			case q.Cmd != nbdwire.CmdRead && q.Cmd != nbdwire.CmdBlockStatus && q.Flags&nbdwire.CmdFlagFUA == 0:
				l.written.Add(1)
			}
			return x, err
		}
		if l.delay == 0 && !l.sameAge(age) {
			break
		}
	}
	return nbdwire.Extent{}, syscall.EIO
}

// get is a connection in use, or the next one if requests may wait for it, and its age. Without
// one, a request that was not sent yet asks for the next. It counts in the load of the connection.
func (l *link) get(r *blk.Req, again bool) (c *conn, age int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.state == waiting && l.holds == 0 {
		changed := l.changed
		l.waiting++
		l.mu.Unlock()
		select {
		case <-changed:
		case <-r.Done():
			err = syscall.ECANCELED
		}
		l.mu.Lock()
		if l.waiting--; err != nil {
			return nil, 0, err
		}
	}
	if l.state == connected {
		return l.pickLocked(), l.age, nil
	}
	if l.state == offline && !again {
		l.tryLocked()
	}
	return nil, 0, syscall.EIO
}

// lost is told that a connection has ended.
func (l *link) lost(c *conn, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	last, answered := l.leaveLocked(c, err)
	if l.state == closed || !last {
		return
	}
	var breach protocolError
	if errors.As(err, &breach) {
		slog.Error("an NBD server has broken the protocol", "node", l.node, "error", err)
		l.becomeLocked(broken)
		return
	}
	slog.Warn("the connection to an NBD server is lost", "node", l.node, "error", err,
		"unflushed", l.written.Load() != l.flushed.Load())
	if l.delay == 0 {
		l.becomeLocked(offline)
		return
	}
	now := l.clock.Now()
	lasted := answered || now.Sub(c.born) >= lastPause // else it is as if the server had not come back
	if lasted {
		l.pause = 0
	}
	if lasted || !c.asked || l.until.IsZero() {
		l.until = now.Add(l.delay)
	}
	l.becomeLocked(waiting)
	left := max(l.until.Sub(now), 0)
	if l.timer == nil {
		l.timer = l.clock.AfterFunc("the reconnect-delay of an NBD client", left, l.tooLate)
	} else {
		l.timer.Reset(left)
	}
	l.tryLocked()
}

// tooLate lets the requests fail that wait for a server.
func (l *link) tooLate() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == waiting && !l.clock.Now().Before(l.until) { // not that of another wait
		l.becomeLocked(offline)
	}
}

// tryLocked connects again, in the background.
// +checklocks:l.mu
func (l *link) tryLocked() {
	if !l.trying {
		l.trying = true
		l.work.Go("an attempt to reach an NBD server", l.try)
	}
}

// try connects again: once, or with a reconnect-delay until the server is there.
func (l *link) try() {
	for {
		if l.delay > 0 {
			l.rest()
		}
		if l.tryOnce() {
			return
		}
	}
}

// rest makes the pause before an attempt.
func (l *link) rest() {
	l.mu.Lock()
	pause := l.pause
	l.pause = min(max(2*pause, firstPause), lastPause)
	l.mu.Unlock()
	if pause == 0 {
		return
	}
	over := make(chan struct{})
	t := l.clock.AfterFunc("a pause of an NBD client", pause, func() { close(over) })
	select {
	case <-over:
	case <-l.ctx.Done():
		t.Stop()
	}
}

// tryOnce tells whether that was the last attempt.
func (l *link) tryOnce() bool {
	nc, e, err := l.dial(l.ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil && l.state != closed && l.fits(e):
		slog.Info("connected to an NBD server again", "node", l.node)
		l.useLocked(nc, e)
		l.trying = false
		return true
	case err == nil:
		_ = nc.Close()
		if l.state != closed {
			slog.Warn("an NBD server has come back with another export", "node", l.node)
		}
	}
	if l.state == closed || l.delay == 0 {
		l.trying = false
		return true
	}
	return false
}

// hold lets no request wait for a server any more, be it for its answer when it is silent, or for
// its return. release takes that back.
func (l *link) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.holds++
	for _, c := range l.conns {
		c.hurry()
	}
	if l.state == waiting {
		l.becomeLocked(waiting) // wakes them
	}
}

func (l *link) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.holds--
	for _, c := range l.conns {
		c.relax()
	}
}

// quiet tells that no request waits for a server to come back.
func (l *link) quiet() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.waiting == 0
}

// close ends the connections. No request runs.
func (l *link) close() {
	l.mu.Lock()
	conns := l.conns
	l.conns = nil
	l.becomeLocked(closed)
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	l.cancel()
	for _, c := range conns {
		c.bye()
		c.kill(errClosed)
	}
	l.work.Wait()
}
