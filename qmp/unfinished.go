package qmp

import (
	"errors"
	"math"
	"sync/atomic"
	"time"
)

// DefaultAllUnfinished is what messages of which the end is still to come may take, of the clients
// of a dispatcher together, in bytes.
const DefaultAllUnfinished = 256 << 20

const (
	// leastUnfinished is what a client's input takes at least to be counted: those of usual length
	// are not.
	leastUnfinished = 64 << 10
	// slowMessage is how long a message takes to come at least for its client to be disconnected
	// before others that take more.
	slowMessage = 2 * time.Second
)

var errUnfinished = errors.New("The unfinished messages of all clients take too much memory, and those of this one most of it")

// unfinished counts what the input of the clients of a dispatcher takes that is not a message yet,
// all together.
type unfinished struct {
	limit int64
	slow  time.Duration // slowMessage, but for tests
	bytes atomic.Int64
}

// input is what a session has to do with that.
type input struct {
	bytes atomic.Int64
	since atomic.Int64 // when it began, in nanoseconds; 0: bytes is 0
	over  atomic.Bool  // it has been disconnected
}

// gathered is called by the reader of a session, whose parser holds n bytes. It disconnects clients
// as long as all of them hold too much; perhaps this one.
func (s *Session) gathered(n int) {
	if n < leastUnfinished || s.in.over.Load() {
		n = 0
	}
	old := s.in.bytes.Swap(int64(n))
	if old == int64(n) {
		return
	}
	switch {
	case n == 0:
		s.in.since.Store(0)
	case old == 0:
		s.in.since.Store(time.Now().UnixNano())
	}
	for u := &s.d.unfinished; u.bytes.Add(int64(n)-old) > u.limit; {
		if n, old = 0, 0; !s.d.dropUnfinished(time.Now().Add(-u.slow).UnixNano()) && !s.d.dropUnfinished(math.MaxInt64) {
			return
		}
	}
}

// dropUnfinished disconnects the client that holds most of those whose message began by that time,
// in nanoseconds; false if there is none.
func (d *Dispatcher) dropUnfinished(by int64) bool {
	var most *Session
	bytes := int64(0)
	d.stopMu.Lock()
	for s := range d.sessions {
		since := s.in.since.Load()
		if n := s.in.bytes.Load(); n > bytes && since != 0 && since <= by {
			most, bytes = s, n
		}
	}
	if most != nil { // what it holds goes when its reader hears of it; nobody else has to go for it
		most.in.over.Store(true)
		d.unfinished.bytes.Add(-most.in.bytes.Swap(0))
	}
	d.stopMu.Unlock()
	if most == nil {
		return false
	}
	d.log().Warn("monitor client sends a message without end, disconnecting it", "bytes", bytes)
	most.send(appendFailure(nil, nil, false, errUnfinished), true)
	most.flush()
	most.fail(errUnfinished)
	return true
}

// LimitUnfinished bounds what messages of which the end is still to come take, of all clients
// together, in bytes; DefaultAllUnfinished unless it is called, before the first session is served.
func (d *Dispatcher) LimitUnfinished(n int64) { d.unfinished.limit = n }
