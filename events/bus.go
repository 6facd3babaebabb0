package events

import (
	"cmp"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"qblockd/events/clock"
	"qblockd/events/trace"
	"qblockd/schema/value"
)

// Limit holds back events of one name that come in quick succession: the first is delivered
// at once, then at most one each Interval, the latest; the others are dropped.
type Limit struct {
	Interval time.Duration
	// Key is the member of the event's data (a string) by whose value events are counted
	// separately; empty: all events of the name are counted together.
	Key string
}

// limits are QEMU's, by event name, for the events that a block daemon emits. That of
// BLOCK_IO_ERROR is of version 10.0, by qom-path there.
var limits = map[string]Limit{
	"QUORUM_REPORT_BAD": {Interval: time.Second, Key: "node-name"},
	"QUORUM_FAILURE":    {Interval: time.Second},
	"BLOCK_IO_ERROR":    {Interval: time.Second, Key: "device"},
}

// Options of a Bus; the zero value gives the defaults.
type Options struct {
	Clock clock.Clock // default: clock.Real
}

// Message is an event as it was delivered.
type Message struct {
	Seq  uint64 // 1 for the first event that the bus delivered, then without gaps
	Name string // e.g. "JOB_STATUS_CHANGE"
	Line []byte // the encoded JSON object, without a line end; never changed
	More bool   // another one of the same moment follows at once
}

// Bus delivers events to subscribers. It numbers, stamps and encodes each event once, and calls
// all subscribers in the same order. It is a Sink.
//
// Lock order: Bus.mu is a leaf but for what subscribers lock themselves (the output queue of a
// session); see Subscribe.
type Bus struct {
	clock clock.Clock

	mu  sync.Mutex
	seq uint64 // +checklocks:mu
	// in order of subscription
	subs []*Subscription // +checklocks:mu
	// names and keys whose interval runs
	held map[limitKey]*holdback // +checklocks:mu
	// oldest first
	kept []Message // +checklocks:mu
	// = sum of len(Line) over kept
	keptBytes int // +checklocks:mu
	// how many events are kept, and how many bytes of them
	keepCount int
	keepBytes int
	closed    bool // +checklocks:mu
}

type limitKey struct{ name, key string }

// holdback is a running interval of a Limit, and the latest event that came during it.
type holdback struct {
	timer clock.Timer
	name  string
	line  []byte // nil: none came
}

// Subscription is one receiver of events.
type Subscription struct {
	f func(Message)
}

// NewBus returns a bus without subscribers.
func NewBus(o Options) *Bus {
	return &Bus{clock: cmp.Or(o.Clock, clock.Real), held: map[limitKey]*holdback{}, keepCount: 1024, keepBytes: 1 << 20}
}

// Subscribe has f called for each event delivered from now on, until Unsubscribe. f runs with
// the bus locked and therefore must not block, call the bus, or keep anybody waiting: it puts
// the message into a queue.
func (b *Bus) Subscribe(f func(Message)) *Subscription {
	s := &Subscription{f}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.subs = append(b.subs, s)
	return s
}

// Unsubscribe ends the calls for s; none is under way when it returns. Doing it twice, or for
// nil, is harmless.
func (b *Bus) Unsubscribe(s *Subscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.subs = slices.DeleteFunc(b.subs, func(x *Subscription) bool { return x == s })
}

// Emit delivers e to all subscribers before it returns, unless a Limit holds it back. It
// never blocks on a subscriber.
func (b *Bus) Emit(e Event) { b.EmitAll(e) }

// EmitAll is Emit of several events, of which nobody gets in between.
func (b *Bus) EmitAll(l ...Event) {
	if p := &trace.EventEmit; p.On() {
		for _, e := range l {
			p.Log(slog.String("event", string(appendEvent(nil, e, e.EventName(), b.clock.Now()))))
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	due := make([]Message, 0, 2)
	for _, e := range l {
		if line := b.limitLocked(e); line != nil {
			due = append(due, Message{Name: e.EventName(), Line: line})
		}
	}
	for i, m := range due {
		b.deliverLocked(m.Name, m.Line, i+1 < len(due))
	}
}

// limitLocked is what to deliver of e now; nil if it is held back.
// +checklocks:b.mu
func (b *Bus) limitLocked(e Event) []byte {
	name := e.EventName()
	limit, limited := limits[name]
	// Stamped under the lock: stamps never run backwards against the numbers.
	line := appendEvent(nil, e, name, b.clock.Now())
	if limited {
		key := limitKey{name, limitValue(e, limit.Key)}
		if h := b.held[key]; h != nil {
			h.line = line
			return nil
		}
		h := &holdback{name: name}
		b.held[key] = h
		h.timer = b.clock.AfterFunc("the rate limit of events", limit.Interval, func() { b.release(key, h, limit.Interval) })
	}
	return line
}

// release runs at the end of an interval of h: it delivers what was held back and starts the
// next interval, or forgets h.
func (b *Bus) release(key limitKey, h *holdback, interval time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.held[key] != h {
		return
	}
	if h.line == nil {
		delete(b.held, key)
		return
	}
	line := h.line
	h.line = nil
	h.timer.Reset(interval)
	b.deliverLocked(h.name, line, false)
}

// +checklocks:b.mu
func (b *Bus) deliverLocked(name string, line []byte, more bool) {
	b.seq++
	m := Message{b.seq, name, line, more}
	b.kept = append(b.kept, m)
	b.keptBytes += len(line)
	for len(b.kept) > b.keepCount || b.keptBytes > b.keepBytes {
		b.keptBytes -= len(b.kept[0].Line)
		b.kept[0] = Message{}
		b.kept = b.kept[1:]
	}
	for _, s := range b.subs {
		s.f(m)
	}
}

// Replay returns the kept events with numbers above seq, oldest first.
func (b *Bus) Replay(seq uint64) []Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.kept[len(b.kept)-min(len(b.kept), int(b.seq-min(seq, b.seq))):])
}

// Close drops what is held back and stops the timers; later events are ignored.
func (b *Bus) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for key, h := range b.held {
		h.timer.Stop()
		delete(b.held, key)
	}
}

// limitValue is the value of the string member of e's data by which e is limited.
func limitValue(e Event, member string) string {
	if member == "" {
		return ""
	}
	v, err := value.Parse(string(e.AppendJSON(nil)))
	if err != nil {
		panic("events: data of " + e.EventName() + ": " + err.Error())
	}
	d, _ := v.(*value.Dict)
	s, _ := d.Get(member)
	key, _ := s.(string)
	return key
}

// appendEvent encodes e as the wire shows it, members in hash order.
func appendEvent(b []byte, e Event, name string, at time.Time) []byte {
	us := at.UnixMicro()
	b = append(b, `{"timestamp": {"seconds": `...)
	b = strconv.AppendInt(b, us/1e6, 10)
	b = append(b, `, "microseconds": `...)
	b = strconv.AppendInt(b, us%1e6, 10)
	b = append(b, `}, "event": `...)
	b = value.AppendString(b, name)
	mark := len(b)
	b = append(b, `, "data": `...)
	start := len(b)
	if b = e.AppendJSON(b); len(b) == start {
		b = b[:mark]
	}
	return append(b, '}')
}
