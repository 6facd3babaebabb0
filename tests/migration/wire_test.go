package migration

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// wire passes connections on to the target, and is cut: when so many bytes have passed, wherever in
// a message that is.
type wire struct {
	h  *hosts
	l  net.Listener
	to string

	work sync.WaitGroup
	mu   sync.Mutex
	// what is still to come, the next first
	cuts []cut // +checklocks:mu
	// bytes that have passed, in both directions
	passed int64 // +checklocks:mu
	// pairs of connections
	open map[*link]bool // +checklocks:mu
	// until when nobody gets through
	down time.Time // +checklocks:mu
	// the end of the test
	closed bool // +checklocks:mu
}

// cut is one loss of the wire.
type cut struct {
	at   int64 // bytes
	how  how
	down time.Duration // nobody gets through again before that
}

// how a wire is cut.
type how int

const (
	ended     how = iota // both sides are told that no more comes
	reset                // both sides get an error
	half                 // the source is told, the target only later
	silent               // nothing passes any more for a while, then it is reset
	unplugged            // nothing passes any more for a while, and nobody is told
	hows
)

func (c cut) String() string {
	return fmt.Sprintf("%s at %d for %v", [...]string{"ended", "reset", "half", "silent", "unplugged"}[c.how], c.at, c.down)
}

// randomCut is one within so many bytes.
func randomCut(r *rand.Rand, within int64) cut {
	return cut{r.Int64N(within), how(r.IntN(int(hows))), time.Duration(r.IntN(700)) * time.Millisecond}
}

// link is a connection of the source and the one to the target.
type link struct{ source, target net.Conn }

// newWire listens on the source's machine and passes on to port.
func newWire(t testing.TB, h *hosts, port string) *wire {
	w := &wire{h: h, to: net.JoinHostPort(h.addr, port), open: map[*link]bool{}}
	h.on(h.source, func() {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		w.l = l
	})
	w.work.Go(w.accept)
	t.Cleanup(w.close)
	return w
}

// port is where the source connects to.
func (w *wire) port() string { return fmt.Sprint(w.l.Addr().(*net.TCPAddr).Port) }

func (w *wire) close() {
	w.mu.Lock()
	w.closed = true
	w.endLocked(reset)
	w.mu.Unlock()
	w.l.Close()
	w.work.Wait()
}

// cutAt is what is to come from now on; the bytes count from now, too.
func (w *wire) cutAt(cuts ...cut) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cuts, w.passed = cuts, 0
}

// cutsLeft is how many cuts are to come.
func (w *wire) cutsLeft() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.cuts)
}

// carried is how many bytes have passed.
func (w *wire) carried() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.passed
}

func (w *wire) accept() {
	for {
		source, err := w.l.Accept()
		if err != nil {
			return
		}
		w.work.Go(func() { w.connect(source) })
	}
}

func (w *wire) connect(source net.Conn) {
	if w.isDown() {
		source.Close()
		return
	}
	var target net.Conn
	var err error
	w.h.on(w.h.source, func() { target, err = net.DialTimeout("tcp", w.to, 5*time.Second) })
	if err != nil {
		source.Close()
		return
	}
	l := &link{source, target}
	w.mu.Lock()
	w.open[l] = true
	if w.closed {
		w.endLocked(reset)
	}
	w.mu.Unlock()
	w.work.Go(func() { w.pass(l, target, source) })
	w.pass(l, source, target)
}

func (w *wire) isDown() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Before(w.down)
}

// pass passes on what comes from one end until either is gone.
func (w *wire) pass(l *link, to, from net.Conn) {
	defer w.finish(l)
	b := make([]byte, 100_000)
	for {
		n, err := from.Read(b)
		n, pull := w.count(l, n)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if pull != nil && !pull() || err != nil {
			return
		}
	}
}

// finish ends both sides of a connection that one side has left, unless it was cut.
func (w *wire) finish(l *link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open[l] {
		delete(w.open, l)
		l.source.Close()
		l.target.Close()
	}
}

// count is how many of n bytes still pass. If they reach a cut, pull makes it, and tells whether
// the connection goes on.
func (w *wire) count(l *link, n int) (passes int, pull func() bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.open[l] {
		return 0, nil // what was cut
	}
	if len(w.cuts) == 0 || w.passed+int64(n) < w.cuts[0].at {
		w.passed += int64(n)
		return n, nil
	}
	c := w.cuts[0]
	if c.how == unplugged {
		w.cuts = w.cuts[1:]
		w.passed += int64(n)
		return n, func() bool { w.unplug(c); return true } // TCP sends again what is under way
	}
	passes = int(max(c.at-w.passed, 0))
	w.passed += int64(passes)
	return passes, func() bool { w.cut(c); return false }
}

// unplug pulls the cable for a while: connections survive that.
func (w *wire) unplug(c cut) {
	if w.h.plug(false) {
		time.Sleep(c.down)
		w.h.plug(true)
	}
}

// cut ends what is there, unless the other direction has done so.
func (w *wire) cut(c cut) {
	if c.how == silent {
		time.Sleep(c.down)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.cuts) > 0 && w.cuts[0] == c {
		w.cuts, w.down = w.cuts[1:], time.Now().Add(c.down)
		w.endLocked(c.how)
	}
}

// lateEnd is how long the target does not notice a connection that is gone.
const lateEnd = 300 * time.Millisecond

// +checklocks:w.mu
func (w *wire) endLocked(how how) {
	for l := range w.open {
		delete(w.open, l)
		if how == reset || how == silent {
			_ = l.source.(*net.TCPConn).SetLinger(0)
			_ = l.target.(*net.TCPConn).SetLinger(0)
		}
		l.source.Close()
		if how == half {
			w.work.Go(func() {
				time.Sleep(lateEnd)
				l.target.Close()
			})
			continue
		}
		l.target.Close()
	}
}
