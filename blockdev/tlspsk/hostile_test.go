package tlspsk

import (
	"bytes"
	"crypto"
	"errors"
	"slices"
	"testing"

	"golang.org/x/crypto/cryptobyte"
)

// ext is an extension as it is sent.
type ext struct {
	typ  uint16
	data []byte
}

// withExtensions makes a hello with other extensions. fixed is how many bytes come before them,
// without the message's header.
func withExtensions(t testing.TB, raw []byte, fixed int, change func(l []ext) []ext) []byte {
	t.Helper()
	s := cryptobyte.String(raw[messageHeader+fixed:])
	var l []ext
	if err := extensions(&s, func(typ uint16, data cryptobyte.String, _ bool) error {
		l = append(l, ext{typ, data})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return message(raw[0], func(b *cryptobyte.Builder) {
		b.AddBytes(raw[messageHeader : messageHeader+fixed])
		prefixed16(b, func(b *cryptobyte.Builder) {
			for _, x := range change(l) {
				extension(b, x.typ, func(b *cryptobyte.Builder) { b.AddBytes(x.data) })
			}
		})
	})
}

// Lengths of what comes before the extensions of our hellos, in bytes.
const (
	clientFixed = 2 + randomLen + 1 + maxSession + 2 + 4 + 2
	serverFixed = 2 + randomLen + 1 + maxSession + 2 + 1
)

func without(typ uint16) func(l []ext) []ext {
	return func(l []ext) []ext { return slices.DeleteFunc(l, func(x ext) bool { return x.typ == typ }) }
}

func record(typ byte, b []byte) []byte {
	rec := append(make([]byte, headerLen), b...)
	putHeader(rec, typ, len(b))
	return rec
}

// greetings are what a server may get first: by a change of the hello before it is made, of the
// message, or of all bytes.
var greetings = []struct {
	name    string
	before  func(h *clientHello)
	message func(t testing.TB, raw []byte) []byte
	bytes   func(rec []byte) []byte
	want    Alert
}{
	{name: "TLS 1.2", message: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, clientFixed, without(extSupportedVersions))
	}, want: ProtocolVersion},
	{name: "other version", before: func(h *clientHello) { h.versions = []uint16{version12, 0x0305} }, want: ProtocolVersion},
	{name: "without Diffie-Hellman", before: func(h *clientHello) { h.modes = []byte{0} }, want: HandshakeFailure},
	{name: "no modes", message: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, clientFixed, without(extPSKModes))
	}, want: MissingExtension},
	{name: "no groups", message: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, clientFixed, without(extSupportedGroups))
	}, want: MissingExtension},
	{name: "no shares", message: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, clientFixed, without(extKeyShare))
	}, want: MissingExtension},
	{name: "no key", message: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, clientFixed, without(extPreSharedKey))
	}, want: HandshakeFailure},
	{name: "share of no group", before: func(h *clientHello) { h.groups = groupIDs()[1:] }, want: IllegalParameter},
	{name: "share twice", before: func(h *clientHello) { h.shares = append(h.shares, h.shares[0]) }, want: IllegalParameter},
	{name: "share is zero", before: func(h *clientHello) { h.shares[0].key = make([]byte, 32) }, want: IllegalParameter},
	{name: "share is short", before: func(h *clientHello) { h.shares[0].key = h.shares[0].key[1:] }, want: IllegalParameter},
	{name: "point not on the curve", before: func(h *clientHello) {
		h.shares[0] = share{groups[1].id, append([]byte{4}, make([]byte, 64)...)}
	}, want: IllegalParameter},
	{name: "compression", message: func(_ testing.TB, raw []byte) []byte {
		raw[messageHeader+clientFixed-1] = 1
		return raw
	}, want: IllegalParameter},
	{name: "extension twice", message: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, clientFixed, func(l []ext) []ext { return append([]ext{l[0]}, l...) })
	}, want: IllegalParameter},
	{name: "key not last", message: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, clientFixed, func(l []ext) []ext { return append(l, ext{1000, nil}) })
	}, want: IllegalParameter},
	{name: "binder wrong", message: func(_ testing.TB, raw []byte) []byte {
		raw[len(raw)-1] ^= 1
		return raw
	}, want: DecryptError},
	{name: "hello changed", message: func(_ testing.TB, raw []byte) []byte {
		raw[messageHeader+2] ^= 1
		return raw
	}, want: DecryptError},
	{name: "suites of others", before: func(h *clientHello) { h.suites = []uint16{0x1302, 0x1304} }, want: HandshakeFailure},
	{name: "something more", message: func(_ testing.TB, raw []byte) []byte {
		raw = append(raw, 0)
		raw[3]++
		return raw
	}, want: DecodeError},
	{name: "end missing", message: func(_ testing.TB, raw []byte) []byte {
		raw[3]--
		return raw[:len(raw)-1]
	}, want: DecodeError},
	{name: "nothing", message: func(testing.TB, []byte) []byte { return []byte{typeClientHello, 0, 0, 0} }, want: DecodeError},
	{name: "long message", message: func(testing.TB, []byte) []byte { return []byte{typeClientHello, 1, 0, 0} }, want: DecodeError},
	{name: "two messages", message: func(_ testing.TB, raw []byte) []byte { return append(raw, 1, 0, 0, 0) }, want: UnexpectedMessage},
	{name: "other message", message: func(_ testing.TB, raw []byte) []byte {
		raw[0] = typeFinished
		return raw
	}, want: UnexpectedMessage},
	{name: "no TLS", bytes: func([]byte) []byte { return []byte("NBDMAGICIHAVEOPT") }, want: UnexpectedMessage},
	{name: "long record", bytes: func([]byte) []byte { return []byte{recordHandshake, 3, 3, 0x40, 1} }, want: RecordOverflow},
	{name: "empty record", bytes: func([]byte) []byte { return record(recordHandshake, nil) }, want: UnexpectedMessage},
	{name: "data", bytes: func([]byte) []byte { return record(recordData, []byte("x")) }, want: UnexpectedMessage},
	{name: "ChangeCipherSpec first", bytes: func([]byte) []byte { return record(recordChangeCipherSpec, []byte{1}) },
		want: UnexpectedMessage},
	{name: "interrupted", bytes: func(rec []byte) []byte {
		return append(record(recordHandshake, rec[headerLen:50]), record(recordAlert, []byte{2, 80})...)
	}, want: UnexpectedMessage},
	{name: "ChangeCipherSpec inside", bytes: func(rec []byte) []byte {
		l := append(record(recordHandshake, rec[headerLen:50]), record(recordChangeCipherSpec, []byte{1})...)
		return append(l, record(recordHandshake, rec[50:])...)
	}, want: UnexpectedMessage},
	{name: "byte by byte", bytes: func(rec []byte) (l []byte) {
		for _, b := range rec[headerLen:] {
			l = append(l, record(recordHandshake, []byte{b})...)
		}
		return l
	}, want: UnexpectedMessage},
}

