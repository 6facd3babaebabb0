package qmp

import (
	"math"
	"strings"
	"testing"
	"time"
)

// However many clients begin messages and do not end them, what those take is bounded: who has done
// so for a while goes first, and who sends a long command has it executed.
func TestManyEndlessMessages(t *testing.T) {
	const limit = 16 << 20
	d := testDispatcher()
	d.Log = quiet()
	d.LimitUnfinished(limit)
	d.unfinished.slow = time.Hour
	m := NewMonitor(d, nil, Options{})
	begin := func(text string) *client {
		c := serve(t, m)
		c.negotiate()
		before := d.unfinished.bytes.Load()
		c.send(text)
		eventually(t, "it to be read", func() bool { return d.unfinished.bytes.Load() >= before+int64(len(text)) || connected(m) == 0 })
		return c
	}
	old := begin(`{"execute":"` + strings.Repeat("x", 4<<20))
	d.stopMu.Lock()
	for s := range d.sessions {
		s.in.since.Store(1) // since long ago
	}
	d.stopMu.Unlock()
	// It is more than any other sends.
	id := strings.Repeat("y", 6<<20)
	good := begin(`{"execute":"query-jobs","id":"` + id)
	bad := []*client{old}
	for range 5 {
		c := serve(t, m)
		c.negotiate()
		c.send(`{"execute":["` + strings.Repeat("z", 1<<20))
		bad = append(bad, c)
	}
	old.expect(`{"error": {"class": "GenericError", "desc": "` + errUnfinished.Error() + `"}}`)
	good.send(`"}`)
	if l := good.line(); l != `{"id": "`+id+`", "return": []}` && l != `{"return": [], "id": "`+id+`"}` {
		t.Fatalf("%.200s", l)
	}
	eventually(t, "the rest to be within the limit", func() bool { return d.unfinished.bytes.Load() <= limit })
	for _, c := range bad {
		c.conn.Close()
	}
	eventually(t, "all to be gone", func() bool { return connected(m) == 1 })
	if n := d.unfinished.bytes.Load(); n != 0 {
		t.Errorf("%d bytes are unfinished, of nobody", n)
	}
	good.send(`{"execute":"query-jobs"}`)
	good.expect(`{"return": []}`)
}

// The limit holds also when the clock was set back after a message began.
func TestEndlessMessageAndClock(t *testing.T) {
	d := testDispatcher()
	d.Log = quiet()
	d.LimitUnfinished(4 << 20)
	m := NewMonitor(d, nil, Options{})
	c := serve(t, m)
	c.negotiate()
	c.send(`{"execute":"` + strings.Repeat("x", 1<<20))
	eventually(t, "it to be read", func() bool { return d.unfinished.bytes.Load() >= 1<<20 })
	d.stopMu.Lock()
	for s := range d.sessions {
		s.in.since.Store(math.MaxInt64)
	}
	d.stopMu.Unlock()
	go func() { _, _ = c.conn.Write([]byte(strings.Repeat("x", 4<<20))) }() // which fails half-way
	c.expect(`{"error": {"class": "GenericError", "desc": "` + errUnfinished.Error() + `"}}`)
}
