package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"qblockd/events/panics"
)

// tuneMemory makes the collector come earlier than Go's default: requests allocate nothing, so its
// work is small, and garbage of commands would double what thousands of nodes take. GOGC in the
// environment wins.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
}

// returner gives memory back to the system.
type returner struct {
	mu sync.Mutex
	// not before
	next time.Time // +checklocks:mu
	// a timer is set
	pending bool // +checklocks:mu
}

// giveBack returns memory to the system that only clients needed, all of which are gone. The
// collector alone would keep it for minutes: an idle daemon allocates nothing. It takes a
// twentieth of the time at most; who comes too early does not wait, but is served later.
func (r *returner) giveBack() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if wait := time.Until(r.next); wait > 0 {
		if !r.pending {
			r.pending = true
			panics.AfterFunc("giving back memory", wait, func() {
				r.mu.Lock()
				r.pending = false
				r.mu.Unlock()
				r.giveBack()
			})
		}
		return
	}
	start := time.Now()
	runtime.GC() // pools let go of their content at the second collection
	debug.FreeOSMemory()
	r.next = time.Now().Add(max(20*time.Since(start), 100*time.Millisecond))
}