func groupIDs() (l []uint16) {
	for _, g := range groups {
		l = append(l, g.id)
	}
	return l
}

// greetingOf makes what a greeting changes of ours.
func greetingOf(t testing.TB, i int) []byte {
	t.Helper()
	g := greetings[i]
	s := &shake{c: Client(nil, clientConfig()), t: transcript{hash: crypto.SHA256}}
	s.keys = newSchedule(crypto.SHA256, testKey)
	h, _, err := s.greeting()
	if err != nil {
		t.Fatal(err)
	}
	if g.before != nil {
		g.before(h)
	}
	s.hello(h)
	raw := bytes.Clone(s.t.b)
	if g.message != nil {
		raw = g.message(t, raw)
	}
	rec := record(recordHandshake, raw)
	if g.bytes != nil {
		rec = g.bytes(rec)
	}
	return rec
}

// TestGreetings has clients that a server must turn away, and how.
func TestGreetings(t *testing.T) {
	for i, g := range greetings {
		t.Run(g.name, func(t *testing.T) {
			a, b := sockets(t)
			if _, err := a.Write(greetingOf(t, i)); err != nil {
				t.Fatal(err)
			}
			if err := Server(b, serverConfig()).Handshake(); !isLocal(err, g.want) {
				t.Errorf("the server gets %v, want %v", err, g.want)
			}
			client := Client(a, clientConfig()) // to read with
			_, _, err := client.messageLocked()
			if err != RemoteError(g.want) {
				t.Errorf("the client is told %v, want %v", err, g.want)
			}
		})
	}
}

