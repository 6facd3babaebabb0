package tlspsk

import (
	"bytes"
	"crypto"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

// replay is a peer that says what it says, whatever it is told.
type replay struct{ r io.Reader }

func (c *replay) Read(b []byte) (int, error)       { return c.r.Read(b) }
func (c *replay) Write(b []byte) (int, error)      { return len(b), nil }
func (c *replay) Close() error                     { return nil }
func (c *replay) LocalAddr() net.Addr              { return nil }
func (c *replay) RemoteAddr() net.Addr             { return nil }
func (c *replay) SetDeadline(time.Time) error      { return nil }
func (c *replay) SetReadDeadline(time.Time) error  { return nil }
func (c *replay) SetWriteDeadline(time.Time) error { return nil }

// told tells whether an error is one of those that a peer can cause.
func told(err error) bool {
	var l *LocalError
	var r RemoteError
	return errors.As(err, &l) || errors.As(err, &r) || err == io.ErrUnexpectedEOF
}

// FuzzServer has a client say anything. The key of the server is known to it: what has no valid
// binder gets one in a second attempt, so that what lies behind it is reached.
func FuzzServer(f *testing.F) {
	for i := range greetings {
		f.Add(greetingOf(f, i))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, in := range [][]byte{b, bound(b)} {
			c := Server(&replay{bytes.NewReader(in)}, serverConfig())
			if err := c.Handshake(); !told(err) {
				t.Errorf("got %v", err)
			}
			if len(c.in.buf) > allInput || len(c.in.hand) > maxMessage+maxPlain {
				t.Errorf("%d bytes make the server keep %d and %d", len(in), len(c.in.buf), len(c.in.hand))
			}
		}
	})
}

// bound is a record with a ClientHello with the binder of our key.
func bound(b []byte) []byte {
	if len(b) < headerLen+messageHeader {
		return nil
	}
	raw := bytes.Clone(b[headerLen:])
	h, err := parseClientHello(raw)
	if err != nil || len(h.identities) == 0 || len(h.identities[0].binder) != 32 || len(raw) > maxPlain {
		return nil
	}
	binder := newSchedule(crypto.SHA256, testKey).binder(labelBinder, sum(crypto.SHA256, raw[:h.unbound]))
	copy(raw[h.unbound+3:], binder)
	return record(recordHandshake, raw)
}

// FuzzClient has a server say anything.
func FuzzClient(f *testing.F) {
	hello := &serverHello{
		random: random(randomLen), session: make([]byte, maxSession), suite: suites[0].id, version: version13, hasKey: true,
		share: share{groups[0].id, make([]byte, 32)},
	}
	f.Add(record(recordHandshake, hello.marshal()))
	hello.random, hello.hasKey, hello.share.group = retryRandom, false, groups[1].id
	f.Add(record(recordHandshake, hello.marshal()))
	f.Add(record(recordAlert, []byte{2, 40}))
	f.Fuzz(func(t *testing.T, b []byte) {
		// The session is random: a server has to repeat it.
		c := Client(&repeating{replay: replay{bytes.NewReader(b)}, b: b}, clientConfig())
		if err := c.Handshake(); !told(err) {
			t.Errorf("got %v", err)
		}
	})
}

// repeating puts the session of the ClientHello into what looks like the answer.
type repeating struct {
	replay
	b []byte
}

func (r *repeating) Write(b []byte) (int, error) {
	const at = headerLen + messageHeader + 2 + randomLen + 1
	if len(r.b) >= at+maxSession && len(b) >= at+maxSession {
		said := bytes.Clone(r.b)
		copy(said[at:], b[at:at+maxSession])
		r.r, r.b = bytes.NewReader(said), nil
	}
	return len(b), nil
}

// FuzzRecords has a peer that has the keys send anything: each piece is a type, and what the record
// has.
func FuzzRecords(f *testing.F) {
	f.Add([]byte{recordData, 0, 5, 'h', 'e', 'l', 'l', 'o', recordAlert, 0, 2, 1, 0})
	f.Add([]byte{recordHandshake, 0, 5, typeKeyUpdate, 0, 0, 1, 1, recordData, 0, 1, 'x'})
	f.Add([]byte{recordHandshake, 0, 6, typeNewSessionTicket, 0, 0, 2, 1, 2, recordHandshake, 0, 1, typeKeyUpdate})
	f.Fuzz(func(t *testing.T, b []byte) {
		secret := bytes.Repeat([]byte{7}, 32)
		var o output
		o.set(suites[0], bytes.Clone(secret))
		o.take(0)
		s := cryptobyte.String(b)
		for !s.Empty() {
			var typ uint8
			var data cryptobyte.String
			if !s.ReadUint8(&typ) || !s.ReadUint16LengthPrefixed(&data) {
				break
			}
			putRecord(&o, o.seal(typ, append(make([]byte, headerLen), data...)))
			if typ == recordHandshake && len(data) == 5 && data[0] == typeKeyUpdate {
				o.update()
			}
		}
		c := Client(&replay{bytes.NewReader(o.buf.b)}, clientConfig())
		c.suite = suites[0]
		c.shook.Store(true)
		c.in.set(suites[0], bytes.Clone(secret))
		c.out.set(suites[0], bytes.Clone(secret))
		if _, err := io.ReadAll(c); err != nil && !told(err) {
			t.Errorf("got %v", err)
		}
		if len(c.in.hand) > maxMessage+maxPlain {
			t.Errorf("%d bytes are kept", len(c.in.hand))
		}
	})
}
