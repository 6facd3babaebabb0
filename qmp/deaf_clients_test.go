package qmp

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/events"
	"qblockd/schema/value"
)

// Whatever many clients ask for and do not read, what waits for them is bounded; those who read get
// what they asked for.
func TestManyDeafClients(t *testing.T) {
	const size, limit = 4 << 20, 12 << 20
	d := testDispatcher()
	d.Log = quiet()
	d.LimitUnsent(limit)
	d.unsent.delay = 20 * time.Millisecond
	var making, atOnce, most atomic.Int64
	text := strings.Repeat("b", size)
	d.Handle("big", func(ctx context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		if err := LargeReply(ctx, size); err != nil {
			return out, err
		}
		if making.Add(1) > 1 {
			atOnce.Add(1)
		}
		most.Store(max(most.Load(), d.unsent.bytes.Load()))
		defer making.Add(-1)
		return value.AppendString(out, text), nil
	})
	bus := events.NewBus(events.Options{})
	m := NewMonitor(d, bus, Options{})
	for range 8 {
		c := serve(t, m)
		c.negotiate()
		c.send(strings.Repeat(`{"execute":"big"}`, 3))
	}
	eventually(t, "deaf clients to be disconnected", func() bool { return m.overflows.Load() >= 5 })
	good := serve(t, m)
	good.negotiate()
	for range 3 {
		good.send(`{"execute":"big"}`)
		if l := good.line(); len(l) < size {
			t.Fatalf("%.100s", l)
		}
	}
	if atOnce.Load() > 0 || most.Load()+size > limit+64<<10 {
		t.Errorf("%d times two were made at once, and one when %d bytes were unsent", atOnce.Load(), most.Load())
	}
	// Events count, too.
	for range 40 {
		bus.Emit(noise(1 << 20))
		if l := good.line(); !strings.Contains(l, "NOISE") {
			t.Fatalf("%.100s", l)
		}
	}
	eventually(t, "the others to be disconnected", func() bool { return d.unsent.bytes.Load() <= limit })
	good.send(`{"execute":"query-jobs"}`)
	good.expect(`{"return": []}`)
}

// One reply may exceed what all clients together may leave unread, for one that reads.
func TestReplyExceedsAll(t *testing.T) {
	const size, limit = 4 << 20, 2 << 20
	d := testDispatcher()
	d.Log = quiet()
	d.LimitUnsent(limit)
	d.Handle("big", func(ctx context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		if err := LargeReply(ctx, size); err != nil {
			return out, err
		}
		return value.AppendString(out, strings.Repeat("b", size)), nil
	})
	bus := events.NewBus(events.Options{})
	m := NewMonitor(d, bus, Options{})
	c, other := serve(t, m), serve(t, m)
	c.negotiate()
	other.negotiate()
	for range 3 {
		c.send(`{"execute":"big"}`)
		eventually(t, "the reply to be queued", func() bool { return d.unsent.bytes.Load() > limit })
		bus.Emit(noise(1000))
		if l := other.line(); !strings.Contains(l, "NOISE") {
			t.Fatalf("%.100s", l)
		}
		if l := c.line(); len(l) < size {
			t.Fatalf("%.100s", l)
		}
		if l := c.line(); !strings.Contains(l, "NOISE") {
			t.Fatalf("%.100s", l)
		}
		eventually(t, "all to be sent", func() bool { return d.unsent.bytes.Load() == 0 })
	}
	if n := m.overflows.Load(); n != 0 {
		t.Errorf("%d clients were disconnected", n)
	}
}

// A client that does not read what it has been sent, and asks for more than there is room for
// beside that, keeps nobody from large replies.
func TestDeafClientAsksForMore(t *testing.T) {
	const size, limit = 4 << 20, 2 << 20
	d := testDispatcher()
	d.Log = quiet()
	d.LimitUnsent(limit)
	d.unsent.delay = 20 * time.Millisecond
	d.Handle("some", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		return value.AppendString(out, strings.Repeat("b", 900_000)), nil
	})
	asked := make(chan struct{}, 2)
	d.Handle("big", func(ctx context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		asked <- struct{}{}
		if err := LargeReply(ctx, size); err != nil {
			return out, err
		}
		return value.AppendString(out, strings.Repeat("b", size)), nil
	})
	m := NewMonitor(d, nil, Options{})
	deaf, good := serve(t, m), serve(t, m)
	deaf.negotiate()
	deaf.send(`{"execute":"some"}{"execute":"big"}`)
	waitFor(t, asked, "the large reply to be asked for")
	good.negotiate()
	good.send(`{"execute":"big"}`)
	if l := good.line(); len(l) < size {
		t.Fatalf("%.100s", l)
	}
	eventually(t, "the client that does not read to be disconnected", func() bool { return m.overflows.Load() == 1 })
}

// What is counted as unsent is gone when the clients are.
func TestUnsentIsCounted(t *testing.T) {
	d := testDispatcher()
	d.Handle("big", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		return value.AppendString(out, strings.Repeat("b", 3<<20)), nil
	})
	m := NewMonitor(d, nil, Options{})
	c := serve(t, m)
	c.negotiate()
	c.send(`{"execute":"big"}`)
	eventually(t, "the reply to be queued", func() bool { return d.unsent.bytes.Load() > 2<<20 })
	c.conn.Close()
	eventually(t, "the session to end", func() bool { return connected(m) == 0 })
	if n := d.unsent.bytes.Load(); n != 0 {
		t.Errorf("%d bytes are unsent of nobody", n)
	}
	c = serve(t, m)
	c.negotiate()
	c.send(`{"execute":"big"}`)
	if l := c.line(); len(l) < 3<<20 {
		t.Fatalf("%.100s", l)
	}
	c.send(`{"execute":"query-jobs"}`)
	c.expect(`{"return": []}`)
	eventually(t, "all to be sent", func() bool { return d.unsent.bytes.Load() == 0 })
}
