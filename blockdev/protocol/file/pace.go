package file

import (
	"sync/atomic"
	"time"
)

// The rule for plain writes in line (package doc, Waiting).
const (
	inlineMax    = 128 << 10
	inlineCalls  = 4
	shortRun     = 16
	shortLatency = 500 * time.Microsecond
)

// pace decides whether a buffered write may be tried without a worker: only while a run of
// recent ones was short, and never by more than inlineCalls callers at once, so a stall
// that begins (dirty throttling, a journal commit) holds up at most so many.
type pace struct {
	run    atomic.Int32 // consecutive short writes, up to shortRun
	inside atomic.Int32 // 0 <= inside <= inlineCalls but for the moment of a refused begin
}

// note records how long a write took.
func (p *pace) note(t time.Duration) {
	if t > shortLatency {
		p.run.Store(0)
	} else if n := p.run.Load(); n < shortRun {
		p.run.CompareAndSwap(n, n+1)
	}
}

// begin asks for leave to write in line; if it is given, end must follow.
func (p *pace) begin() bool {
	if p.run.Load() < shortRun {
		return false
	}
	if p.inside.Add(1) > inlineCalls {
		p.inside.Add(-1)
		return false
	}
	return true
}

func (p *pace) end(t time.Duration) {
	p.inside.Add(-1)
	p.note(t)
}
