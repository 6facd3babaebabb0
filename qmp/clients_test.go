package qmp

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"qblockd/events"
	"qblockd/events/panics"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// noise is an event with n bytes of data.
type noise int

func (noise) EventName() string { return "NOISE" }
func (n noise) AppendJSON(b []byte) []byte {
	b = append(b, `{"x": "`...)
	b = append(b, bytes.Repeat([]byte{'.'}, int(n))...)
	return append(b, `"}`...)
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// blocked registers a command "block" that reports its start, and ends when release is closed or
// its context is cancelled.
func blocked(d *Dispatcher) (started chan struct{}, release chan struct{}, ended chan error) {
	started, release, ended = make(chan struct{}, 100), make(chan struct{}), make(chan error, 100)
	d.Handle("block", func(ctx context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		started <- struct{}{}
		select {
		case <-release:
			ended <- nil
		case <-ctx.Done():
			ended <- ctx.Err()
		}
		return out, ctx.Err()
	})
	return started, release, ended
}

func waitFor[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("waited in vain for " + what)
		panic("unreachable")
	}
}

// eventually polls a condition that another goroutine brings about.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: " + what)
		}
	}
}

// A command that does not end holds up its own session only, and not the answers before it.
func TestStuckCommand(t *testing.T) {
	d := testDispatcher()
	started, release, _ := blocked(d)
	m := NewMonitor(d, events.NewBus(events.Options{}), Options{})
	stuck, other := serve(t, m), serve(t, m)
	stuck.negotiate()
	other.negotiate()
	stuck.send(`{"execute":"query-jobs","id":1}{"execute":"block","id":2}{"execute":"query-jobs","id":3}`)
	stuck.expect(`{"return": [], "id": 1}`)
	waitFor(t, started, "the command to start")
	other.send(`{"execute":"query-jobs"}`)
	other.expect(`{"return": []}`)
	close(release)
	stuck.expect(`{"return": {}, "id": 2}`)
	stuck.expect(`{"return": [], "id": 3}`)
}

// A client that goes away for good cancels its command; one that only ends its sending does not.
func TestHangup(t *testing.T) {
	d := testDispatcher()
	started, release, ended := blocked(d)
	m := NewMonitor(d, nil, Options{})
	c := serve(t, m)
	c.negotiate()
	c.send(`{"execute":"block"}`)
	waitFor(t, started, "the command to start")
	c.conn.Close()
	if err := waitFor(t, ended, "the command to be cancelled"); err == nil {
		t.Fatal("not cancelled")
	}

	c = serve(t, m)
	c.negotiate()
	c.send(`{"execute":"block"}{"execute":"query-jobs"}`)
	if err := c.conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, started, "the command to start")
	time.Sleep(3 * slowDelay) // long enough for the watching to begin
	close(release)
	if err := waitFor(t, ended, "the command to end"); err != nil {
		t.Fatal(err)
	}
	c.expect(`{"return": {}}`)
	c.expect(`{"return": []}`)
	if n, err := c.conn.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("after the last reply: %d, %v", n, err)
	}
}

// A watched command that ends normally leaves the connection usable.
func TestWatchEnds(t *testing.T) {
	d := testDispatcher()
	d.Handle("nap", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		time.Sleep(3 * slowDelay)
		return out, nil
	})
	c := serve(t, NewMonitor(d, nil, Options{}))
	c.negotiate()
	for range 3 {
		c.send(`{"execute":"nap"}`)
		c.expect(`{"return": {}}`)
	}
}

// A client that never reads is bounded, then disconnected; the others hear everything.
func TestNeverReading(t *testing.T) {
	d := testDispatcher()
	d.Log = quiet()
	bus := events.NewBus(events.Options{})
	m := NewMonitor(d, bus, Options{Limits: Limits{Unsent: 2 << 20}})
	deaf, good := serve(t, m), serve(t, m)
	deaf.negotiate()
	good.negotiate()
	const count, size = 200, 50_000
	for i := range count {
		bus.Emit(noise(size))
		if l := good.line(); !strings.Contains(l, "NOISE") || len(l) < size {
			t.Fatalf("event %d: %.100s", i, l)
		}
	}
	eventually(t, "the client to be disconnected", func() bool { return m.overflows.Load() == 1 && connected(m) == 1 })
	good.send(`{"execute":"query-jobs"}`)
	good.expect(`{"return": []}`)
}

// connected is the number of m's clients.
func connected(m *Monitor) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.sessions)
}

// While a client does not read its replies nothing more is read from it or executed.
func TestHoldInput(t *testing.T) {
	d := testDispatcher()
	var mu sync.Mutex
	executed := 0
	d.Handle("big", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		mu.Lock()
		executed++
		mu.Unlock()
		return value.AppendString(out, strings.Repeat("b", 100_000)), nil
	})
	m := NewMonitor(d, nil, Options{Limits: Limits{HoldInput: 500_000}})
	c := serve(t, m)
	c.negotiate()
	const total = 200
	go func() { _, _ = io.WriteString(c.conn, strings.Repeat(`{"execute":"big"}`, total)) }()
	last := 0
	eventually(t, "execution to stop", func() bool {
		mu.Lock()
		defer mu.Unlock()
		stands := executed == last && executed > 4
		last = executed
		return stands
	})
	if last > 30 { // the socket buffers take some too
		t.Errorf("%d commands were executed for a client that does not read", last)
	}
	for range total {
		if l := c.line(); len(l) < 100_000 {
			t.Fatalf("reply %q", l)
		}
	}
}

