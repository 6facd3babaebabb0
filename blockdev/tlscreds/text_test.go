package tlscreds

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"qblockd/blockdev/tlscreds/certs"
	"qblockd/schema/types"
)

// TestEnds has the ends that a connection can come to, with certificates and with keys.
func TestEnds(t *testing.T) {
	const aborted = "Cannot read from TLS channel: Software caused connection abort"
	for kind, connect := range map[string]func(t *testing.T) (a, b *Conn){
		"certificates": func(t *testing.T) (a, b *Conn) { a, b, _ = connected(t); return a, b },
		"keys":         pskConnected,
	} {
		t.Run(kind, func(t *testing.T) {
			a, b := connect(t)
			_ = a.SetReadDeadline(time.Unix(1, 0))
			if _, err := a.Read([]byte{0}); !errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, new(*ChannelError)) {
				t.Errorf("too late: %v", err)
			}
			a.Close()
			if _, err := a.Read([]byte{0}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("our own end: %v", err)
			}
			if _, err := b.Read([]byte{0}); err != io.EOF {
				t.Errorf("an end that was announced: %v", err)
			}

			a, b = connect(t)
			a.Below().Close()
			if _, err := b.Read([]byte{0}); errText(err) != aborted {
				t.Errorf("another end: %v", err)
			}
			if _, err := b.Write(make([]byte, 1<<20)); errText(err) != "Cannot write to TLS channel: Input/output error" {
				t.Errorf("a write after it: %v", err)
			}
			if _, err := b.WriteVec(net.Buffers{make([]byte, 1<<20)}); errText(err) != "Cannot write to TLS channel: Input/output error" {
				t.Errorf("a second one: %v", err)
			}

			a, b = connect(t)
			if _, err := a.Below().Write([]byte("no record at all")); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Read([]byte{0}); errText(err) != "Cannot read from TLS channel: Input/output error" {
				t.Errorf("no TLS: %v", err)
			}
		})
	}
}

// pskConnected are two ends with a key.
func pskConnected(t *testing.T) (a, b *Conn) {
	t.Helper()
	dir := pskDir(t, "qemu:"+testPSK)
	o := objects{
		"s": newPSK(t, types.QCryptoTLSCredsEndpointServer, dir, nil),
		"c": newPSK(t, types.QCryptoTLSCredsEndpointClient, dir, nil),
	}
	x, y := sockets(t)
	a, b, serr, cerr := shake(x, y, newServer(t, o, nil), newClient(t, o, ""))
	if serr != nil || cerr != nil {
		t.Fatal(serr, cerr)
	}
	return a, b
}

// TestUnshaken has ends that do not come to terms, in GnuTLS' words.
func TestUnshaken(t *testing.T) {
	ca := certs.CA(t)
	dir := certs.Dir(t, ca, ca.Server(t), ca.Client(t))
	with := func(end types.QCryptoTLSCredsEndpoint, priority string) *X509 {
		p := &types.TlsCredsX509Properties{}
		p.Dir, p.Endpoint, p.Priority = &dir, &end, &priority
		x, err := NewX509(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	key := newPSK(t, types.QCryptoTLSCredsEndpointClient, pskDir(t, "qemu:"+testPSK), nil)
	keys := newPSK(t, types.QCryptoTLSCredsEndpointServer, pskDir(t, "qemu:"+testPSK), nil)
	const (
		alert   = "TLS handshake failed: A TLS fatal alert has been received."
		version = "TLS handshake failed: A packet with illegal or unsupported version was received."
	)
	for name, c := range map[string]struct {
		server, client Creds
		serr, cerr     string
		alert          string
	}{
		"only 1.3":  {with(server, "NORMAL:-VERS-TLS1.2"), with(client, "NORMAL:-VERS-TLS1.3"), version, alert, "protocol version not supported"},
		"only 1.2":  {with(server, "NORMAL:-VERS-TLS1.3"), with(client, "NORMAL:-VERS-TLS1.2"), version, alert, "protocol version not supported"},
		"keys, 1.2": {with(server, "NORMAL:-VERS-TLS1.3"), key, version, alert, "protocol version not supported"},
		"no key":    {keys, with(client, "NORMAL"), "TLS handshake failed: the client has no key", alert, "handshake failure"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := sockets(t)
			o := objects{"s": c.server, "c": c.client}
			_, _, serr, cerr := shake(a, b, newServer(t, o, nil), newClient(t, o, "localhost"))
			if errText(serr) != c.serr || errText(cerr) != c.cerr || Alert(cerr) != c.alert {
				t.Errorf("server: %v; client: %v, told %q", serr, cerr, Alert(cerr))
			}
		})
	}
}
