package tlspsk

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
)

const (
	// firstInput is how much is taken from the connection below at once as long as records are
	// short, in bytes; allInput when one was not.
	firstInput = 4 << 10
	allInput   = 64 << 10
	// maxUseless is how many records in a row may come that have no data.
	maxUseless = 32
	// maxEarly is how much early data is passed over, in bytes of its records.
	maxEarly = 64 << 10
	// updateRequested in a KeyUpdate asks for one in return.
	updateRequested = 1
)

// input is the direction from the peer.
type input struct {
	sync.Mutex
	half
	buf     []byte
	r, w    int    // what has come and has not been opened is buf[r:w]
	data    []byte // what has been opened and not been read; in buf
	hand    []byte // the beginning of messages of the handshake
	useless int
	// seenHello says that a client has begun
	seenHello bool
	early     int   // how much early data may still come
	asked     bool  // the peer has been asked for another key
	err       error // nothing more can be read
}

// end makes sure that nothing more is read.
func (i *input) end(err error) {
	if i.err == nil {
		i.err = err
	}
	clear(i.data)
	i.data, i.hand = nil, nil
	i.wipe()
}

// Read implements net.Conn. It returns io.EOF when the peer has said that nothing more comes, and
// io.ErrUnexpectedEOF when the connection ends without that.
func (c *Conn) Read(b []byte) (int, error) {
	if err := c.Handshake(); err != nil {
		return 0, err
	}
	if len(b) == 0 {
		return 0, nil
	}
	c.in.Lock()
	defer c.in.Unlock()
	for len(c.in.data) == 0 {
		if c.in.err != nil {
			return 0, c.in.err
		}
		if err := c.moreLocked(); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return 0, err // what has come so far is kept
			}
			c.in.end(err)
			c.complain(err)
			return 0, err
		}
	}
	n := copy(b, c.in.data)
	c.in.data = c.in.data[n:]
	return n, nil
}

// moreLocked handles a record after the handshake.
func (c *Conn) moreLocked() error {
	in := &c.in
	typ, b, err := c.recordLocked()
	if err != nil {
		return err
	}
	if len(in.hand) > 0 && typ != recordHandshake {
		return fail(UnexpectedMessage, "a message is interrupted")
	}
	if typ == recordData && len(b) > 0 {
		in.data, in.useless = b, 0
		if in.seq >= c.maxRecords && !in.asked {
			in.asked = true
			c.asking.Store(true)
		}
		return nil
	}
	if in.useless++; in.useless > maxUseless {
		return fail(UnexpectedMessage, "too many records without data")
	}
	switch typ {
	case recordData:
		return nil
	case recordAlert:
		return c.alerted(b)
	case recordHandshake:
		return c.afterLocked(b)
	}
	return fail(UnexpectedMessage, "a record comes at the wrong time")
}

// alerted is what an alert of the peer comes to.
func (c *Conn) alerted(b []byte) error {
	if len(b) != 2 {
		return fail(DecodeError, "an alert cannot be read")
	}
	switch a := Alert(b[1]); a {
	case CloseNotify:
		if !c.shook.Load() {
			return io.ErrUnexpectedEOF
		}
		return io.EOF
	case UserCanceled: // CloseNotify follows
		return nil
	default:
		return RemoteError(a)
	}
}

// afterLocked handles messages of a handshake that is over.
func (c *Conn) afterLocked(b []byte) error {
	if err := c.addHandLocked(b); err != nil {
		return err
	}
	for {
		typ, raw, err := c.cutHandLocked()
		if err != nil || raw == nil {
			return err
		}
		body := raw[messageHeader:]
		switch {
		case typ == typeNewSessionTicket && c.client: // there is no resumption
		case typ == typeKeyUpdate && len(body) == 1 && body[0] <= updateRequested:
			if len(c.in.hand) > 0 {
				return fail(UnexpectedMessage, "a message goes on under another key")
			}
			c.in.update()
			c.in.asked = false
			if body[0] == updateRequested {
				c.owed.Store(true)
			}
		case typ == typeKeyUpdate:
			return fail(IllegalParameter, "a request for another key cannot be read")
		default:
			return fail(UnexpectedMessage, "a message comes at the wrong time")
		}
	}
}

// addHandLocked adds a piece of messages.
func (c *Conn) addHandLocked(b []byte) error {
	if len(b) == 0 {
		return fail(UnexpectedMessage, "an empty piece of a message")
	}
	c.in.hand = append(c.in.hand, b...)
	return nil
}

