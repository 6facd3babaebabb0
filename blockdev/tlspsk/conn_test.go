package tlspsk

import (
	"bytes"
	"crypto"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var testKey = []byte("sixteen bytes...")

// lookup is a server that knows one key.
func lookup(id string) ([]byte, bool) {
	if id != "qemu" {
		return nil, false
	}
	return bytes.Clone(testKey), true
}

func clientConfig() Config { return Config{Identity: "qemu", Key: testKey} }
func serverConfig() Config { return Config{Lookup: lookup} }

// sockets are the two ends of a connection that buffers.
func sockets(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{a, b} {
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		t.Cleanup(func() { c.Close() })
	}
	return a, b
}

// both runs both handshakes.
func both(a, b *Conn) (errA, errB error) {
	var wg sync.WaitGroup
	wg.Go(func() { errB = b.Handshake() })
	errA = a.Handshake()
	wg.Wait()
	return errA, errB
}

// connected is a connection after the handshake.
func connected(t testing.TB, cc, sc Config) (client, server *Conn) {
	t.Helper()
	a, b := sockets(t)
	client, server = Client(a, cc), Server(b, sc)
	if errA, errB := both(client, server); errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	return client, server
}

// pass writes b at one end and reads it at the other.
func pass(t testing.TB, from, to *Conn, b []byte) {
	t.Helper()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if n, err := from.Write(b); err != nil || n != len(b) {
			t.Errorf("wrote %d of %d bytes: %v", n, len(b), err)
		}
	})
	got := make([]byte, len(b))
	if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("%d bytes did not come as they were sent: %v", len(b), err)
	}
}

func TestTalk(t *testing.T) {
	for _, h := range []crypto.Hash{0, crypto.SHA256, crypto.SHA384} {
		for _, x := range suites {
			hash := (&Config{Hash: h}).hash()
			if x.hash != hash {
				continue
			}
			t.Run(x.name, func(t *testing.T) {
				cc, sc := clientConfig(), serverConfig()
				cc.Hash, sc.Hash = h, h
				a, b := sockets(t)
				client, server := Client(a, cc), Server(b, sc)
				client.suites = []*suite{x}
				if errA, errB := both(client, server); errA != nil || errB != nil {
					t.Fatal(errA, errB)
				}
				if server.Peer() != "qemu" || client.Peer() != "" || client.Suite() != x.name || server.Suite() != x.name {
					t.Errorf("the server knows %q, suites are %s and %s", server.Peer(), client.Suite(), server.Suite())
				}
				for _, n := range []int{1, 2, maxPlain - 1, maxPlain, maxPlain + 1, batch * maxPlain, 3 << 20} {
					b := random(n)
					pass(t, client, server, b)
					pass(t, server, client, b)
				}
			})
		}
	}
	if testKey[0] != 's' {
		t.Error("the handshake has changed the key")
	}
}

func TestBadConfig(t *testing.T) {
	a, b := sockets(t)
	for _, c := range []struct {
		conn *Conn
		want error
	}{
		{Client(a, Config{Identity: "x", Key: testKey, Hash: crypto.MD5}), errHash},
		{Client(a, Config{Key: testKey}), errIdentity},
		{Client(a, Config{Identity: strings.Repeat("x", maxIdentity+1), Key: testKey}), errIdentity},
		{Client(a, Config{Identity: "x"}), errKey},
		{Server(b, Config{}), errLookup},
	} {
		if err := c.conn.Handshake(); err != c.want {
			t.Errorf("got %v, want %v", err, c.want)
		}
		if _, err := c.conn.Read(make([]byte, 1)); err != c.want {
			t.Errorf("Read returns %v, want %v", err, c.want)
		}
	}
}

