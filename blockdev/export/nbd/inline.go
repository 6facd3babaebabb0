package nbd

import (
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/events/panics"
)

// A client that has one request under way at a time is answered sooner if no goroutine has to wake
// another one for it: then the reader serves even what has to wait. So that it does not keep the
// client's next request waiting, somebody else goes on reading when that takes longer than
// aloneTime, at most twice as long.
const aloneTime = time.Millisecond

// manyAlone is after how many requests that came alone the reader serves the next ones itself.
const manyAlone = 16

// errPassedOn is no error: somebody else is the reader now.
var errPassedOn = errors.New("the reader is another goroutine")

// alone is what the reader knows of clients with one request at a time.
type alone struct {
	count int // of requests that came alone, one after the other
	// serving is the number of the request that the reader serves itself, 0 of none. Whoever makes
	// it 0 is the reader: who has served it, or the timer.
	serving atomic.Uint64
	last    uint64
	// ticking: the timer runs, and looks each time whether serving is still what it has seen. One
	// timer a request would cost as much as waking a worker.
	ticking atomic.Bool
	seen    uint64
	timer   *time.Timer
	done    chan error // what the last reader has found

	pending int
	look    func(fd uintptr)
}

func (a *alone) init(r *reader) {
	a.done = make(chan error, 1)
	a.timer = panics.AfterFunc("the reader of an NBD connection", time.Hour, r.tick)
	a.timer.Stop()
	a.look = func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		if a.pending = n; err != nil {
			a.pending = 0
		}
	}
}

// serve reads and serves requests until the transmission is over, which it tells done, or until
// somebody else goes on with it.
func (r *reader) serve() {
	if err := talk(r.run); err != errPassedOn {
		r.alone.done <- err
	}
}

// tick makes the timer's goroutine the reader if the request that is served takes long.
func (r *reader) tick() {
	a := &r.alone
	n := a.serving.Load()
	if n != 0 && n == a.seen && a.serving.CompareAndSwap(n, 0) {
		a.count = 0
		a.ticking.Store(false)
		r.serve()
		return
	}
	idle := n == a.seen
	a.seen = n
	if idle {
		if a.ticking.Store(false); a.serving.Load() == 0 || !a.ticking.CompareAndSwap(false, true) {
			return
		}
	}
	a.timer.Reset(aloneTime)
}

// isAlone tells whether a request, which is to be served next, is one of many that came alone.
func (r *reader) isAlone(cost int64) bool {
	a := &r.alone
	if r.tls || r.r < r.w || cost >= mapMin || r.exp.group() != nil ||
		!r.workers.none() {
		a.count = 0
		return false
	}
	a.count++
	return a.count > manyAlone
}

// serveAlone serves j here. With errPassedOn somebody else is the reader.
func (r *reader) serveAlone(j *job) error {
	if err := r.sender.flush(); err != nil {
		j.free()
		return err
	}
	a := &r.alone
	a.last++
	n := a.last
	r.workers.take(j)
	a.serving.Store(n)
	if a.ticking.CompareAndSwap(false, true) {
		a.timer.Reset(aloneTime)
	}
	p := r.workers.answer(j)
	if !a.serving.CompareAndSwap(n, 0) {
		r.sender.put(p)
		return errPassedOn
	}
	a.pending = 0
	if r.raw.Control(a.look) == nil && a.pending > 0 {
		a.count = 0 // it did not wait for the answer
	}
	r.sender.put(p)
	return nil
}
