// Package clock is the time that limits and intervals run on, so that tests can drive it. For how
// long a client or the storage is waited for is real time, and does not come from here.
package clock

import (
	"slices"
	"sync"
	"time"

	"qblockd/events/panics"
)

// Clock tells the time and calls back.
type Clock interface {
	Now() time.Time
	// AfterFunc calls f, which does what, in a goroutine of its own when d has passed.
	AfterFunc(what string, d time.Duration, f func()) Timer
}

// Timer is set to call once; *time.Timer is one.
type Timer interface {
	Reset(d time.Duration) bool
	Stop() bool
}

// Real is the system's clock.
var Real Clock = realClock{}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(what string, d time.Duration, f func()) Timer {
	return panics.AfterFunc(what, d, f)
}

// Manual is a clock for tests: it stands still until it is moved, and timers call in the goroutine
// that moves it.
type Manual struct {
	mu  sync.Mutex
	now time.Time
	// timers are those that are set.
	timers []*manualTimer // +checklocks:mu
}

type manualTimer struct {
	c  *Manual
	f  func()
	at time.Time
}

// NewManual makes a clock that stands at now.
func NewManual(now time.Time) *Manual { return &Manual{now: now} }

// Now implements Clock.
func (c *Manual) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// AfterFunc implements Clock.
func (c *Manual) AfterFunc(_ string, d time.Duration, f func()) Timer {
	t := &manualTimer{c: c, f: f}
	t.Reset(d)
	return t
}

// Reset implements Timer. What is due already is called when the clock moves next.
func (t *manualTimer) Reset(d time.Duration) bool {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	was := t.stopLocked()
	t.at = t.c.now.Add(d)
	t.c.timers = append(t.c.timers, t)
	return was
}

// Stop implements Timer.
func (t *manualTimer) Stop() bool {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	return t.stopLocked()
}

// +checklocks:t.c.mu
func (t *manualTimer) stopLocked() bool {
	n := len(t.c.timers)
	t.c.timers = slices.DeleteFunc(t.c.timers, func(x *manualTimer) bool { return x == t })
	return len(t.c.timers) < n
}

// Pending is how many timers are set.
func (c *Manual) Pending() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.timers)
}

// Advance lets d pass at once; then timers that are due call.
func (c *Manual) Advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	later := func(t *manualTimer) bool { return t.at.After(c.now) }
	due := slices.DeleteFunc(slices.Clone(c.timers), later)
	c.timers = slices.DeleteFunc(c.timers, func(t *manualTimer) bool { return !later(t) })
	c.mu.Unlock()
	for _, t := range due {
		t.f()
	}
}

// Step lets d pass by way of each moment that a timer is set to.
func (c *Manual) Step(d time.Duration) {
	end := c.Now().Add(d)
	for {
		next := end
		c.mu.Lock()
		more := false
		for _, t := range c.timers {
			if !t.at.After(next) {
				next, more = t.at, true
			}
		}
		d := max(next.Sub(c.now), 0)
		c.mu.Unlock()
		if c.Advance(d); !more {
			return
		}
	}
}
