package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// client is one connection to a QMP monitor, negotiated. A goroutine reads it until it ends: close
// waits for it.
type client struct {
	conn    net.Conn
	onEvent func(*message) // called by the reader; nil: events are dropped
	replies chan *message
	ended   chan struct{} // closed when nothing comes any more, after err is set
	err     error         // why it ended
	next    int64         // id of the next command
}

// message is anything a daemon says; the members tell what it is.
type message struct {
	ID        json.RawMessage
	QMP       json.RawMessage
	Return    json.RawMessage
	Error     *replyError
	Event     string
	Data      json.RawMessage
	Timestamp struct{ Seconds, Microseconds int64 }

	raw json.RawMessage // all of it
}

// replyError is a command's refusal.
type replyError struct{ Class, Desc string }

// Error is the sentence of the daemon, with its class if that says more.
func (e *replyError) Error() string {
	desc := printable(e.Desc)
	if e.Class == "GenericError" {
		return desc
	}
	return desc + " (" + e.Class + ")"
}

// errClosed: the daemon has ended the connection.
var errClosed = errors.New("the daemon closed the connection")

// dial connects to the monitor at addr, a path or tcp:HOST:PORT, and negotiates. Events go to
// onEvent as they come.
func dial(ctx context.Context, addr string, onEvent func(*message)) (*client, error) {
	network := "unix"
	if rest, ok := strings.CutPrefix(addr, "tcp:"); ok {
		network, addr = "tcp", rest
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, fmt.Errorf("is qblockd running? %w", err)
	}
	return negotiate(ctx, conn, addr, onEvent)
}

// negotiate is dial on a connection that is there, which it takes over.
func negotiate(ctx context.Context, conn net.Conn, addr string, onEvent func(*message)) (*client, error) {
	c := &client{conn: conn, onEvent: onEvent, replies: make(chan *message), ended: make(chan struct{})}
	greeted := make(chan json.RawMessage, 1)
	go c.readAll(greeted)
	var err error
	select {
	case greeting := <-greeted:
		var m message
		if json.Unmarshal(greeting, &m) != nil || m.QMP == nil {
			err = fmt.Errorf("%s does not greet as a QMP monitor does: %.100s", addr, greeting)
		} else {
			_, err = c.execute(ctx, "qmp_capabilities", nil)
		}
	case <-c.ended:
		err = fmt.Errorf("%s does not greet as a QMP monitor does, or not this user (allow-uid): %w", addr, c.err)
	case <-ctx.Done():
		err = fmt.Errorf("%s does not answer: %w", addr, ctx.Err())
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *client) close() {
	c.conn.Close()
	for {
		select {
		case <-c.replies: // nobody waits for it any more
		case <-c.ended:
			return
		}
	}
}

// execute does one command and returns what it returned; a refusal is a *replyError. arguments is
// nil for none. When ctx ends it returns at once; the command goes on in the daemon. One command at
// a time.
func (c *client) execute(ctx context.Context, command string, arguments any) (json.RawMessage, error) {
	c.next++
	request := map[string]any{"execute": command, "id": c.next}
	if arguments != nil {
		request["arguments"] = arguments
	}
	b, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	_, err = c.conn.Write(append(b, '\n'))
	if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.EPIPE) {
		return nil, err
	}
	id := strconv.FormatInt(c.next, 10)
	for {
		select {
		case m := <-c.replies:
			switch {
			case string(m.ID) != id && m.Error == nil: // of a command that was given up
			case m.Error != nil && m.ID != nil && string(m.ID) != id:
			case m.Error != nil:
				return nil, m.Error
			default:
				return m.Return, nil
			}
		case <-c.ended:
			if errors.Is(c.err, errClosed) {
				return nil, fmt.Errorf("%w without an answer", c.err)
			}
			return nil, c.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// readAll reads the greeting, then replies and events, until the connection ends.
func (c *client) readAll(greeted chan<- json.RawMessage) {
	defer close(c.ended)
	in := json.NewDecoder(c.conn)
	for first := true; ; first = false {
		m := &message{}
		switch err := in.Decode(&m.raw); {
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed), errors.Is(err, syscall.ECONNRESET):
			c.err = errClosed
			return
		case err != nil:
			c.err = err
			return
		}
		if first {
			greeted <- m.raw
			continue
		}
		if err := json.Unmarshal(m.raw, m); err != nil {
			c.err = fmt.Errorf("not a QMP message: %w: %.100s", err, m.raw)
			return
		}
		switch {
		case m.Event == "":
			c.replies <- m
		case c.onEvent != nil:
			c.onEvent(m)
		}
	}
}

// query executes a command and decodes what it returns.
func query[T any](ctx context.Context, c *client, command string, arguments any) (result T, err error) {
	text, err := c.execute(ctx, command, arguments)
	if err == nil {
		err = json.Unmarshal(text, &result)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", command, err)
	}
	return result, err
}

// eventQueue holds events between the reader of a connection and who handles them. Its reader never
// waits.
type eventQueue struct {
	mu     sync.Mutex
	events []*message    // guarded by mu
	wake   chan struct{} // has a token when there may be events
}

func newEventQueue() *eventQueue { return &eventQueue{wake: make(chan struct{}, 1)} }

func (q *eventQueue) put(m *message) {
	q.mu.Lock()
	q.events = append(q.events, m)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take returns what has come, in order.
func (q *eventQueue) take() []*message {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.events
	q.events = nil
	return l
}

// printJSON prints a value laid out for reading, members in the order in which they came.
func printJSON(out io.Writer, text json.RawMessage) error {
	var b bytes.Buffer
	if err := json.Indent(&b, text, "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err := out.Write(b.Bytes())
	return err
}
