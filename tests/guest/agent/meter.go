package main

import (
	"fmt"
	"sync"
	"time"
)

// meter counts operations, keeps the longest of those that are one request of the disk, and what
// was found to be wrong.
type meter struct {
	mu      sync.Mutex
	ops     int64
	longest time.Duration
	what    string
	pause   time.Duration // longest time that the machine stood still for
	bad     []string
	over    bool
	moved   chan struct{} // closed at the next operation; nil if nobody waits
}

// maxFaults is how many are told of.
const maxFaults = 5

// time does f, which is one request.
func (m *meter) time(what string, f func() error) {
	start := time.Now()
	err := f()
	m.done(what, err, time.Since(start))
}

// count does f, which is any number of requests.
func (m *meter) count(what string, f func() error) { m.done(what, f(), 0) }

// done is called when an operation has ended.
func (m *meter) done(what string, err error, took time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ops++
	if took > m.longest {
		m.longest, m.what = took, what
	}
	if m.moved != nil {
		close(m.moved)
		m.moved = nil
	}
	if err != nil {
		m.faultLocked(what + ": " + err.Error())
	}
}

func (m *meter) fault(format string, a ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faultLocked(fmt.Sprintf(format, a...))
}

func (m *meter) faultLocked(s string) {
	m.over = true
	if len(m.bad) < maxFaults {
		m.bad = append(m.bad, s)
	}
}

func (m *meter) faults() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bad
}

// take puts the figures into r; the longest request is that since the last call.
func (m *meter) take(r *Answer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r.Ops, r.Wait, r.What, r.Pause = m.ops, int64(m.longest), m.what, int64(m.pause)
	m.longest, m.what, m.pause = 0, "", 0
}

// tick is how often watch looks.
const tick = 5 * time.Millisecond

// watch finds out how long the machine stands still, by sleeping for a short time again and again:
// what takes longer because nobody runs the guest is not to be blamed on its disk.
func (m *meter) watch() {
	for last := time.Now(); ; {
		time.Sleep(tick)
		now := time.Now()
		m.mu.Lock()
		m.pause = max(m.pause, now.Sub(last)-tick)
		m.mu.Unlock()
		last = now
	}
}

// stop ends the load; it does not wait for it.
func (m *meter) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over = true
}

// stopped tells that there is to be no further operation: somebody said so, or something is wrong.
func (m *meter) stopped() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.over
}

// await waits for that many more operations.
func (m *meter) await(n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for goal := m.ops + n; m.ops < goal && !m.over; {
		if m.moved == nil {
			m.moved = make(chan struct{})
		}
		moved := m.moved
		m.mu.Unlock()
		select {
		case <-moved:
		case <-time.After(patience):
		}
		m.mu.Lock()
		if m.moved == moved {
			return fmt.Errorf("no operation has ended for %v", patience)
		}
	}
	return nil
}
