package tlscreds

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/tlscreds/certs"
	"qblockd/schema/types"
)

// sockets are the two ends of a connection.
func sockets(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
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
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		t.Cleanup(func() { c.Close() })
	}
	return a, b
}

// objects are such by name.
type objects map[string]any

func (o objects) Object(id string) any { return o[id] }

// authorizer allows one name.
type authorizer string

func (a authorizer) Allows(name string) (bool, error) { return name == string(a), nil }

// shake has both ends do their part on sockets, and returns what came of it.
func shake(a, b net.Conn, s *Server, c *Client) (sc, cc *Conn, serr, cerr error) {
	var wg sync.WaitGroup
	wg.Go(func() {
		if sc, serr = s.Accept(b); serr != nil {
			b.Close()
		}
	})
	if cc, cerr = c.Connect(a); cerr != nil {
		a.Close()
	}
	wg.Wait()
	return sc, cc, serr, cerr
}

func newServer(t *testing.T, o objects, authz *string) *Server {
	t.Helper()
	s, err := NewServer(o, ptr("s"), authz)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newClient(t *testing.T, o objects, host string) *Client {
	t.Helper()
	c, err := NewClient(o, "c", host)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestPeers: who is let in, and whom one connects to.
func TestPeers(t *testing.T) {
	ca := certs.CA(t)
	serverDir := certs.Dir(t, ca, ca.Server(t), nil)
	clientDir := certs.Dir(t, ca, nil, ca.Client(t))
	client2 := func(changes ...certs.Change) string { return certs.Dir(t, ca, nil, ca.Client(t, changes...)) }
	server2 := func(changes ...certs.Change) string { return certs.Dir(t, ca, ca.Server(t, changes...), nil) }
	purpose := func(u x509.ExtKeyUsage) certs.Change {
		return func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{u} }
	}
	old := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	named := func(names ...string) certs.Change {
		return func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = names, nil }
	}
	gone := ca.Client(t)
	revoking := certs.Dir(t, ca, ca.Server(t), nil)
	certs.Write(t, revoking, "ca-crl.pem", ca.Revoke(t, gone))
	for name, c := range map[string]struct {
		server, client, host string
		serverErr, clientErr string // beginnings
	}{
		"sound":              {serverDir, clientDir, "localhost", "", ""},
		"by address":         {serverDir, clientDir, "127.0.0.1", "", ""},
		"another host":       {serverDir, clientDir, "example.com", "TLS handshake failed: ", "Certificate does not match the hostname example.com"},
		"no host":            {serverDir, clientDir, "", "TLS handshake failed: ", "No hostname for certificate validation"},
		"common name":        {server2(named()), clientDir, "localhost", "", ""},
		"common name hidden": {server2(named("a.example.com")), clientDir, "localhost", "TLS handshake failed: ", "Certificate does not match"},
		"server unknown": {certs.Dir(t, ca, certs.CA(t).Server(t), nil), clientDir, "localhost", "TLS handshake failed: ",
			"The certificate hasn't got a known issuer"},
		"server old":         {server2(old), clientDir, "localhost", "TLS handshake failed: ", "The certificate is not trusted"},
		"server's purpose":   {server2(purpose(x509.ExtKeyUsageClientAuth)), clientDir, "localhost", "TLS handshake failed: ", string(errPurpose)},
		"client without":     {serverDir, certs.Dir(t, ca, nil, nil), "localhost", "Verify failed: No certificate was found.", ""},
		"client unknown":     {serverDir, certs.Dir(t, ca, nil, certs.CA(t).Client(t)), "localhost", "The certificate hasn't got a known issuer", ""},
		"client old":         {serverDir, client2(old), "localhost", "The certificate is not trusted", ""},
		"client's purpose":   {serverDir, client2(purpose(x509.ExtKeyUsageServerAuth)), "localhost", string(errPurpose), ""},
		"client taken back":  {revoking, certs.Dir(t, ca, nil, gone), "localhost", "The certificate has been revoked", ""},
		"another taken back": {revoking, clientDir, "localhost", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			make := func(dir string, end types.QCryptoTLSCredsEndpoint) *X509 {
				x, err := NewX509(&types.TlsCredsX509Properties{Dir: &dir, Endpoint: &end, SanityCheck: ptr(false)}, nil)
				if err != nil {
					t.Fatal(err)
				}
				return x
			}
			o := objects{"s": make(c.server, server), "c": make(c.client, client)}
			a, b := sockets(t)
			sc, cc, serr, cerr := shake(a, b, newServer(t, o, nil), newClient(t, o, c.host))
			if cerr == nil && serr != nil { // with TLS 1.3 the client is told later
				_, cerr := cc.Read([]byte{0})
				if errText(cerr) != "Cannot read from TLS channel: Input/output error" || Alert(cerr) == "" {
					t.Errorf("the client reads: %v", cerr)
				}
			}
			if !strings.HasPrefix(errText(serr), c.serverErr) || (serr == nil) != (c.serverErr == "") {
				t.Errorf("server: %v, want %q", serr, c.serverErr)
			}
			if !strings.HasPrefix(errText(cerr), c.clientErr) || (cerr == nil) != (c.clientErr == "") {
				t.Errorf("client: %v, want %q", cerr, c.clientErr)
			}
			if serr == nil && sc.Peer() != certs.ClientSubject {
				t.Errorf("the client is %q", sc.Peer())
			}
		})
	}
}

