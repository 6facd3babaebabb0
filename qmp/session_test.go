package qmp

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/events"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// socketPair returns the two ends of a connected unix stream socket.
func socketPair(t testing.TB) (client, server *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		nc, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		c[i] = nc.(*net.UnixConn)
	}
	return c[0], c[1]
}

var testVersion = Version{8, 2, 7, "qblockd test"}

// testDispatcher knows query-jobs (empty list), quit (stops) and echo (returns its arguments).
func testDispatcher() *Dispatcher {
	d := NewDispatcher(testVersion)
	d.Handle("qmp_capabilities", func(ctx context.Context, args *value.Dict, out []byte) ([]byte, error) {
		a, err := types.DecodeQmpCapabilitiesArgs(args)
		if err != nil {
			return nil, err
		}
		return out, Negotiate(ctx, len(a.Enable) > 0)
	})
	d.Handle("query-jobs", func(_ context.Context, args *value.Dict, out []byte) ([]byte, error) {
		if m := args.Members(); len(m) > 0 {
			return nil, errors.New("Parameter '" + m[0].Name + "' is unexpected")
		}
		return append(out, "[]"...), nil
	})
	d.Handle("echo", func(_ context.Context, args *value.Dict, out []byte) ([]byte, error) {
		return value.Append(out, args), nil
	})
	d.Handle("quit", func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
		d.Stop()
		return out, nil
	})
	return d
}

// client is the test's end of a session.
type client struct {
	t    testing.TB
	conn *net.UnixConn
	buf  []byte
}

// serve starts a session of m and returns its client; the session has ended when the test has.
func serve(t testing.TB, m *Monitor) *client {
	t.Helper()
	c, s := socketPair(t)
	done := make(chan struct{})
	go func() {
		m.Serve(s)
		close(done)
	}()
	t.Cleanup(func() {
		c.Close()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("session does not end")
		}
	})
	cl := &client{t: t, conn: c}
	return cl
}

func (c *client) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c.conn, s); err != nil {
		c.t.Fatal(err)
	}
}

// line reads one line, without its CRLF.
func (c *client) line() string {
	c.t.Helper()
	for {
		if i := strings.Index(string(c.buf), "\r\n"); i >= 0 {
			l := string(c.buf[:i])
			c.buf = c.buf[i+2:]
			return l
		}
		chunk := make([]byte, 64<<10)
		_ = c.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, err := c.conn.Read(chunk)
		if err != nil {
			c.t.Fatalf("read: %v, have %.200q", err, c.buf)
		}
		c.buf = append(c.buf, chunk[:n]...)
	}
}

func (c *client) expect(want string) {
	c.t.Helper()
	if got := c.line(); got != want {
		c.t.Fatalf("got  %s\nwant %s", got, want)
	}
}

var noDeadline time.Time

const testGreeting = `{"QMP": {"version": {"qemu": {"micro": 7, "minor": 2, "major": 8}, "package": "qblockd test"}, "capabilities": ["oob"]}}`

func (c *client) negotiate() {
	c.t.Helper()
	c.expect(testGreeting)
	c.send(`{"execute":"qmp_capabilities"}`)
	c.expect(`{"return": {}}`)
}

func TestConversation(t *testing.T) {
	m := NewMonitor(testDispatcher(), events.NewBus(events.Options{}), Options{})
	c := serve(t, m)
	c.expect(testGreeting)
	c.send(`{"execute":"query-jobs","id":1}`)
	c.expect(`{"id": 1, "error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}`)
	c.send(`{"execute":"qmp_capabilities"}{"execute":"query-jobs","id":{"a":1,"b":2}}`)
	c.expect(`{"return": {}}`)
	c.expect(`{"return": [], "id": {"a": 1, "b": 2}}`)
	c.send(`{"execute":"quit"}{"execute":"query-jobs"}`)
	c.expect(`{"return": {}}`)
	m.Close(time.Second)
	if n, err := c.conn.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("after quit: %d, %v", n, err)
	}
}
