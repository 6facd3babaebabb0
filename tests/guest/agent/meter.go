package main

import (
	"fmt"
	"sync"
	"time"
)

// meter counts operations, keeps the longest of them, and what was found to be wrong.
type meter struct {
	mu      sync.Mutex
	ops     int64
	longest time.Duration
	what    string
	bad     []string
	over    bool
	moved   chan struct{} // closed at the next operation; nil if nobody waits
}

// maxFaults is how many are told of.
const maxFaults = 5

// time does f, which is one operation.
func (m *meter) time(what string, f func() error) {
	start := time.Now()
	err := f()
	took := time.Since(start)
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

// take are the figures; the longest operation is that since the last call.
func (m *meter) take() (ops, wait int64, what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ops, wait, what = m.ops, int64(m.longest), m.what
	m.longest, m.what = 0, ""
	return ops, wait, what
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