// TestForeignClient: a client that sends a certificate of an authority that nobody asked for.
func TestForeignClient(t *testing.T) {
	ca := certs.CA(t)
	x := creds(t, certs.Dir(t, ca, ca.Server(t), nil), server)
	other := certs.CA(t).Client(t)
	a, b := sockets(t)
	done := make(chan error, 1)
	go func() {
		_, err := x.Server(b)
		b.Close()
		done <- err
	}()
	own := &tls.Certificate{Certificate: [][]byte{other.DER}, PrivateKey: other.Key}
	conn := tls.Client(a, &tls.Config{
		InsecureSkipVerify:   true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own, nil },
	})
	_, err := conn.Read([]byte{0})
	if serr := <-done; serr != errUnknown {
		t.Errorf("server: %v", serr)
	}
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		t.Errorf("the client does not see why: %v", err)
	}
}

// TestAuthorization: who has a certificate may still not come in.
func TestAuthorization(t *testing.T) {
	ca := certs.CA(t)
	dir := certs.Dir(t, ca, ca.Server(t), ca.Client(t))
	open, err := NewX509(&types.TlsCredsX509Properties{Dir: &dir, Endpoint: ptr(server), VerifyPeer: ptr(false)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o := objects{"s": creds(t, dir, server), "c": creds(t, dir, client), "open": open,
		"yes": authorizer(certs.ClientSubject), "no": authorizer("CN=somebody"), "thing": 7}
	for authz, want := range map[string]string{
		"yes": "", "no": "TLS x509 authz check for " + certs.ClientSubject + " is denied",
		"missing": "Cannot find QAuthZ object ID missing", "thing": "Object 'thing' is not a QAuthZ subclass",
	} {
		a, b := sockets(t)
		_, cc, serr, cerr := shake(a, b, newServer(t, o, &authz), newClient(t, o, "localhost"))
		if errText(serr) != want || cerr != nil {
			t.Errorf("%s: %v, %v", authz, serr, cerr)
			continue
		}
		if want != "" {
			if _, err := cc.Read([]byte{0}); err == nil {
				t.Errorf("%s: the client can read", authz)
			}
		}
	}
	for _, c := range []struct {
		creds, authz *string
		want         string
	}{
		{ptr("none"), nil, "No TLS credentials with id 'none'"},
		{ptr("thing"), nil, "Object with id 'thing' is not TLS credentials"},
		{ptr("c"), nil, "Expected TLS credentials for a server endpoint"},
		{nil, ptr("yes"), "'tls-authz' option requires 'tls-creds' option"},
		{ptr("open"), ptr("yes"), "'tls-authz' option requires TLS credentials with 'verify-peer': those with id 'open' do not know who connects"},
	} {
		if _, err := NewServer(o, c.creds, c.authz); errText(err) != c.want {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
	if s, err := NewServer(o, nil, nil); s != nil || err != nil {
		t.Error(s, err)
	}
	if _, err := NewClient(o, "s", ""); errText(err) != "Expected TLS credentials for a client endpoint" {
		t.Error(err)
	}
}

// counted counts system calls that write, and keeps what was written.
type counted struct {
	net.Conn
	calls atomic.Int64
	large chan struct{} // gets an element for each large write; nil: nobody asks
	mu    sync.Mutex
	all   bytes.Buffer
}

// SyscallConn is by what the peer is told of the end.
func (c *counted) SyscallConn() (syscall.RawConn, error) { return c.Conn.(syscall.Conn).SyscallConn() }

func (c *counted) Write(b []byte) (int, error) {
	c.calls.Add(1)
	c.mu.Lock()
	c.all.Write(b)
	c.mu.Unlock()
	if c.large != nil && len(b) > holdSize/2 {
		select {
		case c.large <- struct{}{}:
		default:
		}
	}
	return c.Conn.Write(b)
}

// connected is a connection under TLS.
func connected(t *testing.T) (sc, cc *Conn, below *counted) {
	t.Helper()
	ca := certs.CA(t)
	dir := certs.Dir(t, ca, ca.Server(t), ca.Client(t))
	o := objects{"s": creds(t, dir, server), "c": creds(t, dir, client)}
	a, b := sockets(t)
	below = &counted{Conn: b}
	sc, cc, serr, cerr := shake(a, below, newServer(t, o, nil), newClient(t, o, "localhost"))
	if serr != nil || cerr != nil {
		t.Fatal(serr, cerr)
	}
	return sc, cc, below
}

// TestWriteVec: what was written in pieces of all sizes arrives, encrypted, in few system calls.
func TestWriteVec(t *testing.T) {
	sc, cc, below := connected(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	rounds := 200
	if raceEnabled {
		rounds = 20
	}
	for range rounds {
		var v net.Buffers
		var want []byte
		for range 1 + rnd.IntN(20) {
			b := make([]byte, []int{0, 1, 16, 28, 4096, 4112, 16383, 16384, 16385, 65536, 300000}[rnd.IntN(11)])
			for i := range b {
				b[i] = byte(rnd.Uint32())
			}
			v = append(v, b)
			want = append(want, b...)
		}
		before := below.calls.Load()
		done := make(chan error, 1)
		go func() {
			n, err := WriteVec(sc, &v)
			if err == nil && n != int64(len(want)) {
				err = errors.New("wrong number")
			}
			done <- err
		}()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(cc, got); err != nil || !bytes.Equal(got, want) {
			t.Fatal("other bytes came", err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if most := int64(len(want)/(holdSize*9/10) + 1); below.calls.Load()-before > most {
			t.Fatalf("%d system calls for %d bytes", below.calls.Load()-before, len(want))
		}
	}
	secret := bytes.Repeat([]byte("attack at dawn. "), 4096)
	go func() { _, _ = sc.Write(secret) }()
	if _, err := io.ReadFull(cc, make([]byte, len(secret))); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(below.all.Bytes(), secret[:16]) {
		t.Error("it went in the clear")
	}
}

// TestClose: it does not wait for a peer that does not read, tells one that does, and ends who
// writes.
func TestClose(t *testing.T) {
	sc, cc, _ := connected(t)
	if err := sc.Close(); err != nil {
		t.Error(err)
	}
	if _, err := cc.Read([]byte{0}); err != io.EOF {
		t.Errorf("the peer was not told: %v", err)
	}
	sc, _, below := connected(t)
	below.large = make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		for {
			if _, err := sc.Write(make([]byte, 1<<20)); err != nil {
				done <- err
				return
			}
		}
	}()
	start := time.Now()
	<-below.large
	_ = sc.Close()
	if err := <-done; err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
}

// TestSlowHandshake: the deadline of the connection is that of the handshake.
func TestSlowHandshake(t *testing.T) {
	ca := certs.CA(t)
	x := creds(t, certs.Dir(t, ca, ca.Server(t), nil), server)
	_, b := sockets(t)
	_ = b.SetDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := x.Server(b); errText(err) != "TLS handshake failed: The operation timed out" {
		t.Error(err)
	}
	a, b := sockets(t)
	go func() { _, _ = a.Write([]byte("IHAVEOPT and more of it")) }()
	if _, err := x.Server(b); errText(err) != "TLS handshake failed: An unexpected TLS packet was received." {
		t.Error(err)
	}
	a, b = sockets(t)
	a.Close()
	if _, err := x.Server(b); errText(err) != "TLS handshake failed: The TLS connection was non-properly terminated." {
		t.Error(err)
	}
}

// TestAllocations: writing allocates nothing. (What crypto/tls allocates for a record that it reads
// is out of reach.)
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	sc, cc, _ := connected(t)
	sc.wire.Conn = sc.wire.Conn.(*counted).Conn
	go func() {
		b := make([]byte, 1<<20)
		for {
			if _, err := cc.Below().Read(b); err != nil {
				return
			}
		}
	}()
	out, head := make([]byte, 64<<10), make([]byte, 28)
	v := make(net.Buffers, 2)
	if allocs := testing.AllocsPerRun(200, func() {
		v[0], v[1] = head, out[:4096]
		if _, err := sc.WriteVec(v); err != nil {
			t.Fatal(err)
		}
		if _, err := sc.Write(out); err != nil {
			t.Fatal(err)
		}
	}); allocs > 0 {
		t.Errorf("%v allocations", allocs)
	}
}
