package events

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"qblockd/events/clock"
	"qblockd/schema/value"
)

// event is an event with given data.
type event struct{ name, data string }

func (e event) EventName() string          { return e.name }
func (e event) AppendJSON(b []byte) []byte { return append(b, e.data...) }

// newClock stands at a time with microseconds.
func newClock() *clock.Manual { return clock.NewManual(time.Unix(1000, 250_000_000)) }

// listen gathers what b delivers.
func listen(b *Bus) (got *[]string, s *Subscription) {
	got = new([]string)
	return got, b.Subscribe(func(m Message) { *got = append(*got, fmt.Sprint(m.Seq, " ", string(m.Line))) })
}

func TestEncoding(t *testing.T) {
	now := newClock()
	b := NewBus(Options{Clock: now})
	got, _ := listen(b)
	b.Emit(event{"WITH", `{"a": 1}`})
	now.Advance(749_999 * time.Microsecond)
	b.Emit(event{"WITHOUT", ""})
	want := []string{
		`1 {"timestamp": {"seconds": 1000, "microseconds": 250000}, "event": "WITH", "data": {"a": 1}}`,
		`2 {"timestamp": {"seconds": 1000, "microseconds": 999999}, "event": "WITHOUT"}`,
	}
	if strings.Join(*got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got %q", *got)
	}
	// The order written out in appendEvent is the hash order.
	for _, line := range want {
		_, text, _ := strings.Cut(line, " ")
		v, err := value.Parse(text)
		if err != nil || string(value.Append(nil, v)) != text {
			t.Errorf("%s prints as %s (%v)", text, value.Append(nil, v), err)
		}
	}
}

func TestSubscribers(t *testing.T) {
	b := NewBus(Options{Clock: newClock()})
	b.Emit(event{"EARLY", ""})
	one, s1 := listen(b)
	two, s2 := listen(b)
	b.Emit(event{"A", ""})
	b.Unsubscribe(s1)
	b.Unsubscribe(s1)
	b.Unsubscribe(nil)
	b.Emit(event{"B", ""})
	b.Unsubscribe(s2)
	b.Emit(event{"C", ""})
	if len(*one) != 1 || len(*two) != 2 || !strings.HasPrefix((*two)[1], "3 ") {
		t.Errorf("one %q, two %q", *one, *two)
	}
}

func TestRateLimit(t *testing.T) {
	now := newClock()
	b := NewBus(Options{Clock: now})
	got, _ := listen(b)
	bad := func(node string, n int) event {
		return event{"QUORUM_REPORT_BAD", fmt.Sprintf(`{"node-name": %q, "sector-num": %d}`, node, n)}
	}
	check := func(step string, want ...string) {
		t.Helper()
		ok := len(*got) == len(want)
		for i := range want {
			ok = ok && strings.Contains((*got)[i], want[i])
		}
		if !ok {
			t.Errorf("%s: %q, want %q", step, *got, want)
		}
		*got = nil
	}
	for i := range 5 {
		b.Emit(bad("a", i))
		b.Emit(bad("b", i))
		b.Emit(event{"QUORUM_FAILURE", fmt.Sprintf(`{"reference": "q", "sector-num": %d}`, i)})
		b.Emit(event{"OTHER", fmt.Sprintf(`{"n": %d}`, i)})
	}
	check("at once", `"a", "sector-num": 0`, `"b", "sector-num": 0`, `"q", "sector-num": 0`,
		`"n": 0`, `"n": 1`, `"n": 2`, `"n": 3`, `"n": 4`)
	now.Advance(999 * time.Millisecond)
	check("before a second")
	now.Advance(time.Millisecond)
	if len(*got) != 3 {
		t.Fatalf("after a second: %q", *got)
	}
	for _, l := range *got {
		// The stamp is that of the event, not of its delivery.
		if !strings.Contains(l, `"sector-num": 4`) || !strings.Contains(l, `"seconds": 1000, "microseconds": 250000`) {
			t.Errorf("after a second: %s", l)
		}
	}
	*got = nil
	b.Emit(bad("a", 9))
	check("in the second interval")
	now.Advance(time.Second)
	check("after two seconds", `"sector-num": 9`)
	now.Advance(time.Second)
	b.Emit(bad("a", 10))
	check("after a quiet second", `"sector-num": 10`)
	b.Emit(bad("a", 11))
	b.Close()
	now.Advance(time.Minute)
	b.Emit(bad("a", 12))
	check("closed")
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Pending() > 0 || len(b.held) > 0 {
		t.Errorf("left: %d timers, %d intervals", now.Pending(), len(b.held))
	}
}

func TestReplay(t *testing.T) {
	b := NewBus(Options{Clock: newClock()})
	b.keepCount, b.keepBytes = 10, 2000
	if len(b.Replay(0)) != 0 {
		t.Error("something out of nothing")
	}
	for range 25 {
		b.Emit(event{"E", ""})
	}
	first := func(seq uint64) (n int, from uint64) {
		m := b.Replay(seq)
		if len(m) == 0 {
			return 0, 0
		}
		return len(m), m[0].Seq
	}
	if n, from := first(0); n != 10 || from != 16 {
		t.Errorf("%d from %d", n, from)
	}
	if n, from := first(20); n != 5 || from != 21 {
		t.Errorf("%d from %d", n, from)
	}
	if n, _ := first(25); n != 0 {
		t.Errorf("%d after the last", n)
	}
	b.Emit(event{"BIG", `"` + strings.Repeat("x", 1800) + `"`})
	n, from := first(0)
	b.mu.Lock()
	if n == 0 || n > 3 || from < 24 || b.keptBytes > 2000 {
		t.Errorf("%d from %d, %d bytes", n, from, b.keptBytes)
	}
	b.mu.Unlock()
}

// Emit from many goroutines: every subscriber sees one order, without gaps.
func TestConcurrentEmit(t *testing.T) {
	b := NewBus(Options{})
	one, _ := listen(b)
	two, _ := listen(b)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				b.Emit(event{"E", ""})
			}
		})
	}
	wg.Wait()
	if len(*one) != 1600 || strings.Join(*one, "") != strings.Join(*two, "") {
		t.Fatalf("%d and %d events", len(*one), len(*two))
	}
	for i, l := range *one {
		if !strings.HasPrefix(l, fmt.Sprint(i+1, " ")) {
			t.Fatalf("event %d is %s", i+1, l)
		}
	}
}
