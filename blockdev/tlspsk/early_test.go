package tlspsk

import (
	"bytes"
	"crypto"
	"testing"
)

// earlyHello makes a ClientHello of h that announces early data.
func earlyHello(t *testing.T, s *shake, h *clientHello) []byte {
	t.Helper()
	raw := withExtensions(t, h.marshal(), clientFixed, before(extPreSharedKey, ext{extEarlyData, nil}))
	copy(raw[len(raw)-32:], s.keys.binder(labelBinder, s.t.sum(raw[:len(raw)-2-1-32])))
	return raw
}

// earlyRecords are n bytes of early data in records of that size, under a key that no server has
// any use for.
func earlyRecords(n, size int) (b []byte) {
	var h half
	h.set(suites[0], random(32))
	for ; n > 0; n -= size {
		b = append(b, h.seal(recordData, make([]byte, headerLen+min(n, size)))...)
	}
	return b
}

// earlyClient begins a handshake by a ClientHello that announces early data, with that behind it.
// It returns what the server comes to.
func earlyClient(t *testing.T, retry bool, early []byte) (s *shake, server *Conn, end func() error) {
	t.Helper()
	a, b := sockets(t)
	server = Server(b, serverConfig())
	if retry {
		server.groups = groups[1:]
	}
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	s = &shake{c: Client(a, clientConfig()), t: transcript{hash: crypto.SHA256}}
	s.keys = newSchedule(crypto.SHA256, testKey)
	h, key, err := s.greeting()
	if err != nil {
		t.Fatal(err)
	}
	s.send(earlyHello(t, s, h))
	putRecord(&s.c.out, early)
	return s, server, func() error {
		_ = s.flush()
		answer, err := s.serverHello(h)
		if err == nil && answer.retry() {
			if key, err = s.share(h, groups[1]); err == nil {
				s.hello(h)
				_ = s.flush()
				answer, err = s.serverHello(h)
			}
		}
		if err == nil {
			err = s.agree(h, answer, key)
		}
		if err == nil {
			err = s.finishClient()
		}
		if err != nil {
			s.c.nc.Close()
			return <-done
		}
		s.c.shook.Store(true)
		return <-done
	}
}

// TestEarlyData has clients that send data before they know whether the server takes any: it takes
// none, and goes on behind it.
func TestEarlyData(t *testing.T) {
	for _, retry := range []bool{false, true} {
		s, server, end := earlyClient(t, retry, earlyRecords(40_000, 10_000))
		if err := end(); err != nil {
			t.Fatalf("retry %v: %v", retry, err)
		}
		pass(t, s.c, server, []byte("hello"))
		pass(t, server, s.c, []byte("hello"))
		if server.in.early != 0 {
			t.Errorf("retry %v: %d more bytes would be passed over", retry, server.in.early)
		}
	}
}

// TestTooMuchEarlyData has one that sends more of it than any server takes, or nothing in many
// records.
func TestTooMuchEarlyData(t *testing.T) {
	nothing := bytes.Repeat(record(recordData, nil), maxEarly/headerLen+1)
	for name, early := range map[string][]byte{"much": earlyRecords(maxEarly+1, 1<<14), "nothing": nothing} {
		for _, retry := range []bool{false, true} {
			_, _, end := earlyClient(t, retry, early)
			want := BadRecordMAC
			if retry { // there are no keys yet
				want = UnexpectedMessage
			}
			if err := end(); !isLocal(err, want) {
				t.Errorf("%s, retry %v: got %v, want %v", name, retry, err, want)
			}
		}
	}
}
