package tlspsk

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"testing"
)

// second is a client that has sent a ClientHello with a share that the server does not take, and
// has been asked for another.
type second struct {
	*shake
	server *Conn
	hello  *clientHello
	key    *ecdh.PrivateKey
	asked  *serverHello
	first  []byte // the first ClientHello
	done   chan error
}

// askedAgain has a server ask for a share of P-256. before changes the first ClientHello.
func askedAgain(t *testing.T, before func(h *clientHello)) *second {
	t.Helper()
	a, b := sockets(t)
	x := &second{server: Server(b, serverConfig()), done: make(chan error, 1)}
	x.server.groups = groups[1:]
	go func() { x.done <- x.server.Handshake() }()
	x.shake = &shake{c: Client(a, clientConfig()), t: transcript{hash: crypto.SHA256}}
	x.keys = newSchedule(crypto.SHA256, testKey)
	var err error
	if x.hello, x.key, err = x.greeting(); err != nil {
		t.Fatal(err)
	}
	if before != nil {
		before(x.hello)
	}
	x.shake.hello(x.hello)
	x.first = bytes.Clone(x.t.b)
	if err := x.flush(); err != nil {
		t.Fatal(err)
	}
	if x.asked, err = x.serverHello(x.hello); err != nil || !x.asked.retry() {
		t.Fatal("the server does not ask again", err)
	}
	if x.key, err = x.share(x.hello, groups[1]); err != nil {
		t.Fatal(err)
	}
	return x
}

// again is the second ClientHello, with all that change does to it before its binder is made.
func (x *second) again(t *testing.T, change func(l []ext) []ext) []byte {
	t.Helper()
	raw := x.hello.marshal()
	if change != nil {
		raw = withExtensions(t, raw, clientFixed, change)
	}
	const size = 32
	copy(raw[len(raw)-size:], x.keys.binder(labelBinder, x.t.sum(raw[:len(raw)-2-1-size])))
	return raw
}

func before(typ uint16, x ext) func(l []ext) []ext {
	return func(l []ext) (r []ext) {
		for _, y := range l {
			if y.typ == typ {
				r = append(r, x)
			}
			r = append(r, y)
		}
		return r
	}
}

// seconds are what a server may get when it has asked for another share.
var seconds = []struct {
	name string
	make func(t *testing.T, x *second) []byte
	want Alert
}{
	{"the first", func(_ *testing.T, x *second) []byte { return x.first }, IllegalParameter},
	{"another random", func(t *testing.T, x *second) []byte {
		x.hello.random = random(randomLen)
		return x.again(t, nil)
	}, IllegalParameter},
	{"another session", func(t *testing.T, x *second) []byte {
		x.hello.session = random(maxSession)
		return x.again(t, nil)
	}, IllegalParameter},
	{"other ciphers", func(t *testing.T, x *second) []byte {
		x.hello.suites[0], x.hello.suites[1] = x.hello.suites[1], x.hello.suites[0]
		return x.again(t, nil)
	}, IllegalParameter},
	{"other groups", func(t *testing.T, x *second) []byte {
		x.hello.groups = append(x.hello.groups, 0x18)
		return x.again(t, nil)
	}, IllegalParameter},
	{"other modes", func(t *testing.T, x *second) []byte {
		x.hello.modes = []byte{pskDHE, 0}
		return x.again(t, nil)
	}, IllegalParameter},
	{"two shares", func(t *testing.T, x *second) []byte {
		x.hello.shares = append(x.hello.shares, share{groups[0].id, make([]byte, 32)})
		return x.again(t, nil)
	}, IllegalParameter},
	{"no share", func(t *testing.T, x *second) []byte {
		x.hello.shares = nil
		return x.again(t, nil)
	}, IllegalParameter},
	{"early data", func(t *testing.T, x *second) []byte {
		return x.again(t, before(extPreSharedKey, ext{extEarlyData, nil}))
	}, IllegalParameter},
	{"something more", func(t *testing.T, x *second) []byte {
		return x.again(t, before(extPreSharedKey, ext{1000, nil}))
	}, IllegalParameter},
	{"another name", func(t *testing.T, x *second) []byte {
		x.hello.identities[0].name = []byte("nobody")
		return x.again(t, nil)
	}, DecryptError},
	{"a binder that forgets the first", func(t *testing.T, x *second) []byte {
		x.t.b = nil
		return x.again(t, nil)
	}, DecryptError},
	{"a binder over all of the first", func(t *testing.T, x *second) []byte {
		retry := x.t.b[messageHeader+32:]
		x.t.b = append(bytes.Clone(x.first), retry...)
		return x.again(t, nil)
	}, DecryptError},
	{"a share is no point", func(t *testing.T, x *second) []byte {
		x.hello.shares[0].key = append([]byte{4}, make([]byte, 64)...)
		return x.again(t, nil)
	}, IllegalParameter},
	{"no TLS 1.3 any more", func(t *testing.T, x *second) []byte {
		return x.again(t, without(extSupportedVersions))
	}, ProtocolVersion},
	{"another message", func(*testing.T, *second) []byte { return encryptedExtensions() }, UnexpectedMessage},
}

