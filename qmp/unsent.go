package qmp

import (
	"context"
	"sync/atomic"
	"time"

	"qblockd/events/panics"
)

// DefaultAllUnsent is what the clients of a dispatcher together may leave unread, in bytes.
const DefaultAllUnsent = 256 << 20

const (
	// largeReply is the size from which replies are made one at a time, and only when there is room
	// for them.
	largeReply = 1 << 20
	// roomDelay is how long a large reply waits for clients that do read; then the one that has
	// most to read is disconnected. One that has taken nothing for as long is so at once.
	roomDelay = 2 * time.Second
	// lookDelay is how often it is looked at who has taken something.
	lookDelay = 100 * time.Millisecond
)

// unsent counts what the clients of a dispatcher have not read, all together: however many there
// are, and whatever they ask for, it is bounded.
type unsent struct {
	limit int64
	delay time.Duration // roomDelay, but for tests
	bytes atomic.Int64
	large chan struct{} // has one element, which who makes a large reply takes until that is queued
	sank  chan struct{} // of capacity 1: bytes sank
	tight atomic.Int32  // above 0: somebody disconnects clients now; how often that was asked for since
}

func (u *unsent) init() {
	u.limit, u.delay = DefaultAllUnsent, roomDelay
	u.large, u.sank = make(chan struct{}, 1), make(chan struct{}, 1)
	u.large <- struct{}{}
}

func (u *unsent) add(n int) {
	u.bytes.Add(int64(n))
	if n < 0 {
		select {
		case u.sank <- struct{}{}:
		default:
		}
	}
}

// countLocked tells the dispatcher what the client has not read now.
//
// +checklocks:s.out.mu
func (s *Session) countLocked() {
	o := &s.out
	n := len(o.pending) + o.taken
	if o.closed {
		n = 0 // it goes as soon as the writer hears of it
	}
	if d := n - o.counted; d != 0 {
		o.counted = n
		s.d.unsent.add(d)
	}
}

// LargeReply is called by a handler before it makes a reply of about n bytes. If that is much, it
// waits until no other is made and until there is room for it in what all clients together may
// leave unread; clients that do not read are disconnected for it. It fails if the client is gone,
// or does not read itself.
func LargeReply(ctx context.Context, n int64) error {
	s, ok := ctx.Value(sessionKey{}).(*Session)
	if !ok || n < largeReply || s.making {
		return nil
	}
	u := &s.d.unsent
	select {
	case <-u.large:
		s.making = true
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	look := time.NewTicker(min(lookDelay, u.delay))
	defer look.Stop()
	for begun := time.Now(); u.bytes.Load() > 0 && u.bytes.Load()+n > u.limit; {
		stuck := time.Now().Add(-u.delay)
		since, late := stuck, begun.Before(stuck)
		if late {
			since = time.Now() // those who do read have had their time
		}
		switch {
		case s.d.dropLargest(s, since):
			continue
		case late && s.out.hasLeft(stuck) > 0:
			// It asks for more and does not read what it has got. Others wait to make theirs.
			s.overflow()
			s.made()
			return errOverflow
		}
		select {
		case <-u.sank:
		case <-look.C:
		case <-ctx.Done():
			s.made()
			return context.Cause(ctx)
		}
	}
	return nil
}

// made ends what LargeReply has begun; the reply is queued, or there is none.
func (s *Session) made() {
	if s.making {
		s.making = false
		s.d.unsent.large <- struct{}{}
	}
}

// relieve disconnects those that have most to read until the rest, but for one reply that is being
// read, is within the limit. It does not wait.
func (d *Dispatcher) relieve() {
	u := &d.unsent
	if u.bytes.Load() <= u.limit || u.tight.Add(1) > 1 {
		return
	}
	// Not here: the caller may hold the event bus.
	panics.Go("the limit of what is unsent", func() {
		for n := int32(1); n > 0; n = u.relieved(n) {
			d.dropUnsent()
		}
	}, func(error) { u.tight.Store(0) })
}

// relieved ends what relieve has begun: 0. If that was asked for again, after the n times before a
// look at what is unsent, it goes on, and how often it was is returned.
func (u *unsent) relieved(n int32) int32 {
	if u.tight.CompareAndSwap(n, 0) {
		return 0
	}
	return u.tight.Load()
}

// dropUnsent disconnects clients as relieve says.
func (d *Dispatcher) dropUnsent() {
	for u := &d.unsent; u.bytes.Load() > u.limit; {
		now := time.Now()
		if d.dropLargest(nil, now.Add(-u.delay)) {
			continue
		}
		if u.bytes.Load()-d.largestReply() <= u.limit || !d.dropLargest(nil, now) {
			return
		}
	}
}

// dropLargest disconnects the client, but not except, that has most to read of those that have
// taken nothing since that time; false if there is none.
func (d *Dispatcher) dropLargest(except *Session, since time.Time) bool {
	var most *Session
	bytes := 0
	d.stopMu.Lock()
	for s := range d.sessions {
		if n := s.out.hasLeft(since); s != except && n > bytes {
			most, bytes = s, n
		}
	}
	d.stopMu.Unlock()
	if most == nil {
		return false
	}
	most.overflow()
	return true
}

// largestReply is the length of the largest reply that a client has not read.
func (d *Dispatcher) largestReply() (n int64) {
	d.stopMu.Lock()
	defer d.stopMu.Unlock()
	for s := range d.sessions {
		s.out.mu.Lock()
		n = max(n, int64(min(s.out.large, s.out.counted)))
		s.out.mu.Unlock()
	}
	return n
}

// hasLeft is what the client has not read, if it has taken nothing since that time.
func (o *output) hasLeft(since time.Time) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || o.moved.After(since) {
		return 0
	}
	return o.counted
}

// overflow disconnects a client that does not read.
func (s *Session) overflow() {
	o := &s.out
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return
	}
	o.closed = true
	left := o.unsentLocked()
	if !o.writing {
		o.pending = nil
	}
	s.countLocked()
	o.mu.Unlock()
	n := s.mon.overflows.Add(1)
	s.d.log().Warn("monitor client does not read, disconnecting it", "unsent", left, "so far", n)
	s.fail(errOverflow)
}