// TestWrongKey has a client whose key is not the server's: it is told the same whether the server
// knows the name or not.
func TestWrongKey(t *testing.T) {
	for _, cc := range []Config{{Identity: "qemu", Key: []byte("another")}, {Identity: "nobody", Key: testKey}} {
		a, b := sockets(t)
		client, server := Client(a, cc), Server(b, serverConfig())
		errA, errB := both(client, server)
		if errA != RemoteError(DecryptError) {
			t.Errorf("%s: the client gets %v", cc.Identity, errA)
		}
		var l *LocalError
		if !errors.As(errB, &l) || l.Alert != DecryptError || server.Peer() != "" {
			t.Errorf("%s: the server gets %v, and knows %q", cc.Identity, errB, server.Peer())
		}
		if again := client.Handshake(); again != errA {
			t.Errorf("the second attempt gives %v", again)
		}
		if _, err := client.Write([]byte("secret")); err != errA {
			t.Errorf("a write gives %v", err)
		}
	}
}

// TestHashes has ends whose keys are for different hashes.
func TestHashes(t *testing.T) {
	a, b := sockets(t)
	cc := clientConfig()
	cc.Hash = crypto.SHA384
	if errA, errB := both(Client(a, cc), Server(b, serverConfig())); errA != RemoteError(HandshakeFailure) || errB == nil {
		t.Errorf("got %v and %v", errA, errB)
	}
}

// TestRetry has a server that does not take the first group.
func TestRetry(t *testing.T) {
	a, b := sockets(t)
	client, server := Client(a, clientConfig()), Server(b, serverConfig())
	server.groups = groups[1:]
	if errA, errB := both(client, server); errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	if client.group != groups[1].id || server.Peer() != "qemu" {
		t.Errorf("the client has group %x, the server knows %q", client.group, server.Peer())
	}
	pass(t, client, server, random(100))
	pass(t, server, client, random(100))
	// And one that has none in common.
	a, b = sockets(t)
	client, server = Client(a, clientConfig()), Server(b, serverConfig())
	client.groups, server.groups = groups[:1], groups[1:]
	if errA, errB := both(client, server); errA != RemoteError(HandshakeFailure) || !isLocal(errB, HandshakeFailure) {
		t.Error(errA, errB)
	}
}

func TestKeyUpdate(t *testing.T) {
	client, server := connected(t, clientConfig(), serverConfig())
	client.maxRecords, server.maxRecords = 3, 5
	secrets := func() [][]byte {
		return [][]byte{bytes.Clone(client.out.secret), bytes.Clone(client.in.secret)}
	}
	before := secrets()
	for i := range 100 {
		pass(t, client, server, random(i+1))
		pass(t, server, client, random(2*maxPlain))
	}
	after := secrets()
	if bytes.Equal(before[0], after[0]) || bytes.Equal(before[1], after[1]) {
		t.Error("a key was not replaced")
	}
	if client.out.seq > 4 || server.out.seq > 7 {
		t.Errorf("keys have been used for %d and %d records", client.out.seq, server.out.seq)
	}
	// One that only reads asks for another key with the next that it writes, and gets it.
	client.maxRecords, server.maxRecords = 1<<20, 1<<20
	pass(t, client, server, random(10))
	pass(t, server, client, random(10))
	client.maxRecords = 1
	pass(t, server, client, random(10))
	pass(t, server, client, random(10))
	old := bytes.Clone(server.out.secret)
	pass(t, client, server, random(10))
	pass(t, server, client, random(10))
	if bytes.Equal(old, server.out.secret) {
		t.Error("the server was not asked for another key")
	}
}

// TestTickets has a client that gets tickets, whole and in pieces, which it has no use for.
func TestTickets(t *testing.T) {
	client, server := connected(t, clientConfig(), serverConfig())
	ticket := append([]byte{typeNewSessionTicket, 0, 0x80, 0}, random(0x8000)...)
	for range 3 {
		server.out.add(recordHandshake, ticket)
		server.out.add(recordHandshake, ticket[:messageHeader+0])
		server.out.add(recordHandshake, ticket[messageHeader:])
		if err := server.flushLocked(); err != nil {
			t.Fatal(err)
		}
		server.out.drop()
		pass(t, server, client, random(100))
	}
	// A server gets none.
	client.out.add(recordHandshake, ticket)
	if err := client.flushLocked(); err != nil {
		t.Fatal(err)
	}
	client.out.drop()
	if _, err := server.Read(make([]byte, 1)); !isLocal(err, UnexpectedMessage) {
		t.Errorf("got %v", err)
	}
	if _, err := client.Read(make([]byte, 1)); err != RemoteError(UnexpectedMessage) {
		t.Errorf("the client is told %v", err)
	}
}

