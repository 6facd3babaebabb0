package chardev

import (
	"io"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/tlscreds"
	"qblockd/blockdev/tlscreds/certs"
	"qblockd/schema/types"
)

// objects are credentials by name.
type objects map[string]any

func (o objects) Object(id string) any { return o[id] }

// allowed is the only one who may connect.
type allowed string

func (a allowed) Allows(name string) (bool, error) { return name == string(a), nil }

func newTLSTable(t *testing.T) (*Table, objects) {
	t.Helper()
	ca := certs.CA(t)
	dir := certs.Dir(t, ca, ca.Server(t), ca.Client(t))
	o := objects{"thing": 7, "me": allowed(certs.ClientSubject), "nobody": allowed("")}
	for _, end := range types.QCryptoTLSCredsEndpointValues {
		x, err := tlscreds.NewX509(&types.TlsCredsX509Properties{Dir: &dir, Endpoint: &end}, nil)
		if err != nil {
			t.Fatal(err)
		}
		o[string(end)] = x
	}
	tab := NewTable(Options{Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Objects: o})
	t.Cleanup(tab.Close)
	return tab, o
}

// listenTLS opens a server with TLS and returns its address.
func listenTLS(t *testing.T, tab *Table, id, more string) string {
	t.Helper()
	b := backend(t, `{"type": "socket", "data": {"wait": false, "tls-creds": "server"%s,
		"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}}}`, more)
	if _, err := tab.Add(t.Context(), id, b); err != nil {
		t.Fatal(err)
	}
	name := tab.find(id).filename()
	return strings.TrimSuffix(strings.TrimPrefix(name, "disconnected:tcp:"), ",server=on")
}

// TestTLSSockets: a server and a client of ours talk over TLS, and who is not wanted hears nothing.
func TestTLSSockets(t *testing.T) {
	tab, o := newTLSTable(t)
	addr := listenTLS(t, tab, "s", `, "tls-authz": "me"`)
	if err := tab.Attach("s", echo); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	client := backend(t, `{"type": "socket", "data": {"server": false, "tls-creds": "client",
		"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "%s"}}}}`, port)
	if _, err := tab.Add(t.Context(), "c", client); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	if err := tab.Attach("c", func(c io.ReadWriteCloser) {
		defer close(done)
		exchange(t, c, "over TLS")
		if _, ok := c.(syscall.Conn); ok {
			t.Error("who finds the descriptor could write to it in the clear")
		}
	}); err != nil {
		t.Fatal(err)
	}
	<-done

	plain, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	_ = plain.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(plain, "in the clear\n"); err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(plain); strings.Contains(string(got), "clear") {
		t.Errorf("it was answered: %q", got)
	}
	stranger := certs.Dir(t, certs.CA(t), nil, nil)
	if o["stranger"], err = tlscreds.NewX509(&types.TlsCredsX509Properties{Dir: &stranger}, nil); err != nil {
		t.Fatal(err)
	}
	_, err = tab.Add(t.Context(), "w", backend(t, `{"type": "socket", "data": {"server": false, "tls-creds": "stranger",
		"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "%s"}}}}`, port))
	if want := "Failed to add chardev 'w': The certificate hasn't got a known issuer"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// TestTLSUnwanted: who has a certificate may still not come in, and who says nothing does not hold
// up the end.
func TestTLSUnwanted(t *testing.T) {
	tab, o := newTLSTable(t)
	addr := listenTLS(t, tab, "s", `, "tls-authz": "nobody"`)
	if err := tab.Attach("s", func(io.ReadWriteCloser) { t.Error("the client came in") }); err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	to, err := tlscreds.NewClient(o, "client", "localhost")
	if err != nil {
		t.Fatal(err)
	}
	if c, err := to.Connect(nc); err == nil {
		if _, err := c.Read([]byte{0}); err == nil {
			t.Error("the server speaks")
		}
	}
	silent, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	start := time.Now()
	tab.Close()
	if d := time.Since(start); d > handshakeTime/2 {
		t.Errorf("the end took %v", d)
	}
}

// TestTLSSocketOptions: what does not go together, in QEMU's words.
func TestTLSSocketOptions(t *testing.T) {
	tab, _ := newTLSTable(t)
	inet := `"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}`
	unix := `"addr": {"type": "unix", "data": {"path": "s"}}`
	fd := `"addr": {"type": "fd", "data": {"str": "0"}}`
	for _, c := range []struct{ options, want string }{
		{inet + `, "tls-creds": "none"`, "No TLS credentials with id 'none'"},
		{unix + `, "tls-creds": "none"`, "No TLS credentials with id 'none'"},
		{inet + `, "tls-creds": "thing"`, "Object with id 'thing' is not TLS credentials"},
		{inet + `, "tls-creds": "client"`, "Expected TLS credentials for a server endpoint"},
		{inet + `, "server": false, "tls-creds": "server"`, "Expected TLS credentials for a client endpoint"},
		{inet + `, "tls-authz": "me"`, "'tls_authz' option requires 'tls_creds' option"},
		{unix + `, "tls-creds": "server"`, "'tls_creds' option is incompatible with 'unix' address type"},
		{fd + `, "server": false, "tls-creds": "client"`, "'tls_creds' option is incompatible with 'fd' address type as client"},
		{inet + `, "server": false, "tls-creds": "client", "tls-authz": "me"`,
			"'tls_authz' option is incompatible with socket in client connect mode"},
	} {
		_, err := tab.Add(t.Context(), "x", backend(t, `{"type": "socket", "data": {%s}}`, c.options))
		if want := "Failed to add chardev 'x': " + c.want; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