// answers are what a client may get.
var answers = []struct {
	name  string
	hello func(h *serverHello)                        // changes the ServerHello
	raw   func(t testing.TB, raw []byte) []byte       // changes it as it is sent
	rest  func(s *shake, server []byte) (more []byte) // what follows in the clear, or in s
	want  Alert
}{
	{name: "TLS 1.2", raw: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, serverFixed, without(extSupportedVersions))
	}, want: ProtocolVersion},
	{name: "other version", hello: func(h *serverHello) { h.version = version12 }, want: IllegalParameter},
	{name: "session of others", hello: func(h *serverHello) { h.session = random(maxSession) }, want: IllegalParameter},
	{name: "suite of others", hello: func(h *serverHello) { h.suite = 0x1302 }, want: IllegalParameter},
	{name: "no key", hello: func(h *serverHello) { h.hasKey = false }, want: HandshakeFailure},
	{name: "another key", hello: func(h *serverHello) { h.identity = 1 }, want: IllegalParameter},
	{name: "share of another group", hello: func(h *serverHello) { h.share.group = groups[1].id }, want: IllegalParameter},
	{name: "share is zero", hello: func(h *serverHello) { h.share.key = make([]byte, 32) }, want: IllegalParameter},
	{name: "extension of others", raw: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, serverFixed, func(l []ext) []ext { return append(l, ext{16, nil}) })
	}, want: UnsupportedExtension},
	{name: "compression", raw: func(_ testing.TB, raw []byte) []byte {
		raw[messageHeader+serverFixed-1] = 1
		return raw
	}, want: IllegalParameter},
	{name: "retry in vain", hello: func(h *serverHello) { h.random = retryRandom }, want: IllegalParameter},
	{name: "retry with unknown group", hello: func(h *serverHello) { h.random, h.share.group = retryRandom, 0x18 },
		want: IllegalParameter},
	{name: "retry twice", hello: func(h *serverHello) { h.random, h.share.group = retryRandom, groups[1].id },
		rest: func(s *shake, _ []byte) []byte { return record(recordHandshake, s.t.b[4+32:]) }, want: UnexpectedMessage},
	{name: "retry with no group", hello: func(h *serverHello) { h.random, h.share.group = retryRandom, 0 }, want: DecodeError},
	{name: "long cookie", hello: func(h *serverHello) { h.random = retryRandom }, raw: func(t testing.TB, raw []byte) []byte {
		return withExtensions(t, raw, serverFixed, func(l []ext) []ext {
			c := append([]byte{0x40, 1}, make([]byte, maxCookie+1)...)
			return append(without(extKeyShare)(l), ext{extCookie, c})
		})
	}, want: IllegalParameter},
	{name: "two messages", raw: func(_ testing.TB, raw []byte) []byte { return append(raw, encryptedExtensions()...) },
		want: UnexpectedMessage},
	{name: "other message", raw: func(testing.TB, []byte) []byte { return encryptedExtensions() }, want: UnexpectedMessage},
	{name: "rest in the clear", rest: func(*shake, []byte) []byte { return record(recordHandshake, encryptedExtensions()) },
		want: UnexpectedMessage},
	{name: "ChangeCipherSpecs", rest: func(*shake, []byte) []byte {
		return bytes.Repeat(record(recordChangeCipherSpec, []byte{1}), maxUseless+1)
	}, want: UnexpectedMessage},
	{name: "other ChangeCipherSpec", rest: func(*shake, []byte) []byte { return record(recordChangeCipherSpec, []byte{2}) },
		want: UnexpectedMessage},
	{name: "answer to what was not asked", rest: func(s *shake, _ []byte) []byte {
		s.send([]byte{typeEncryptedExtensions, 0, 0, 6, 0, 4, 0, 0, 0, 0})
		return nil
	}, want: UnsupportedExtension},
	{name: "ChangeCipherSpec inside", rest: func(s *shake, _ []byte) []byte {
		half := encryptedExtensions()
		s.c.out.add(recordHandshake, half[:2])
		s.changeCipherSpec()
		s.c.out.add(recordHandshake, half[2:])
		return nil
	}, want: UnexpectedMessage},
	{name: "own hello", raw: func(_ testing.TB, raw []byte) []byte {
		raw[0] = typeClientHello
		return raw
	}, want: UnexpectedMessage},
	{name: "certificate", rest: func(s *shake, _ []byte) []byte {
		s.send(encryptedExtensions())
		s.send([]byte{11, 0, 0, 0})
		return nil
	}, want: UnexpectedMessage},
	{name: "wrong proof", rest: func(s *shake, server []byte) []byte {
		s.send(encryptedExtensions())
		s.send(finishedMessage(finished(crypto.SHA256, server, nil)))
		return nil
	}, want: DecryptError},
	{name: "short proof", rest: func(s *shake, server []byte) []byte {
		s.send(encryptedExtensions())
		s.send(finishedMessage(finished(crypto.SHA256, server, s.t.sum())[:31]))
		return nil
	}, want: DecryptError},
	{name: "goes on under the old key", rest: func(s *shake, server []byte) []byte {
		s.send(encryptedExtensions())
		s.send(append(finishedMessage(finished(crypto.SHA256, server, s.t.sum())), typeNewSessionTicket, 0, 0, 0))
		return nil
	}, want: UnexpectedMessage},
}

