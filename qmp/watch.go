package qmp

import (
	"sync"
	"sync/atomic"
	"time"

	"qblockd/events/panics"
)

// watch looks after commands that take long: answers to the requests before them are sent
// without waiting for them, and the end of their client is noticed. For commands that do not,
// it costs a few atomic operations: one timer serves all commands of a millisecond.
type watch struct {
	s     *Session
	seq   atomic.Uint64 // odd while a command is executed; each command has its own odd number
	armed atomic.Bool   // the timer runs or tick does
	timer *time.Timer

	mu sync.Mutex
	// seq at the last tick
	seen uint64 // +checklocks:mu
	// closed by the goroutine in WaitHangup; nil: none
	waiting chan struct{} // +checklocks:mu
	closed  bool          // +checklocks:mu
}

func (w *watch) init(s *Session) {
	w.s = s
	w.timer = panics.AfterFunc("the watch over a QMP command", time.Hour, w.tick)
	w.timer.Stop()
}

// begin is called before a command is executed.
func (w *watch) begin() {
	w.seq.Add(1)
	if w.armed.CompareAndSwap(false, true) {
		w.timer.Reset(flushDelay)
	}
}

// end is called when the command is done.
func (w *watch) end() {
	w.seq.Add(1)
	w.mu.Lock()
	waiting := w.waiting
	w.mu.Unlock()
	if waiting != nil {
		w.s.hang.StopWait()
		<-waiting
		w.mu.Lock()
		w.waiting = nil
		w.mu.Unlock()
	}
}

// tick runs when the timer fires.
func (w *watch) tick() {
	w.s.startWriter()
	w.mu.Lock()
	defer w.mu.Unlock()
	seq := w.seq.Load()
	switch {
	case w.closed:
		return
	case seq%2 == 0:
		w.armed.Store(false)
		if w.seq.Load()%2 == 1 && w.armed.CompareAndSwap(false, true) {
			w.timer.Reset(flushDelay)
		}
		return
	case seq != w.seen:
		w.seen = seq
		w.timer.Reset(slowDelay)
		return
	}
	// The same command for the second time. The timer stays armed and silent until it ends.
	if w.s.hang != nil && w.waiting == nil && (!w.s.oob.Load() || w.s.eof.Load()) {
		w.waiting = make(chan struct{})
		waiting := w.waiting
		panics.Go("the watch over a QMP client", func() { w.wait(waiting) }, nil)
	}
	w.timer.Reset(slowDelay)
}

func (w *watch) wait(done chan struct{}) {
	defer close(done)
	if w.s.hang.WaitHangup() {
		w.s.cancel(errGone)
	}
}

// close ends the ticking; no command is executed any more.
func (w *watch) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.timer.Stop()
}
