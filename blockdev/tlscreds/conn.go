package tlscreds

import (
	"net"
	"sync"
	"time"
)

// maxRecord is how much one record takes, in bytes.
const maxRecord = 16 << 10

// Conn is a connection under TLS. One goroutine may read while others write.
type Conn struct {
	tls  net.Conn // what makes records; below it is wire
	wire *wire
	peer string

	batches batcher // tls, if it is one

	writing sync.Mutex
	// what small pieces become a record in
	part [maxRecord]byte // +checklocks:writing
	n    int             // +checklocks:writing
}

// Layer makes records of a connection. Its Close tells the peer of the end, and closes the
// connection below.
type Layer interface {
	net.Conn
	Handshake() error
}

// batcher is a Layer that needs no help to read ahead, and to put many records into one write.
type batcher interface {
	WriteVec(v net.Buffers) (int64, error)
}

// NewConn makes a connection one under TLS, whose records under makes. peer is the name of the
// peer, which the handshake has told. After an error nc is for the caller to close.
func NewConn[L Layer](nc net.Conn, under func(wire net.Conn) L, peer func(l L) string) (*Conn, error) {
	w := newWire(nc)
	l := under(w)
	if err := l.Handshake(); err != nil {
		return nil, err
	}
	c := &Conn{tls: l, wire: w, peer: peer(l)}
	if c.batches, _ = net.Conn(l).(batcher); c.batches == nil {
		w.ahead = make([]byte, aheadSize)
	}
	return c, nil
}

// Peer is the name that the peer has proved to have; "" if it was not asked for one.
func (c *Conn) Peer() string { return c.peer }

// Read implements net.Conn. It returns io.EOF when the peer has said that nothing more comes;
// errors that have to do with neither deadlines nor Close are *ChannelError.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.tls.Read(b)
	if err != nil {
		err = channelError("Cannot read from TLS channel", err, c.wire.ended)
	}
	return n, err
}

// Write implements net.Conn. Records of one write go to the kernel together. Errors are as those of
// Read.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := c.write(b)
	return n, writeError(err)
}

func writeError(err error) error { return channelError("Cannot write to TLS channel", err, true) }

func (c *Conn) write(b []byte) (int, error) {
	if c.batches != nil {
		return c.tls.Write(b)
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	if len(b) <= maxRecord {
		return c.tls.Write(b)
	}
	c.wire.hold()
	n, err := c.tls.Write(b)
	if e := c.wire.release(); err == nil {
		err = e
	}
	return n, err
}

// WriteVec writes what v has, in as few records and system calls as that takes, and consumes v.
// After an error it is not known what of it was sent.
func (c *Conn) WriteVec(v net.Buffers) (n int64, err error) {
	if c.batches != nil {
		n, err = c.batches.WriteVec(v)
		clear(v)
		return n, writeError(err)
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	total := 0
	for _, b := range v {
		total += len(b)
	}
	many := total > maxRecord
	if many {
		c.wire.hold()
	}
	for i, b := range v {
		if v[i] = nil; err == nil {
			n += int64(len(b))
			err = c.addLocked(b)
		}
	}
	if err == nil && c.n > 0 {
		_, err = c.tls.Write(c.part[:c.n])
	}
	if c.n = 0; many {
		if e := c.wire.release(); err == nil {
			err = e
		}
	}
	return n, writeError(err)
}

// addLocked writes b, but for the end of it, which waits for more.
// +checklocks:c.writing
func (c *Conn) addLocked(b []byte) error {
	if c.n > 0 {
		k := copy(c.part[c.n:], b)
		c.n += k
		if b = b[k:]; c.n < maxRecord {
			return nil
		}
		c.n = 0
		if _, err := c.tls.Write(c.part[:]); err != nil {
			return err
		}
	}
	if k := len(b) / maxRecord * maxRecord; k > 0 {
		if _, err := c.tls.Write(b[:k]); err != nil {
			return err
		}
		b = b[k:]
	}
	c.n = copy(c.part[:], b)
	return nil
}

// WriteVec writes what v has to a connection, under TLS or not, and consumes v. v must live in the
// heap.
func WriteVec(nc net.Conn, v *net.Buffers) (int64, error) {
	if c, ok := nc.(*Conn); ok {
		return c.WriteVec(*v)
	}
	return v.WriteTo(nc)
}

// goodbye tells the peer that nothing more comes, if that can be told at once.
func (c *Conn) goodbye() {
	c.wire.closing.Store(true)
	_ = c.wire.Conn.SetWriteDeadline(time.Unix(1, 0)) // whoever writes is not waited for
	_ = c.tls.Close()
}

// Close ends the connection. It does not wait: who is writing gets an error, and the peer is told
// of the end if that can be done at once.
func (c *Conn) Close() error {
	c.goodbye()
	return c.wire.Conn.Close()
}

// Below is the connection that is encrypted.
func (c *Conn) Below() net.Conn { return c.wire.Conn }

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.wire.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.wire.RemoteAddr() }

// SetDeadline implements net.Conn. A write that was too late is the last.
func (c *Conn) SetDeadline(t time.Time) error { return c.wire.Conn.SetDeadline(t) }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.wire.Conn.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn. A write that was too late is the last.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.wire.Conn.SetWriteDeadline(t) }
