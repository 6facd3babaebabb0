package clock

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"
)

// TestManual: timers call when their time has come, once, unless they are stopped or set anew.
func TestManual(t *testing.T) {
	for _, step := range []bool{false, true} {
		start := time.Unix(7, 0)
		c := NewManual(start)
		got := ""
		note := func(name string) func() {
			return func() { got += fmt.Sprint(name, c.Now().Sub(start).Seconds(), " ") }
		}
		c.AfterFunc("", time.Second, note("a"))
		b := c.AfterFunc("", 2*time.Second, note("b"))
		x := c.AfterFunc("", 2*time.Second, note("x"))
		if !x.Stop() || x.Stop() {
			t.Error("a timer is stopped once")
		}
		again := c.AfterFunc("", time.Hour, nil)
		again.Stop()
		var every Timer
		every = c.AfterFunc("", 3*time.Second, func() { note("e")(); every.Reset(3 * time.Second) })
		move := c.Advance
		want := "a3 b3 e3 e7 "
		if step {
			move, want = c.Step, "a1 b2 e3 e6 "
		}
		move(3 * time.Second)
		move(4 * time.Second)
		if got != want || c.Pending() != 1 || c.Now() != start.Add(7*time.Second) {
			t.Errorf("step %v: %s, want %s; %d timers", step, got, want, c.Pending())
		}
		if b.Reset(time.Second) {
			t.Error("a timer that has called was set")
		}
	}
}

// TestManualShared: one goroutine moves the clock while others set a timer anew.
func TestManualShared(t *testing.T) {
	c := NewManual(time.Unix(7, 0))
	timer := c.AfterFunc("", time.Second, func() {})
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					timer.Reset(time.Second)
				}
			}
		})
	}
	for range 3000 {
		c.Advance(time.Second)
		if n := c.Pending(); n > 1 {
			t.Errorf("one timer is set %d times", n)
			break
		}
		runtime.Gosched()
	}
	close(stop)
	all.Wait()
}
