package qmp

import (
	"sync"
	"time"

	"qblockd/events/panics"
	"qblockd/schema/value"
)

// output is the queue of what is to be sent to the client.
//
// At any time at most one goroutine writes to the connection: the one that set writing. It owns
// the buffer it writes; what comes in the meantime gathers in pending.
type output struct {
	mu      sync.Mutex
	changed sync.Cond // unsent sank, or the session ended
	// not yet taken by a writer
	pending []byte // +checklocks:mu
	// empty, for the next pending
	spare []byte // +checklocks:mu
	// bytes that the writer has taken and not yet written
	inFlight int // +checklocks:mu
	// length of the buffer that the writer has
	taken int // +checklocks:mu
	// when the client last took something, or began to have something to take
	moved time.Time // +checklocks:mu
	// what the dispatcher knows of; see countLocked
	counted int  // +checklocks:mu
	writing bool // +checklocks:mu
	// length of the largest reply queued since the queue was empty
	large int // +checklocks:mu
	// largest number of bytes unsent
	most int // +checklocks:mu
	// nothing more is sent
	closed bool // +checklocks:mu
}

// +checklocks:o.mu
func (o *output) unsentLocked() int { return len(o.pending) + o.inFlight }

// writeChunk is how much is written in one call when the client is slow.
const writeChunk = 256 << 10

// send queues one message. It never blocks. The message is not sent before flush or startWriter. A
// reply of more than keepOut is not the caller's any more.
func (s *Session) send(line []byte, reply bool) {
	o := &s.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	if reply {
		o.large = max(o.large, len(line))
	} else if o.unsentLocked()+len(line) > s.mon.opts.Limits.Unsent+o.large {
		o.closed = true
		n := s.mon.overflows.Add(1)
		s.d.log().Warn("monitor client does not read, disconnecting it", "unsent", o.unsentLocked(), "so far", n)
		// Not here: the caller may hold the event bus.
		panics.Go("the end of a QMP client", func() { s.fail(errOverflow) }, nil)
		return
	}
	if o.unsentLocked() == 0 {
		o.moved = time.Now()
	}
	switch {
	case s.mon.opts.Pretty:
		o.pending = value.Indent(o.pending, line, "\r\n")
	case reply && len(line) > keepOut && len(o.pending) == 0:
		o.pending = line // the caller has no more use for it
	default:
		o.pending = append(o.pending, line...)
	}
	o.pending = append(o.pending, '\r', '\n')
	o.most = max(o.most, o.unsentLocked())
	s.countLocked()
	s.d.relieve()
}

// takeLocked makes the caller the writer and gives it what is pending; nil if there is
// another writer or nothing to write.
//
// +checklocks:o.mu
func (o *output) takeLocked() []byte {
	if o.writing || len(o.pending) == 0 || o.closed {
		return nil
	}
	o.writing = true
	buf := o.pending
	o.pending, o.spare = o.spare, nil
	o.inFlight, o.taken, o.moved = len(buf), len(buf), time.Now()
	return buf
}

// doneLocked gives back a buffer that has been written, by the writer, and returns the next; nil
// ends being the writer.
//
// +checklocks:o.mu
func (o *output) doneLocked(buf []byte) []byte {
	o.inFlight, o.taken = 0, 0
	if o.spare == nil && cap(buf) <= keepOut {
		o.spare = buf[:0]
	}
	o.writing = false
	if len(o.pending) == 0 {
		o.large = 0
	}
	o.changed.Broadcast()
	return o.takeLocked()
}

// flush sends what is queued, without waiting for the client.
func (s *Session) flush() {
	o := &s.out
	o.mu.Lock()
	buf := o.takeLocked()
	o.mu.Unlock()
	if buf == nil {
		return
	}
	if s.try == nil {
		s.startWrite(buf, 0)
		return
	}
	n, err := s.try.TryWrite(buf)
	if err != nil {
		s.stopOutput()
		s.fail(err)
		return
	}
	if n < len(buf) {
		o.mu.Lock()
		o.inFlight -= n
		o.mu.Unlock()
		s.startWrite(buf, n)
		return
	}
	o.mu.Lock()
	next := o.doneLocked(buf)
	s.countLocked()
	o.mu.Unlock()
	if next != nil {
		s.startWrite(next, 0)
	}
}

// startWriter has what is queued sent by another goroutine. It never blocks.
func (s *Session) startWriter() {
	s.out.mu.Lock()
	buf := s.out.takeLocked()
	s.out.mu.Unlock()
	if buf != nil {
		s.startWrite(buf, 0)
	}
}

// startWrite is write in a goroutine of its own.
func (s *Session) startWrite(buf []byte, n int) {
	panics.Go("output to a QMP client", func() { s.write(buf, n) }, func(err error) {
		s.fail(err)
		s.stopOutput()
	})
}

// write sends buf[n:] and what gathers meanwhile, waiting for the client. The caller has made
// it the writer.
func (s *Session) write(buf []byte, n int) {
	o := &s.out
	for buf != nil {
		for n < len(buf) {
			m, err := s.conn.Write(buf[n:min(n+writeChunk, len(buf))])
			if err != nil {
				s.fail(err)
				s.stopOutput()
				return
			}
			n += m
			o.mu.Lock()
			o.inFlight -= m
			o.moved = time.Now()
			o.changed.Broadcast()
			o.mu.Unlock()
		}
		o.mu.Lock()
		buf, n = o.doneLocked(buf), 0
		s.countLocked()
		o.mu.Unlock()
	}
}

// stopOutput drops all output, now and later. The caller is the writer, and ceases to be it.
func (s *Session) stopOutput() {
	o := &s.out
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed, o.writing = true, false
	o.pending, o.spare, o.inFlight, o.taken = nil, nil, 0, 0
	s.countLocked()
	o.changed.Broadcast()
}

// awaitRoom waits until the client has taken enough of what was sent to it that more may be
// executed. False means that nothing more is to be.
func (s *Session) awaitRoom() bool {
	o := &s.out
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		switch {
		case o.closed, s.base.Err() != nil, s.d.Stopped():
			return false
		case o.unsentLocked() <= s.mon.opts.Limits.HoldInput:
			return true
		}
		if buf := o.takeLocked(); buf != nil {
			s.startWrite(buf, 0)
		}
		o.changed.Wait()
	}
}

// waitSent waits until all is sent, the client is gone, or limit (0: none) has passed.
func (s *Session) waitSent(limit time.Duration) {
	o := &s.out
	late := false // guarded by o.mu
	if limit > 0 {
		t := panics.AfterFunc("a wait for a QMP client", limit, func() {
			o.mu.Lock()
			late = true
			o.changed.Broadcast()
			o.mu.Unlock()
		})
		defer t.Stop()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.unsentLocked() > 0 && !o.closed && !late && s.base.Err() == nil {
		if buf := o.takeLocked(); buf != nil {
			s.startWrite(buf, 0)
		}
		o.changed.Wait()
	}
}

// waitWriter waits until nobody writes; the connection is closed.
func (s *Session) waitWriter() {
	o := &s.out
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.writing {
		o.changed.Wait()
	}
	o.closed, o.pending = true, nil
	s.countLocked()
}
