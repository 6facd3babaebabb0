package player

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"time"
)

// conn is one connection to a monitor.
type conn struct {
	name    string
	c       net.Conn
	buf     []byte
	eof     bool
	pending []any            // decoded, not yet recorded
	events  []map[string]any // recorded, for !wait
	mark    int              // events before this one have been waited for
	region  int              // mark at the start of the unordered region
	eols    []string         // line ends seen
}

func (c *conn) send(b []byte) bool {
	_ = c.c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_, err := c.c.Write(b)
	return err == nil
}

// pump reads once, until deadline at most; false if nothing came.
func (c *conn) pump(deadline time.Time) bool {
	if c.eof {
		return false
	}
	_ = c.c.SetReadDeadline(deadline)
	var b [64 << 10]byte
	n, err := c.c.Read(b[:])
	c.buf = append(c.buf, b[:n]...)
	if bytes.IndexByte(b[:n], '\n') >= 0 {
		c.decode()
	}
	switch {
	case err == nil:
		return true
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n > 0
	}
	if !errors.Is(err, io.EOF) {
		c.buf = nil
	}
	c.eof = true
	return true
}

// decode takes whole messages out of buf. A message may span lines (pretty).
func (c *conn) decode() {
	start, end := 0, 0
	for {
		i := bytes.IndexByte(c.buf[end:], '\n')
		if i < 0 {
			break
		}
		end += i + 1
		text := c.buf[start:end]
		if len(bytes.TrimSpace(text)) == 0 {
			start = end
			continue
		}
		v, err := parse(text)
		if err != nil {
			continue
		}
		eol := "LF"
		if bytes.HasSuffix(text, []byte("\r\n")) {
			eol = "CRLF"
		}
		if !slices.Contains(c.eols, eol) {
			c.eols = append(c.eols, eol)
		}
		c.pending = append(c.pending, v)
		start = end
	}
	c.buf = slices.Clone(c.buf[start:])
}

func (c *conn) close() {
	c.c.Close()
	c.eof = true
}
