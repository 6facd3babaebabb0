package chardev

import "net"

// Telnet's bytes (RFC 854).
const (
	iac  = 255
	will = 251
	dont = 254
	do   = 253
)

// telnetHello makes the client's terminal raw and eight bits wide, without local echo: IAC WILL
// ECHO, WILL SUPPRESS-GO-AHEAD, WILL BINARY, DO BINARY.
var telnetHello = []byte{iac, will, 1, iac, will, 3, iac, will, 0, iac, do, 0}

// telnetConn takes the telnet commands out of what a client sends.
type telnetConn struct {
	net.Conn
	state int // 0: data, 1: after IAC, 2: before the option of a command
}

func (c *telnetConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		out := b[:0]
		for _, x := range b[:n] {
			switch {
			case c.state == 0 && x == iac:
				c.state = 1
			case c.state == 0:
				out = append(out, x)
			case c.state == 1 && x == iac: // an escaped data byte
				out = append(out, x)
				c.state = 0
			case c.state == 1 && x >= will && x <= dont:
				c.state = 2
			default:
				c.state = 0
			}
		}
		if len(out) > 0 || err != nil || len(b) == 0 {
			return len(out), err
		}
	}
}
