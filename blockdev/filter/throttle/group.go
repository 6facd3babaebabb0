package throttle

import (
	"cmp"
	"context"
	"sync"
	"sync/atomic"
	"time"

	"qblockd/events/clock"
	"qblockd/graph/blk"
)

// Group is a set of limits and the filters that share them. What the limits let through goes to the
// members by turns; reads and writes take turns as well where a limit concerns both. The requests
// of a member keep their order.
type Group struct {
	name    string
	clock   clock.Clock
	start   time.Time
	limited atomic.Bool // without limits requests pass without a look at anything else

	mu sync.Mutex
	b  buckets // +checklocks:mu
	// counts changes of the limits; starts at 1
	round   uint64    // +checklocks:mu
	members []*Member // +checklocks:mu
	// requests, of all members
	waiting [2]int // +checklocks:mu
	// index of the member whose turn it is
	turn [2]int // +checklocks:mu
	// the direction whose turn it is
	first direction // +checklocks:mu
	// goes off when the next request may pass
	timer   clock.Timer // +checklocks:mu
	retired bool        // +checklocks:mu
}

// NewGroup makes a group whose limits run on c; nil: clock.Real.
func NewGroup(name string, l Limits, c clock.Clock) *Group {
	g := &Group{name: name, clock: cmp.Or(c, clock.Real)}
	g.start = g.clock.Now()
	g.timer = g.clock.AfterFunc("the timer of a throttle group", time.Hour, g.due)
	g.timer.Stop()
	g.SetLimits(l)
	return g
}

// now is the time since the group was made.
func (g *Group) now() time.Duration { return g.clock.Now().Sub(g.start) }

// Name is the group's name.
func (g *Group) Name() string { return g.name }

// Limits are the present ones.
func (g *Group) Limits() Limits {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.b.limits
}

// SetLimits replaces the limits, which have been checked. They start afresh, and requests that wait
// do so by the new ones.
func (g *Group) SetLimits(l Limits) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.b = buckets{limits: l, last: g.now()}
	g.round++
	g.limited.Store(l.limited())
	g.serveLocked()
}

// Retire ends the group unless it has members. It takes no more then.
func (g *Group) Retire() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.retired = len(g.members) == 0
	return g.retired
}

// Join adds a member; nil if the group has been retired.
func (g *Group) Join() *Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.retired {
		return nil
	}
	m := &Member{g: g}
	g.members = append(g.members, m)
	return m
}

// Member is a filter's part in its group.
type Member struct {
	g      *Group
	queue  [2]queue // guarded by g.mu
	opened bool     // guarded by g.mu  nobody waits: a drain is waiting for them
}

// Leave ends the membership. No request may be under way.
func (m *Member) Leave() {
	g := m.g
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, x := range g.members {
		if x == m {
			g.members = append(g.members[:i:i], g.members[i+1:]...)
			for dir := range g.turn {
				if g.turn[dir] > i {
					g.turn[dir]--
				}
			}
			return
		}
	}
}

// Open lets everything through that waits, and whatever comes until Shut, all of it counted.
func (m *Member) Open() {
	g := m.g
	g.mu.Lock()
	defer g.mu.Unlock()
	m.opened = true
	for dir := range m.queue {
		for m.queue[dir].head != nil {
			g.grantLocked(m, direction(dir))
		}
	}
	g.serveLocked()
}

// Shut ends what Open began.
func (m *Member) Shut() {
	m.g.mu.Lock()
	defer m.g.mu.Unlock()
	m.opened = false
}

// waiter is a request that waits.
type waiter struct {
	n       int64
	next    *waiter
	granted bool
	round   uint64
	wake    chan struct{} // gets a value with the grant
}

var waiters = sync.Pool{New: func() any { return &waiter{wake: make(chan struct{}, 1)} }}

// queue holds waiters, first come first.
type queue struct{ head, tail *waiter }

func (q *queue) push(w *waiter) {
	if q.head == nil {
		q.head = w
	} else {
		q.tail.next = w
	}
	q.tail = w
}

func (q *queue) pop() *waiter {
	w := q.head
	q.head, w.next = w.next, nil
	return w
}

func (q *queue) remove(w *waiter) {
	var before *waiter
	for x := q.head; x != w; x = x.next {
		before = x
	}
	if before == nil {
		q.head = w.next
	} else {
		before.next = w.next
	}
	if q.tail == w {
		q.tail = before
	}
	w.next = nil
}

