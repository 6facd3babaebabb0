package load

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// monitor is a raw client, for what the harness' own does not do.
type monitor struct {
	t testing.TB
	c *net.UnixConn
	r *bufio.Reader
}

func newMonitor(t testing.TB, d *daemon.Daemon) *monitor {
	c := dial(t, d.QMPSocket())
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return &monitor{t, c, bufio.NewReaderSize(c, 1<<20)}
}

func (m *monitor) send(s string) {
	m.t.Helper()
	if _, err := io.WriteString(m.c, s+"\n"); err != nil {
		m.t.Fatal(err)
	}
}

func (m *monitor) expect(part string) {
	m.t.Helper()
	line, err := m.r.ReadString('\n')
	if err != nil || !strings.Contains(line, part) {
		m.t.Fatalf("got %.200q, %v; want %q in it", line, err, part)
	}
}

func (m *monitor) negotiate() {
	m.t.Helper()
	m.expect(`{"QMP"`)
	m.send(`{"execute":"qmp_capabilities"}`)
	m.expect(`{"return": {}}`)
}

// TestMessageLimits: what is over a limit gets its error, and the client goes on.
func TestMessageLimits(t *testing.T) {
	d := start(t, "--limit", "qmp-message=8k,qmp-nesting=8", "--limit", "qmp-tokens=100")
	m := newMonitor(t, d)
	m.negotiate()
	echo := func(arg string) string { return `{"execute":"query-version","arguments":{"x":` + arg + `}}` }
	m.send(echo(`"` + strings.Repeat("x", 7000) + `"`))
	m.expect("Parameter 'x' is unexpected")
	m.send(echo(strings.Repeat("[", 6) + strings.Repeat("]", 6)))
	m.expect("Parameter 'x' is unexpected")
	for _, over := range []struct{ text, want string }{
		{echo(`"` + strings.Repeat("x", 9000) + `"`), "JSON token size limit exceeded"},
		{echo(strings.Repeat("[", 7) + strings.Repeat("]", 7)), "JSON nesting depth limit exceeded"},
		{echo("[" + strings.Repeat("1,", 60) + "1]"), "JSON token count limit exceeded"},
	} {
		m := newMonitor(t, d)
		m.negotiate()
		m.send(over.text)
		m.expect(over.want)
		m.send("\x1b" + `{"execute":"query-version","id":"after"}`) // ESC: begin afresh
		for {
			line, err := m.r.ReadString('\n')
			if err != nil {
				t.Fatalf("after %.80s: %v", over.text, err)
			}
			if strings.Contains(line, `"id": "after"`) {
				break
			}
		}
	}
}

// TestClientLimit: the second client is served when the first has gone.
func TestClientLimit(t *testing.T) {
	d := start(t, "--limit", "qmp-clients=1")
	first, second := newMonitor(t, d), newMonitor(t, d)
	first.negotiate()
	_ = second.c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if line, err := second.r.ReadString('\n'); err == nil {
		t.Errorf("the second client got %q", line)
	}
	_ = second.c.SetReadDeadline(time.Now().Add(10 * time.Second))
	first.c.Close()
	second.negotiate()
}

// TestHold: commands of a client wait while it does not read what was answered.
func TestHold(t *testing.T) {
	d := start(t, "--limit", "qmp-hold=1")
	q, m := d.Dial(t), newMonitor(t, d)
	m.negotiate()
	const replies = 20
	m.send(strings.Repeat(`{"execute":"query-qmp-schema"}`, replies) + `{"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"late"}}`)
	if _, err := m.r.Peek(100_000); err != nil { // the first is there
		t.Fatal(err)
	}
	if q.Must(t, "query-version", nil); strings.Contains(string(q.Must(t, "query-named-block-nodes", nil)), `"late"`) {
		t.Error("the command did not wait")
	}
	for range replies {
		m.expect(`{"return": [`)
	}
	m.expect(`{"return": {}}`)
}

// handshake makes a connection and begins a handshake; the greeting comes only if the connection is
// served.
func handshake(t testing.TB, d *daemon.Daemon, wait time.Duration) (net.Conn, error) {
	c := dial(t, d.NBDSocket())
	_ = c.SetReadDeadline(time.Now().Add(wait))
	_, err := io.ReadFull(c, make([]byte, 18))
	return c, err
}

// TestHandshakeLimits: connections beyond the limit wait, and come in when others have taken too
// long.
func TestHandshakeLimits(t *testing.T) {
	d := start(t, "--limit", "nbd-connections=2,nbd-handshake=1")
	began := time.Now()
	var first [2]net.Conn
	for i := range first {
		var err error
		if first[i], err = handshake(t, d, 10*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	third, err := handshake(t, d, 50*time.Millisecond)
	if err == nil && time.Since(began) < time.Second {
		t.Error("a third connection was served")
	}
	_ = third.SetReadDeadline(time.Now().Add(10 * time.Second))
	if err != nil {
		if _, err := io.ReadFull(third, make([]byte, 18)); err != nil {
			t.Errorf("the third connection is not served: %v", err)
		}
	}
	if took := time.Since(began); took < time.Second {
		t.Errorf("after %v there was room", took)
	}
	for _, c := range first {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("a handshake that took too long: %v", err)
		}
	}
	// The server's own option goes before.
	q := d.Dial(t)
	q.Must(t, "nbd-server-stop", nil)
	q.Must(t, "nbd-server-start", map[string]any{
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": d.NBDSocket()}}, "max-connections": 3})
	for range 3 {
		if _, err := handshake(t, d, 10*time.Second); err != nil {
			t.Errorf("max-connections=3: %v", err)
		}
	}
}

// TestInflightLimits: requests beyond the limit wait for the others.
func TestInflightLimits(t *testing.T) {
	const count, size, latency = 5, 64 << 10, 20 * time.Millisecond
	for _, limit := range []string{"nbd-inflight=1", "nbd-inflight-bytes=64k", "nbd-inflight=5"} {
		d := daemon.Start(t, t.TempDir(), "--limit", limit,
			"--blockdev", fmt.Sprintf("null-co,node-name=s,size=1048576,latency-ns=%d", latency.Nanoseconds()),
			"--export", "nbd,id=s,node-name=s,name=s")
		c, err := d.DialNBD("s")
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := c.ReadAhead(count, size); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		t.Logf("%s: %v", limit, took)
		if serial := limit != "nbd-inflight=5"; serial && took < count*latency {
			t.Errorf("%s: %d reads of %v took %v", limit, count, latency, took)
		}
		c.Close()
	}
}
