package qmp

import (
	"sync"

	"qblockd/events/panics"
	"qblockd/schema/value"
)

// queued is what the parser yielded: a value or a syntax error.
type queued struct {
	v   value.Value
	err error
}

// requestQueue holds the in-band requests of a session with oob enabled, and runs the goroutine
// that executes them.
type requestQueue struct {
	mu      sync.Mutex
	changed sync.Cond
	// at most maxQueued
	items []queued // +checklocks:mu
	// the goroutine was started
	started bool // +checklocks:mu
	// nothing more will be put
	ending bool // +checklocks:mu
	// the goroutine has ended
	done bool // +checklocks:mu
}

// running tells whether requests are executed by the queue's goroutine.
func (q *requestQueue) running() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.started
}

// put queues a request and waits until there is room for another one. False means that nothing
// more will be executed.
func (q *requestQueue) put(s *Session, r queued) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.started {
		q.started = true
		panics.Go("the requests of a QMP client", func() { q.run(s) }, s.fail)
	}
	q.items = append(q.items, r)
	q.changed.Broadcast()
	for len(q.items) >= maxQueued && !q.done {
		q.changed.Wait()
	}
	return !q.done
}

// run executes requests until the queue is closed and empty, or the session ends.
func (q *requestQueue) run(s *Session) {
	defer func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.done, q.items = true, nil
		q.changed.Broadcast()
	}()
	for {
		r, ok := q.take(s)
		if !ok || !s.execute(r) {
			break
		}
	}
	s.flush()
}

// take waits for the next request; what was answered is sent before.
func (q *requestQueue) take(s *Session) (queued, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) == 0 {
		q.mu.Unlock()
		s.flush()
		q.mu.Lock()
		if len(q.items) > 0 {
			break
		}
		if q.ending || s.base.Err() != nil {
			return queued{}, false
		}
		q.changed.Wait()
	}
	r := q.items[0]
	copy(q.items, q.items[1:])
	q.items[len(q.items)-1] = queued{}
	q.items = q.items[:len(q.items)-1]
	q.changed.Broadcast()
	return r, true
}

// close waits until what was put is executed and the goroutine has ended.
func (q *requestQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ending = true
	q.changed.Broadcast()
	for q.started && !q.done {
		q.changed.Wait()
	}
}