func isLocal(err error, a Alert) bool {
	var l *LocalError
	return errors.As(err, &l) && l.Alert == a
}

func TestEnd(t *testing.T) {
	client, server := connected(t, clientConfig(), serverConfig())
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("x")); err != errOver {
		t.Errorf("a write after the end gives %v", err)
	}
	if n, err := server.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("Read returns %d, %v", n, err)
	}
	pass(t, server, client, random(1000)) // the other half goes on
	secret, key := client.in.secret, client.out.secret
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if !zero(secret) || !zero(key) || !zero(client.in.iv[:]) || client.out.aead != nil {
		t.Error("Close has left secrets")
	}
	if err := client.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the second Close gives %v", err)
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read gives %v", err)
	}
	// Who goes without a word is not taken for one that has sent everything.
	client, server = connected(t, clientConfig(), serverConfig())
	client.nc.Close()
	if _, err := server.Read(make([]byte, 1)); err != io.ErrUnexpectedEOF {
		t.Errorf("Read returns %v", err)
	}
}

func zero(b []byte) bool { return !slices.ContainsFunc(b, func(x byte) bool { return x != 0 }) }

// TestClose closes while others read, and write more than the peer takes.
func TestClose(t *testing.T) {
	client, _ := connected(t, clientConfig(), serverConfig())
	var wg sync.WaitGroup
	reading, writing := make(chan struct{}), make(chan struct{})
	wg.Go(func() {
		close(reading)
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read gives %v", err)
		}
	})
	wg.Go(func() {
		close(writing)
		if _, err := client.Write(make([]byte, 64<<20)); err == nil {
			t.Error("Write has written everything")
		}
	})
	<-reading
	<-writing
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	// A handshake that waits is ended too.
	a, _ := sockets(t)
	waiting := Client(a, clientConfig())
	wg.Go(func() {
		if err := waiting.Handshake(); err == nil {
			t.Error("the handshake succeeds")
		}
	})
	waiting.Close()
	wg.Wait()
}

func TestDeadline(t *testing.T) {
	a, _ := sockets(t)
	_ = a.SetDeadline(time.Now().Add(10 * time.Millisecond))
	if err := Client(a, clientConfig()).Handshake(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a peer that says nothing gives %v", err)
	}
	client, server := connected(t, clientConfig(), serverConfig())
	_ = client.SetReadDeadline(time.Unix(1, 0))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read gives %v", err)
	}
	_ = client.SetReadDeadline(time.Now().Add(time.Minute))
	pass(t, server, client, random(10))
}

// counted counts writes.
type counted struct {
	net.Conn
	writes int
}

func (c *counted) Write(b []byte) (int, error) {
	c.writes++
	return c.Conn.Write(b)
}

// TestWriteVec writes pieces of all sizes: they come in few records and writes.
func TestWriteVec(t *testing.T) {
	client, server := connected(t, clientConfig(), serverConfig())
	count := &counted{Conn: client.nc}
	client.nc = count
	rapid.Check(t, func(rt *rapid.T) {
		var v net.Buffers
		for range rapid.IntRange(0, 8).Draw(rt, "pieces") {
			v = append(v, random(rapid.OneOf(rapid.IntRange(0, 20), rapid.IntRange(0, 3*maxPlain),
				rapid.IntRange(0, 1<<20)).Draw(rt, "size")))
		}
		want := slices.Concat(v...)
		count.writes = 0
		seq := client.out.seq
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			if n, err := client.WriteVec(v); err != nil || n != int64(len(want)) {
				t.Errorf("wrote %d of %d: %v", n, len(want), err)
			}
		})
		got := make([]byte, len(want))
		if _, err := io.ReadFull(server, got); err != nil || !bytes.Equal(got, want) {
			rt.Fatalf("it did not come as it was sent: %v", err)
		}
		wg.Wait()
		records := (len(want) + maxPlain - 1) / maxPlain
		if client.out.seq-seq != uint64(records) || count.writes > (records+batch-1)/batch {
			rt.Fatalf("%d bytes went in %d records and %d writes", len(want), client.out.seq-seq, count.writes)
		}
	})
}
