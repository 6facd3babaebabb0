package blkdebug

import (
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// moment is how long it takes a request to fail that does not fail immediately.
const moment = time.Millisecond

const (
	kindRead = 1 << iota
	kindWrite
	kindZero
	kindDiscard
	kindFlush
	kindStatus
	// usual are those that a rule without a kind means.
	usual = kindRead | kindWrite | kindZero | kindDiscard | kindFlush
)

// kinds of requests, as rules name them.
var kinds = map[types.BlkdebugIOType]uint32{
	types.BlkdebugIOTypeRead:        kindRead,
	types.BlkdebugIOTypeWrite:       kindWrite,
	types.BlkdebugIOTypeWriteZeroes: kindZero,
	types.BlkdebugIOTypeDiscard:     kindDiscard,
	types.BlkdebugIOTypeFlush:       kindFlush,
	types.BlkdebugIOTypeBlockStatus: kindStatus,
}

// events are the numbers of events by their names.
var events = func() map[types.BlkdebugEvent]blk.DebugEvent {
	m := map[types.BlkdebugEvent]blk.DebugEvent{}
	for i, name := range types.BlkdebugEventValues {
		m[name] = blk.DebugEvent(i)
	}
	return m
}()

// rule does something when its event comes in its state: it becomes active and makes requests fail,
// or changes the state.
type rule struct {
	event blk.DebugEvent
	state int64 // 0: any

	newState int64 // of a change of the state, unless errors is set
	errors   bool  // it makes requests fail:

	kinds       uint32 // 1 << kind of request
	off         int64  // only requests that touch this byte; negative: all
	errno       syscall.Errno
	once        bool
	immediately bool
	delay       time.Duration
}

// rules are those of a node, with its state. Of those that are active the first that matches a
// request counts.
type rules struct {
	eventful atomic.Bool // there are rules for other events than the first one

	mu    sync.Mutex
	state int64 // +checklocks:mu
	// as they were given
	all    []*rule // +checklocks:mu
	active []*rule // +checklocks:mu
}

// init takes the rules over and begins.
func (l *rules) init(inject []*types.BlkdebugInjectErrorOptions, set []*types.BlkdebugSetStateOptions) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range inject {
		x := &rule{
			event: events[o.Event], state: types.Or(o.State, 0), errors: true, kinds: usual, off: -1,
			errno: syscall.Errno(types.Or(o.Errno, int64(syscall.EIO))),
			once:  types.Or(o.Once, false), immediately: types.Or(o.Immediately, false),
			delay: time.Duration(max(types.Or(o.DelayNs, 0), 0)),
		}
		if o.Iotype != nil {
			x.kinds = kinds[*o.Iotype]
		}
		if s := types.Or(o.Sector, -1); s >= 0 {
			x.off = s * blk.SectorSize
		}
		l.addLocked(x)
	}
	for _, o := range set {
		l.addLocked(&rule{event: events[o.Event], state: types.Or(o.State, 0), newState: o.NewState})
	}
	l.state = 1
	l.eventLocked(blk.EvNone)
}

// +checklocks:l.mu
func (l *rules) addLocked(x *rule) {
	l.all = append(l.all, x)
	if x.event != blk.EvNone {
		l.eventful.Store(true)
	}
}

// event does what rules say.
func (l *rules) event(e blk.DebugEvent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.eventLocked(e)
}

// eventLocked does what rules say. All see the same state; if several change it the first one does.
// If there are any that make requests fail, they take the place of those that were active.
// +checklocks:l.mu
func (l *rules) eventLocked(e blk.DebugEvent) {
	next, fresh := l.state, false
	for i := len(l.all) - 1; i >= 0; i-- {
		switch x := l.all[i]; {
		case x.event != e || x.state != 0 && x.state != l.state:
		case x.errors:
			if !fresh {
				l.active, fresh = nil, true
			}
			l.active = slices.Insert(l.active, 0, x)
		default:
			next = x.newState
		}
	}
	l.state = next
}

// +checklocks:l.mu
func (l *rules) removeLocked(x *rule) {
	l.all = slices.DeleteFunc(l.all, func(y *rule) bool { return y == x })
	l.active = slices.DeleteFunc(l.active, func(y *rule) bool { return y == x })
}

// fail is the error of a request, or nil.
func (l *rules) fail(r *blk.Req, kind uint32, off, n int64) error {
	l.mu.Lock()
	i := slices.IndexFunc(l.active, func(x *rule) bool {
		return x.kinds&kind != 0 && (x.off < 0 || n > 0 && x.off >= off && x.off < off+n)
	})
	if i < 0 || l.active[i].errno == 0 && l.active[i].delay == 0 {
		l.mu.Unlock()
		return nil
	}
	x := l.active[i]
	wait := x.delay
	if !x.immediately {
		wait += moment
	}
	if r.NoWait && wait > 0 {
		l.mu.Unlock()
		return blk.ErrWouldBlock
	}
	if x.once {
		l.removeLocked(x)
	}
	l.mu.Unlock()
	if wait > 0 {
		pause(r, wait)
	}
	if x.errno == 0 {
		return nil
	}
	return x.errno
}

// pause lets time pass, as long as somebody waits for the request.
func pause(r *blk.Req, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-r.Done():
	}
}
