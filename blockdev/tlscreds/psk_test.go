package tlscreds

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/schema/types"
)

const testPSK = "0123456789abcdef0123456789abcdef"

// pskDir is a folder with keys.
func pskDir(t *testing.T, lines string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "keys.psk"), []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func newPSK(t *testing.T, end types.QCryptoTLSCredsEndpoint, dir string, username *string) *PSK {
	t.Helper()
	p := &types.TlsCredsPskProperties{Username: username}
	p.Endpoint, p.Dir = &end, &dir
	c, err := NewPSK(p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestPSKRefused has the texts of qemu-storage-daemon 7.2 and 10.0; those on priorities are ours.
func TestPSKRefused(t *testing.T) {
	dir := pskDir(t, "qemu:"+testPSK+"\nbad:zz\nempty:\n")
	missing := t.TempDir()
	for _, c := range []struct{ end, dir, username, priority, want string }{
		{"server", "", "", "", "Missing 'dir' property value"},
		{"client", "", "", "", "Missing 'dir' property value"},
		{"server", "", "x", "", "username should not be set when endpoint=server"},
		{"server", missing, "", "", "Unable to access credentials " + missing + "/keys.psk: No such file or directory"},
		{"client", missing, "", "", "Unable to access credentials " + missing + "/keys.psk: No such file or directory"},
		{"client", dir, "nobody", "", "Username nobody not found in PSK file " + dir + "/keys.psk"},
		{"client", dir, "qem", "", "Username qem not found in PSK file " + dir + "/keys.psk"},
		{"client", dir, "bad", "", "Cannot set PSK client credentials: Error in parsing."},
		{"client", dir, "empty", "", "Cannot set PSK client credentials: Error in parsing."},
		{"client", dir, "", "FOO", "Cannot set TLS session priority FOO: 'FOO' is not supported, use NORMAL"},
		{"server", dir, "", "NORMAL:-VERS-TLS1.3",
			"Cannot set TLS session priority NORMAL:-VERS-TLS1.3: with keys, there is no version but TLS 1.3"},
		{"client", dir, "", "NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK", ""},
	} {
		p := &types.TlsCredsPskProperties{}
		end := types.QCryptoTLSCredsEndpoint(c.end)
		p.Endpoint = &end
		for s, to := range map[*string]**string{&c.dir: &p.Dir, &c.username: &p.Username, &c.priority: &p.Priority} {
			if *s != "" {
				*to = s
			}
		}
		_, err := NewPSK(p)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%+v: got %q", c, got)
		}
	}
}

// TestPSK has ends with keys: what is written in pieces comes, and the server knows the name.
func TestPSK(t *testing.T) {
	dir := pskDir(t, "# keys\nother:00\nqemu:"+testPSK+"\n#626f62:ab"+testPSK+"\nplain:zz\n")
	server := newPSK(t, types.QCryptoTLSCredsEndpointServer, dir, nil)
	bob := "bob"
	for _, c := range []struct {
		client  *PSK
		allowed string
		serr    string
		cerr    string
	}{
		{newPSK(t, types.QCryptoTLSCredsEndpointClient, dir, nil), "qemu", "", ""},
		{newPSK(t, types.QCryptoTLSCredsEndpointClient, pskDir(t, "bob:ab"+testPSK), &bob), "bob", "", ""},
		{newPSK(t, types.QCryptoTLSCredsEndpointClient, pskDir(t, "bob:ab"), &bob), "bob",
			"TLS handshake failed: the client does not have the key",
			"TLS handshake failed: A TLS fatal alert has been received."},
		{newPSK(t, types.QCryptoTLSCredsEndpointClient, dir, nil), "bob", "TLS x509 authz check for qemu is denied", ""},
	} {
		a, b := sockets(t)
		o := objects{"s": server, "c": c.client, "z": authorizer(c.allowed)}
		id, authz := "s", "z"
		s, err := NewServer(o, &id, &authz)
		if err != nil {
			t.Fatal(err)
		}
		cl, err := NewClient(o, "c", "")
		if err != nil {
			t.Fatal(err)
		}
		sc, cc, serr, cerr := shake(a, b, s, cl)
		if text(serr) != c.serr || text(cerr) != c.cerr {
			t.Errorf("%s: the server gets %q, the client %q", c.allowed, text(serr), text(cerr))
		}
		if serr == nil && cerr == nil {
			pskTalk(t, sc, cc)
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// pskTalk passes pieces, and then the end.
func pskTalk(t *testing.T, from, to *Conn) {
	t.Helper()
	big := make([]byte, 3<<20)
	_, _ = rand.Read(big)
	v := net.Buffers{[]byte("head"), big[:1<<20], nil, big[1<<20:]}
	done := make(chan error, 1)
	go func() {
		_, err := WriteVec(from, &v)
		done <- err
	}()
	got := make([]byte, 4+len(big))
	if _, err := io.ReadFull(to, got); err != nil || string(got[:4]) != "head" || !bytes.Equal(got[4:], big) {
		t.Errorf("it does not come as it was sent: %v", err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := from.Close(); err != nil {
		t.Error(err)
	}
	if n, err := to.Read(got); n != 0 || err != io.EOF {
		t.Errorf("the end is %d, %v", n, err)
	}
}

// TestPSKLater has keys come and go while the server runs.
func TestPSKLater(t *testing.T) {
	dir := pskDir(t, "")
	server := newPSK(t, types.QCryptoTLSCredsEndpointServer, dir, nil)
	client := newPSK(t, types.QCryptoTLSCredsEndpointClient, pskDir(t, "qemu:"+testPSK), nil)
	try := func() error {
		a, b := sockets(t)
		_, _, serr, _ := shake(a, b, &Server{creds: server}, &Client{creds: client})
		return serr
	}
	if err := try(); err == nil || !strings.Contains(err.Error(), "does not have the key") {
		t.Errorf("without keys: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "keys.psk"), []byte("qemu:"+testPSK), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := try(); err != nil {
		t.Errorf("with the key: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "keys.psk")); err != nil {
		t.Fatal(err)
	}
	if err := try(); err == nil {
		t.Error("a key that has gone is taken")
	}
}