// A single reply may be larger than what may wait unsent.
func TestLargeReply(t *testing.T) {
	d := testDispatcher()
	d.Handle("big", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		return value.AppendString(out, strings.Repeat("b", 3_000_000)), nil
	})
	bus := events.NewBus(events.Options{})
	m := NewMonitor(d, bus, Options{Limits: Limits{Unsent: 1_000_000}})
	c := serve(t, m)
	c.negotiate()
	c.send(`{"execute":"big"}`)
	eventually(t, "the reply to be queued", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		for s := range m.sessions {
			s.out.mu.Lock()
			defer s.out.mu.Unlock()
			return s.out.unsentLocked() > 2_000_000
		}
		return false
	})
	bus.Emit(noise(1000))
	if l := c.line(); len(l) < 3_000_000 {
		t.Fatalf("%.100s", l)
	}
	if l := c.line(); !strings.Contains(l, "NOISE") {
		t.Fatalf("%.100s", l)
	}
}

// A hundred clients at once get their own replies and all events in order.
func TestHundredClients(t *testing.T) {
	bus := events.NewBus(events.Options{})
	m := NewMonitor(testDispatcher(), bus, Options{})
	var ready, done sync.WaitGroup
	const clients, commands, count = 100, 20, 50
	for i := range clients {
		c := serve(t, m)
		ready.Add(1)
		done.Go(func() {
			c.negotiate()
			ready.Done()
			for j := range commands {
				c.send(fmt.Sprintf(`{"execute":"echo","arguments":{"n":%d},"id":%d}`, j, i))
			}
			replies, heard := 0, 0
			for replies < commands || heard < count {
				l := c.line()
				switch {
				case strings.Contains(l, `"event"`):
					if !strings.Contains(l, fmt.Sprintf(`{"x": "%s"}`, strings.Repeat(".", heard))) {
						t.Errorf("client %d: event %d is %s", i, heard, l)
						return
					}
					heard++
				default:
					if want := fmt.Sprintf(`{"return": {"n": %d}, "id": %d}`, replies, i); l != want {
						t.Errorf("client %d: %s, want %s", i, l, want)
						return
					}
					replies++
				}
			}
		})
	}
	ready.Wait()
	for i := range count {
		bus.Emit(noise(i))
	}
	done.Wait()
}

// Events go to sessions that have negotiated and come before the reply of the command they happen
// in.
func TestEventOrder(t *testing.T) {
	d := testDispatcher()
	bus := events.NewBus(events.Options{})
	d.Handle("emit", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		bus.Emit(noise(1))
		bus.Emit(noise(2))
		return out, nil
	})
	m := NewMonitor(d, bus, Options{})
	a, b := serve(t, m), serve(t, m)
	a.negotiate()
	b.expect(testGreeting)
	for range 50 {
		a.send(`{"execute":"query-jobs"}{"execute":"emit"}`)
		a.expect(`{"return": []}`)
		for range 2 {
			if l := a.line(); !strings.Contains(l, "NOISE") {
				t.Fatal(l)
			}
		}
		a.expect(`{"return": {}}`)
	}
	b.send(`{"execute":"qmp_capabilities"}`)
	b.expect(`{"return": {}}`)
}

// With oob enabled an out-of-band request overtakes those in band, of which eight wait.
func TestOOB(t *testing.T) {
	d := testDispatcher()
	started, release, _ := blocked(d)
	d.HandleOOB("urgent", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		return append(out, `"now"`...), nil
	})
	c := serve(t, NewMonitor(d, nil, Options{}))
	c.expect(testGreeting)
	c.send(`{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}`)
	c.expect(`{"return": {}}`)
	c.send(`{"execute":"block","id":0}`)
	waitFor(t, started, "the command to start")
	c.send(`{"execute":"query-jobs","id":1}x {"exec-oob":"urgent","id":2}{"exec-oob":"query-jobs","id":3}{"exec-oob":"nope"}` +
		`{"exec-oob":"urgent","execute":"urgent","id":4}{"exec-oob":5}`)
	c.expect(`{"return": "now", "id": 2}`)
	c.expect(`{"id": 3, "error": {"class": "GenericError", "desc": "The command query-jobs does not support OOB"}}`)
	c.expect(`{"error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}`)
	c.expect(`{"error": {"class": "GenericError", "desc": "QMP input member 'exec-oob' must be a string"}}`)
	// Three wait; with five more the queue is full and nothing more is read.
	c.send(strings.Repeat(`{"execute":"query-jobs"}`, 5))
	c.send(`{"exec-oob":"urgent","id":"late"}`)
	close(release)
	c.expect(`{"return": {}, "id": 0}`)
	var got []string
	for range 9 {
		got = append(got, c.line())
	}
	all := strings.Join(got, "\n")
	for _, want := range []string{`{"return": [], "id": 1}`, "invalid keyword 'x'",
		`{"id": 4, "error": {"class": "GenericError", "desc": "QMP input member 'execute' clashes with 'exec-oob'"}}`,
		`{"return": "now", "id": "late"}`} {
		if !strings.Contains(all, want) {
			t.Errorf("no %s in\n%s", want, all)
		}
	}
}