// pass is proof of having been counted; the zero value is that of a request that was not.
type pass struct{ round uint64 }

// enter waits until a request of n bytes may pass, and counts it. Errors: blk.ErrWouldBlock, the
// cause of the end of r's context; then nothing is counted. Nothing is allocated but by the first
// to wait.
func (m *Member) enter(r *blk.Req, dir direction, n int64) (pass, error) {
	g := m.g
	if !g.limited.Load() {
		return pass{}, nil
	}
	g.mu.Lock()
	if !m.opened {
		// Those whose time has come go first.
		if g.waiting != [2]int{} {
			g.serveLocked()
		} else {
			g.b.leak(g.now())
		}
		if g.waiting[dir] > 0 || g.b.wait(dir) > 0 {
			if r.NoWait {
				g.mu.Unlock()
				return pass{}, blk.ErrWouldBlock
			}
			return m.queueUp(r, dir, n)
		}
	}
	g.b.add(dir, n, 1)
	p := pass{g.round}
	g.mu.Unlock()
	return p, nil
}

// queueUp waits. It is called with g.mu held and releases it.
// +checklocksrelease:m.g.mu
func (m *Member) queueUp(r *blk.Req, dir direction, n int64) (pass, error) {
	g := m.g
	w := waiters.Get().(*waiter)
	w.n, w.granted = n, false
	m.queue[dir].push(w)
	g.waiting[dir]++
	g.armLocked()
	g.mu.Unlock()
	select {
	case <-w.wake:
		p := pass{w.round}
		waiters.Put(w)
		return p, nil
	case <-r.Done():
	}
	g.mu.Lock()
	if w.granted { // just now
		<-w.wake
		if w.round == g.round {
			g.b.add(dir, n, -1)
		}
	} else {
		m.queue[dir].remove(w)
		g.waiting[dir]--
	}
	g.serveLocked()
	g.mu.Unlock()
	waiters.Put(w)
	return pass{}, context.Cause(r.Ctx)
}

// adjust makes a count of n bytes one of got, which is none if got is 0.
func (m *Member) adjust(p pass, dir direction, n, got int64) {
	g := m.g
	if p.round == 0 || n == got && got > 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.round == g.round {
		g.b.add(dir, n, -1)
		if got > 0 {
			g.b.add(dir, got, 1)
		}
		if g.waiting != [2]int{} {
			g.serveLocked()
		}
	}
}

// due is called by the timer.
func (g *Group) due() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.serveLocked()
}

// serve lets through whatever may pass now, and sets the timer for what may not.
// +checklocks:g.mu
func (g *Group) serveLocked() {
	g.b.leak(g.now())
	for {
		dir := g.first
		if !g.mayLocked(dir) {
			dir ^= 1
			if !g.mayLocked(dir) {
				break
			}
		}
		g.grantLocked(g.nextLocked(dir), dir)
		g.first = dir ^ 1
	}
	g.armLocked()
}

// +checklocks:g.mu
func (g *Group) mayLocked(dir direction) bool { return g.waiting[dir] > 0 && g.b.wait(dir) == 0 }

// next is the member whose turn it is among those that wait.
// +checklocks:g.mu
func (g *Group) nextLocked(dir direction) *Member {
	for {
		i := g.turn[dir] % len(g.members)
		g.turn[dir] = i + 1
		if m := g.members[i]; m.queue[dir].head != nil {
			return m
		}
	}
}

// grant counts the first request of a member's queue and lets it go.
// +checklocks:g.mu
func (g *Group) grantLocked(m *Member, dir direction) {
	w := m.queue[dir].pop()
	g.waiting[dir]--
	g.b.add(dir, w.n, 1)
	w.granted, w.round = true, g.round
	w.wake <- struct{}{}
}

// arm sets the timer to when the first of those who wait may pass.
// +checklocks:g.mu
func (g *Group) armLocked() {
	least := time.Duration(-1)
	for dir, n := range g.waiting {
		if n > 0 {
			if d := g.b.wait(direction(dir)); least < 0 || d < least {
				least = d
			}
		}
	}
	if least < 0 {
		g.timer.Stop()
		return
	}
	g.timer.Reset(least)
}