// TestSecondGreetings has clients that a server must turn away when it has asked for another share.
func TestSecondGreetings(t *testing.T) {
	for _, g := range seconds {
		t.Run(g.name, func(t *testing.T) {
			x := askedAgain(t, nil)
			x.send(g.make(t, x))
			if err := x.flush(); err != nil {
				t.Fatal(err)
			}
			if err := <-x.done; !isLocal(err, g.want) || x.server.Peer() != "" {
				t.Errorf("the server gets %v, want %v; it knows %q", err, g.want, x.server.Peer())
			}
			if _, _, err := x.c.messageLocked(); err != RemoteError(g.want) {
				t.Errorf("the client is told %v, want %v", err, g.want)
			}
		})
	}
}

// finish does the rest of the handshake of a client, and returns the connection.
func (x *second) finish(t *testing.T) *Conn {
	t.Helper()
	x.changeCipherSpec()
	x.send(x.again(t, nil))
	if err := x.flush(); err != nil {
		t.Fatal(err)
	}
	answer, err := x.serverHello(x.hello)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.agree(x.hello, answer, x.key); err != nil {
		t.Fatal(err)
	}
	if err := x.finishClient(); err != nil {
		t.Fatal(err)
	}
	x.c.shook.Store(true)
	if err := <-x.done; err != nil {
		t.Fatal(err)
	}
	return x.c
}

// TestSecondChance does what seconds do not: the connection comes about.
func TestSecondChance(t *testing.T) {
	x := askedAgain(t, func(h *clientHello) { h.shares = nil })
	client := x.finish(t)
	pass(t, client, x.server, random(100))
	pass(t, x.server, client, random(100))
	if x.server.Peer() != "qemu" {
		t.Errorf("the server knows %q", x.server.Peer())
	}
}

// TestManyKeys has clients that name more than one key: the first that the server has is the one
// that counts.
func TestManyKeys(t *testing.T) {
	zeroes := make([]byte, 32)
	for _, c := range []struct {
		name  string
		names []string
		at    int
		ok    bool
	}{
		{"the second is known", []string{"nobody", "qemu"}, 1, true},
		{"the last that is looked for", append(make([]string, maxLookups-1), "qemu"), maxLookups - 1, true},
		{"one more", append(make([]string, maxLookups), "qemu"), maxLookups, false},
		{"another is bound", []string{"qemu", "nobody"}, 1, false},
	} {
		a, b := sockets(t)
		server := Server(b, serverConfig())
		done := make(chan error, 1)
		go func() { done <- server.Handshake() }()
		s := &shake{c: Client(a, clientConfig()), t: transcript{hash: crypto.SHA256}}
		s.keys = newSchedule(crypto.SHA256, testKey)
		h, key, err := s.greeting()
		if err != nil {
			t.Fatal(err)
		}
		h.identities = nil
		for i, n := range c.names {
			if n == "" {
				n = "nobody" + string(rune('a'+i))
			}
			h.identities = append(h.identities, identity{[]byte(n), zeroes})
		}
		raw := h.marshal()
		list := len(c.names) * 33
		at := len(raw) - list + c.at*33 + 1
		copy(raw[at:at+32], s.keys.binder(labelBinder, s.t.sum(raw[:len(raw)-list-2])))
		s.send(raw)
		if err := s.flush(); err != nil {
			t.Fatal(err)
		}
		answer, err := s.serverHello(h)
		if err == nil && int(answer.identity) != c.at {
			t.Errorf("%s: the server takes key %d", c.name, answer.identity)
		}
		if err == nil {
			err = s.agree(h, answer, key)
		}
		if err == nil {
			err = s.finishClient()
		}
		if serr := <-done; (err == nil) != c.ok || (serr == nil) != c.ok {
			t.Errorf("%s: got %v, the server %v", c.name, err, serr)
		}
	}
}