// Nothing is executed behind quit, on any session, and the reply to quit comes.
func TestQuitStopsAll(t *testing.T) {
	d := testDispatcher()
	exit := make(chan struct{})
	d.Handle("leave", func(ctx context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		d.Stop()
		AfterReply(ctx, func() { close(exit) })
		return out, nil
	})
	m := NewMonitor(d, events.NewBus(events.Options{}), Options{})
	a, b := serve(t, m), serve(t, m)
	a.negotiate()
	b.negotiate()
	a.send(`{"execute":"leave"}{"execute":"query-jobs","id":"late"}`)
	a.expect(`{"return": {}}`)
	waitFor(t, exit, "the function to be called behind the reply")
	b.send(`{"execute":"query-jobs"}`)
	m.Close(time.Second)
	for _, c := range []*client{a, b} {
		if rest, _ := io.ReadAll(c.conn); len(rest) > 0 {
			t.Errorf("after quit: %s", rest)
		}
	}
}

// A client that does not take its replies does not hold up what it has started, and finds the reply
// before what came of it.
func TestAfterReplyOfDeafClient(t *testing.T) {
	d, bus := testDispatcher(), events.NewBus(events.Options{})
	started := make(chan time.Time, 1)
	d.Handle("large", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		return append(append(append(out, '"'), strings.Repeat("x", 900<<10)...), '"'), nil
	})
	d.Handle("start", func(ctx context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		AfterReply(ctx, func() {
			bus.Emit(types.JobStatusChangeEvent{ID: "j", Status: types.JobStatusRunning})
			started <- time.Now()
		})
		return out, nil
	})
	c := serve(t, NewMonitor(d, bus, Options{}))
	c.negotiate()
	was := time.Now()
	c.send(`{"execute":"large"}{"execute":"start","id":"s"}`)
	if took := waitFor(t, started, "the start").Sub(was); took > 700*time.Millisecond {
		t.Errorf("started after %v", took)
	}
	c.line()
	c.expect(`{"return": {}, "id": "s"}`)
	if l := c.line(); !strings.Contains(l, "JOB_STATUS_CHANGE") {
		t.Errorf("then %s", l)
	}
}

// Closing the monitor cancels what is under way and leaves no goroutine.
func TestCloseLeavesNothing(t *testing.T) {
	before := runtime.NumGoroutine()
	d := testDispatcher()
	started, _, ended := blocked(d)
	m := NewMonitor(d, events.NewBus(events.Options{}), Options{})
	for range 5 {
		c := serve(t, m)
		c.negotiate()
		c.send(`{"execute":"block"}`)
		waitFor(t, started, "the command to start")
	}
	m.Close(0)
	for range 5 {
		if err := waitFor(t, ended, "the command to end"); err == nil {
			t.Error("not cancelled")
		}
	}
	eventually(t, "goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
}

func TestPanics(t *testing.T) {
	d := testDispatcher()
	d.Log = quiet()
	defer panics.Contain()()
	d.Handle("bug", func(context.Context, *value.Dict, []byte) ([]byte, error) { panic("oh") })
	c := serve(t, NewMonitor(d, nil, Options{}))
	c.negotiate()
	c.send(`{"execute":"bug","id":1}{"execute":"query-jobs"}`)
	c.expect(`{"id": 1, "error": {"class": "GenericError", "desc": "Internal error in command 'bug': this is a bug of the daemon, and its log tells more"}}`)
	c.expect(`{"return": []}`)
}

// lingering is a stream whose output outlives its input.
type lingering struct {
	io.Reader
	io.Writer
	closed chan struct{}
	once   sync.Once
}

func (l *lingering) Close() error { l.once.Do(func() { close(l.closed) }); return nil }
func (*lingering) Lingers() bool  { return true }

// A client on stdio hears events after the end of its input.
func TestLinger(t *testing.T) {
	bus := events.NewBus(events.Options{})
	m := NewMonitor(testDispatcher(), bus, Options{})
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		m.Serve(&lingering{Reader: strings.NewReader(`{"execute":"qmp_capabilities"}`), Writer: w, closed: make(chan struct{})})
		close(done)
	}()
	heard := make(chan struct{})
	go func() {
		// The session subscribes at some time behind the reply.
		for tick := time.NewTicker(time.Millisecond); ; {
			select {
			case <-heard:
				tick.Stop()
				return
			case <-tick.C:
				bus.Emit(noise(1))
			}
		}
	}()
	var got []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(got, []byte("NOISE")) {
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:n]...)
	}
	close(heard)
	defer r.Close()
	go func() { _, _ = io.Copy(io.Discard, r) }()
	m.Close(time.Second)
	waitFor(t, done, "the session to end")
}