// cutHandLocked is the next message, nil if it is not complete.
func (c *Conn) cutHandLocked() (typ byte, raw []byte, err error) {
	h := c.in.hand
	if len(h) < messageHeader {
		return 0, nil, nil
	}
	n := messageHeader + int(h[1])<<16 + int(h[2])<<8 + int(h[3])
	if n > maxMessage {
		return 0, nil, fail(DecodeError, "a message is too long")
	}
	if len(h) < n {
		return 0, nil, nil
	}
	if c.in.hand = h[n:]; len(h) == n {
		c.in.hand = nil
	}
	return h[0], h[:n:n], nil
}

// messageLocked waits for a message during the handshake.
func (c *Conn) messageLocked() (typ byte, raw []byte, err error) {
	for {
		typ, raw, err = c.cutHandLocked()
		if err != nil || raw != nil {
			return typ, raw, err
		}
		typ, b, err := c.recordLocked()
		if err != nil {
			return 0, nil, err
		}
		if c.in.useless++; c.in.useless > 2*maxUseless {
			return 0, nil, fail(UnexpectedMessage, "the messages come in too many pieces")
		}
		switch {
		case typ == recordAlert && len(c.in.hand) == 0:
			err = c.alerted(b)
		case typ == recordHandshake:
			err = c.addHandLocked(b)
		default:
			err = fail(UnexpectedMessage, "a record comes at the wrong time")
		}
		if err != nil {
			return 0, nil, err
		}
	}
}

// readKey begins to open records with a secret. Nothing of a message may have come before.
func (s *shake) readKey(secret []byte) error {
	if len(s.c.in.hand) > 0 {
		return fail(UnexpectedMessage, "a message goes on under another key")
	}
	s.use(&s.c.in.half, secret)
	return nil
}

// recordLocked waits for a record and opens it.
func (c *Conn) recordLocked() (typ byte, b []byte, err error) {
	in := &c.in
	for {
		if err := c.fillLocked(headerLen); err != nil {
			return 0, nil, err
		}
		h := in.buf[in.r:in.w]
		typ, n := h[0], int(h[3])<<8|int(h[4])
		if err := in.checkHeader(typ, h[1], n); err != nil {
			return 0, nil, err
		}
		if err := c.fillLocked(headerLen + n); err != nil {
			return 0, nil, err
		}
		rec := in.buf[in.r : in.r+headerLen+n]
		in.r += len(rec)
		b = rec[headerLen:]
		switch {
		case typ == recordChangeCipherSpec && !c.shook.Load():
			if n != 1 || b[0] != 1 || !c.begun() || len(in.hand) > 0 {
				return 0, nil, fail(UnexpectedMessage, "a record comes at the wrong time")
			}
			if in.useless++; in.useless > maxUseless {
				return 0, nil, fail(UnexpectedMessage, "too many records without data")
			}
			continue
		case in.clear() && typ == recordData && headerLen+n <= in.early: // after another ClientHello was asked for
			in.early -= headerLen + n
			continue
		case in.clear(), typ == recordAlert && n == 2 && !c.shook.Load():
			// An end that could not find out the keys complains in the clear.
			return typ, b, nil
		case typ != recordData:
			return 0, nil, fail(UnexpectedMessage, "a record is not protected")
		}
		typ, b, err = in.open(rec)
		if err != nil && headerLen+n <= in.early {
			in.early -= headerLen + n
			continue
		}
		in.early = 0
		return typ, b, err
	}
}

// begun tells whether the peer has said anything that a ChangeCipherSpec may follow.
func (c *Conn) begun() bool { return c.client || c.in.seenHello }

// checkHeader refuses what cannot be a record, before more of it is waited for.
func (i *input) checkHeader(typ, major byte, n int) error {
	if typ < recordChangeCipherSpec || typ > recordData || major != 3 {
		return fail(UnexpectedMessage, "this is not TLS")
	}
	most := maxPlain
	if !i.clear() && typ == recordData {
		most = maxSealed
	}
	if i.early > 0 {
		most = maxSealed
	}
	if n > most {
		return fail(RecordOverflow, "a record is too long")
	}
	return nil
}

// fillLocked waits until n bytes are there that have not been opened.
func (c *Conn) fillLocked(n int) error {
	in := &c.in
	if in.w-in.r >= n {
		return nil
	}
	if size := inputSize(n); size > len(in.buf) {
		b := make([]byte, size)
		in.w = copy(b, in.buf[in.r:in.w])
		in.r, in.buf = 0, b
	}
	if in.r == in.w {
		in.r, in.w = 0, 0
	}
	if in.r+n > len(in.buf) {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	k, err := io.ReadAtLeast(c.nc, in.buf[in.w:], in.r+n-in.w)
	in.w += k
	switch {
	case err != nil && c.closed.Load():
		return net.ErrClosed
	case errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF // the peer has not said so
	}
	return err
}

func inputSize(n int) int {
	if n <= firstInput {
		return firstInput
	}
	return allInput
}