// TestAnswers has servers that a client must leave, and how.
func TestAnswers(t *testing.T) {
	for i, x := range answers {
		t.Run(x.name, func(t *testing.T) {
			a, b := sockets(t)
			client, server := Client(a, clientConfig()), Server(b, serverConfig())
			done := make(chan error, 1)
			go func() { done <- client.Handshake() }()
			if err := answerWith(t, server, i); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !isLocal(err, x.want) {
				t.Errorf("the client gets %v, want %v", err, x.want)
			}
		})
	}
}

// answerWith gives an answer to a client.
func answerWith(t testing.TB, server *Conn, i int) error {
	x := answers[i]
	s := &shake{c: server, t: transcript{hash: crypto.SHA256}}
	raw, hello, err := s.clientHello()
	if err != nil {
		return err
	}
	if _, err := s.bound(raw, hello); err != nil {
		return err
	}
	g, theirs, err := s.pickGroup(hello)
	if err != nil {
		return err
	}
	key, err := g.curve.GenerateKey(nil)
	if err != nil {
		return err
	}
	s.t.add(raw)
	s.choose(suites[0].id, g.id)
	if err := s.exchange(key, theirs); err != nil {
		return err
	}
	h := &serverHello{random: random(randomLen), session: hello.session, suite: s.suite.id, version: version13,
		share: share{g.id, key.PublicKey().Bytes()}, hasKey: true}
	if x.hello != nil {
		x.hello(h)
	}
	if h.retry() {
		h.hasKey = false
		s.t.retry()
	}
	raw = h.marshal()
	if x.raw != nil {
		raw = x.raw(t, raw)
	}
	s.send(raw)
	secret := s.derive(labelServerHandshake)
	if x.rest != nil {
		s.use(&server.out.half, secret)
		if more := x.rest(s, secret); more != nil {
			server.out.buf.b = append(server.out.buf.b, more...)
		}
	}
	return s.flush()
}

// TestPadding has a peer that hides how much it sends, and says that it is canceled.
func TestPadding(t *testing.T) {
	client, server := connected(t, clientConfig(), serverConfig())
	rec := append(make([]byte, headerLen), "hello"...)
	rec = append(append(rec, recordData), make([]byte, 1000)...)
	putRecord(&server.out, server.out.seal(0, rec))
	server.out.add(recordAlert, []byte{1, byte(UserCanceled)})
	server.out.add(recordAlert, []byte{2, byte(InternalError)})
	if err := server.flushLocked(); err != nil {
		t.Fatal(err)
	}
	server.out.drop()
	b := make([]byte, 100)
	if n, err := client.Read(b); string(b[:n]) != "hello" || err != nil {
		t.Errorf("got %q, %v", b[:n], err)
	}
	var r RemoteError
	if _, err := client.Read(b); !errors.As(err, &r) || Alert(r) != InternalError {
		t.Errorf("got %v", err)
	}
}

// TestCookie has a server that wants a cookie back, and the same share.
func TestCookie(t *testing.T) {
	a, b := sockets(t)
	client, server := Client(a, clientConfig()), Server(b, serverConfig())
	done := make(chan error, 1)
	go func() { done <- client.Handshake() }()
	s := &shake{c: server, t: transcript{hash: crypto.SHA256}}
	raw, first, err := s.clientHello()
	if err != nil {
		t.Fatal(err)
	}
	s.t.add(raw)
	s.t.retry()
	h := &serverHello{random: retryRandom, session: first.session, suite: suites[0].id, version: version13}
	s.send(withExtensions(t, h.marshal(), serverFixed, func(l []ext) []ext {
		return append(without(extKeyShare)(l), ext{extCookie, []byte{0, 3, 'a', 'b', 'c'}})
	}))
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	server.in.seenHello = true
	raw, second, err := s.clientHello()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(second.shares[0].key, first.shares[0].key) {
		t.Error("the client has another share")
	}
	if !bytes.Contains(raw, []byte{0, extCookie, 0, 5, 0, 3, 'a', 'b', 'c'}) {
		t.Error("the client has eaten the cookie")
	}
	at, err := s.bound(raw, second)
	if err != nil {
		t.Fatal(err)
	}
	s.t.add(raw)
	s.choose(suites[0].id, groups[0].id)
	key, err := groups[0].curve.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.answer(second, at, key, second.shares[0].key); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
