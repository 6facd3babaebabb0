package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// client is one connection to a QMP monitor, negotiated.
type client struct {
	conn   net.Conn
	in     *json.Decoder
	events []*message // that came while a reply was waited for
}

// message is anything a daemon says; the members tell what it is.
type message struct {
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
	if e.Class == "GenericError" {
		return e.Desc
	}
	return e.Desc + " (" + e.Class + ")"
}

// line shows an event for reading: local time, name, data.
func (m *message) line() string {
	at := time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)
	return strings.TrimRight(at.Format("15:04:05.000000")+" "+m.Event+" "+string(m.Data), " ")
}

// dial connects to the monitor at addr, a path or tcp:HOST:PORT, and negotiates.
func dial(addr string) (*client, error) {
	network := "unix"
	if rest, ok := strings.CutPrefix(addr, "tcp:"); ok {
		network, addr = "tcp", rest
	}
	conn, err := net.Dial(network, addr)
	if err != nil {
		return nil, fmt.Errorf("is qblockd running? %w", err)
	}
	c := &client{conn: conn, in: json.NewDecoder(conn)}
	greeting, err := c.read()
	if err == nil && greeting.QMP == nil {
		err = fmt.Errorf("%s does not greet as a QMP monitor does: %.100s", addr, greeting.raw)
	}
	if err == nil {
		_, err = c.execute("qmp_capabilities", nil)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *client) close() { c.conn.Close() }

// execute does one command and returns what it returned; a refusal is a *replyError. arguments is nil for none.
func (c *client) execute(command string, arguments any) (json.RawMessage, error) {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	b, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		return nil, err
	}
	for {
		m, err := c.read()
		switch {
		case errors.Is(err, io.EOF):
			return nil, errors.New("the daemon closed the connection without an answer")
		case err != nil:
			return nil, err
		case m.Event != "":
			c.events = append(c.events, m)
		case m.Error != nil:
			return nil, m.Error
		default:
			return m.Return, nil
		}
	}
}

// event returns the next event; io.EOF when the daemon has ended the connection.
func (c *client) event() (*message, error) {
	if len(c.events) > 0 {
		m := c.events[0]
		c.events = c.events[1:]
		return m, nil
	}
	for {
		m, err := c.read()
		if err != nil || m.Event != "" {
			return m, err
		}
	}
}

func (c *client) read() (*message, error) {
	m := &message{}
	if err := c.in.Decode(&m.raw); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(m.raw, m); err != nil {
		return nil, fmt.Errorf("not a QMP message: %w: %.100s", err, m.raw)
	}
	return m, nil
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
