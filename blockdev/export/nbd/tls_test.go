package nbd

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/blockdev/tlscreds/certs"
	"qblockd/schema/types"
)

// objects are credentials by name.
type objects map[string]any

func (o objects) Object(id string) any { return o[id] }

// withTLS is a folder with certificates, what a server needs of them, and a client's credentials.
func withTLS(t testing.TB) (dir string, s *tlscreds.Server, c *tlscreds.Client) {
	t.Helper()
	ca := certs.CA(t)
	dir = certs.Dir(t, ca, ca.Server(t), ca.Client(t))
	o := objects{}
	for _, end := range types.QCryptoTLSCredsEndpointValues {
		x, err := tlscreds.NewX509(&types.TlsCredsX509Properties{Dir: &dir, Endpoint: &end}, nil)
		if err != nil {
			t.Fatal(err)
		}
		o[string(end)] = x
	}
	name := "server"
	s, err := tlscreds.NewServer(o, &name, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = tlscreds.NewClient(o, "client", "localhost"); err != nil {
		t.Fatal(err)
	}
	return dir, s, c
}

// startTLS goes on under TLS.
func (c *client) startTLS(tc *tlscreds.Client) {
	c.t.Helper()
	if r := c.option(nbdwire.OptStartTLS, nil); r[0].Type != nbdwire.RepAck || len(r) != 1 {
		c.t.Fatal(r)
	}
	nc, err := tc.Connect(c.nc)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { nc.Close() })
	c.nc, c.r = nc, bufio.NewReaderSize(nc, 64<<10)
}

// TestBeforeTLS: without TLS a client learns nothing but that it needs it.
func TestBeforeTLS(t *testing.T) {
	_, s, tc := withTLS(t)
	_, _, path := server(t, newFileDevice(t, 1<<20), Options{TLS: s})
	c := dial(t, path)
	c.greet(3)
	for _, o := range []struct {
		opt  uint32
		data []byte
		want string
	}{
		{nbdwire.OptList, nil, "Option 0x3 not permitted before TLS"},
		{nbdwire.OptStructuredReply, nil, "Option 0x8 not permitted before TLS"},
		{nbdwire.OptGo, (&nbdwire.InfoRequest{Name: "x"}).Append(nil), "Option 0x7 not permitted before TLS"},
		{nbdwire.OptSetMetaContext, nbdwire.AppendMetaQueries(nil, "x", "base:"), "Option 0xa not permitted before TLS"},
		{77, []byte("abc"), "Option 0x4d not permitted before TLS"},
	} {
		r := c.option(o.opt, o.data)
		if len(r) != 1 || r[0].Type != nbdwire.RepErrTLSReqd || string(r[0].data) != o.want {
			t.Errorf("%d: %v", o.opt, r)
		}
	}
	c.startTLS(tc)
	if r := c.option(nbdwire.OptStartTLS, nil); r[0].Type != nbdwire.RepErrInvalid || string(r[0].data) != "TLS already enabled" {
		t.Error(r)
	}
	if r := c.option(nbdwire.OptList, nil); len(r) != 2 || !bytes.HasSuffix(r[0].data, []byte("x")) {
		t.Error(r)
	}

	c = dial(t, path)
	c.greet(3)
	if r := c.option(nbdwire.OptAbort, nil); r[0].Type != nbdwire.RepErrTLSReqd {
		t.Error(r)
	}
	c.eof()

	c = dial(t, path)
	c.greet(3)
	c.put(nbdwire.AppendOption(nil, nbdwire.OptExportName, []byte("x")))
	c.eof()

	c = dial(t, path)
	c.greet(0) // knows no errors
	c.put(nbdwire.AppendOption(nil, nbdwire.OptStartTLS, nil))
	c.eof()

	c = dial(t, path)
	c.greet(3)
	if r := c.option(nbdwire.OptStartTLS, []byte("abc")); r[0].Type != nbdwire.RepErrInvalid ||
		string(r[0].data) != "option 'starttls' has unexpected length" {
		t.Error(r)
	}
	c.eof()
}

// TestPlainAfterStartTLS: what is put behind the request for TLS in the clear is not taken for what
// comes under it.
func TestPlainAfterStartTLS(t *testing.T) {
	_, s, _ := withTLS(t)
	_, _, path := server(t, newFileDevice(t, 1<<20), Options{TLS: s})
	c := dial(t, path)
	c.greet(3)
	c.put(nbdwire.AppendOption(nbdwire.AppendOption(nil, nbdwire.OptStartTLS, nil), nbdwire.OptList, nil))
	if r, err := nbdwire.ParseOptReply(c.take(nbdwire.OptReplySize)); err != nil || r.Type != nbdwire.RepAck {
		t.Fatal(r, err)
	}
	rest, _ := io.ReadAll(c.r)
	if bytes.Contains(rest, []byte{0, 3, 0xe8, 0x89}) {
		t.Errorf("an option in the clear was answered: %x", rest)
	}
}

// TestTLSHandshakeDeadline: the time of the handshake holds for that of TLS.
func TestTLSHandshakeDeadline(t *testing.T) {
	_, tls, _ := withTLS(t)
	s, _, path := server(t, newFileDevice(t, 1<<20), Options{TLS: tls, Handshake: 50 * time.Millisecond})
	c := dial(t, path)
	c.greet(3)
	if r := c.option(nbdwire.OptStartTLS, nil); r[0].Type != nbdwire.RepAck {
		t.Fatal(r)
	}
	eventually(t, "the connection is given up", func() bool { return s.count() == 0 })
}

// TestTLSUse: requests of all kinds and sizes, and their removal, are as without TLS.
func TestTLSUse(t *testing.T) {
	const size = 8 << 20
	for _, form := range []nbdwire.Form{nbdwire.Simple, nbdwire.Structured, nbdwire.Extended} {
		_, tls, tc := withTLS(t)
		d := newFileDevice(t, size)
		s, e, path := server(t, d, Options{TLS: tls})
		c := dial(t, path)
		c.greet(3)
		c.startTLS(tc)
		testAgainstModel(t, c.choose(form), size)
		if d.leases.Load() != 0 {
			t.Error("pages of files were lent to a connection that encrypts")
		}
		promptly(t, "the removal", e.Shutdown)
		eventually(t, "the client is gone", func() bool { return s.count() == 0 })
	}
}

// TestTLSClientThatNeverReads does not hold up the end.
func TestTLSClientThatNeverReads(t *testing.T) {
	_, tls, tc := withTLS(t)
	s, e, path := server(t, newFileDevice(t, 8<<20), Options{TLS: tls})
	c := dial(t, path)
	c.greet(3)
	c.startTLS(tc)
	c.choose(nbdwire.Structured)
	for i := range 8 {
		q := rd(0, 8<<20)
		q.Cookie = uint64(i)
		c.put(q.Append(nil))
	}
	promptly(t, "the removal", e.Shutdown)
	eventually(t, "the client is gone", func() bool { return s.count() == 0 })
}

// TestInteropTLS: libnbd's and QEMU's programs.
func TestInteropTLS(t *testing.T) {
	dir, tls, _ := withTLS(t)
	d := newFileDevice(t, 24<<20)
	_, _, path := server(t, d, Options{TLS: tls})
	uri := "nbds+unix://localhost/x?socket=" + path + "&tls-certificates=" + dir + "&tls-hostname=localhost"
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
	want := append(make([]byte, 5<<20), pattern(19<<20, 3)...)
	if err := os.WriteFile(src, want, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "nbdcopy", src, uri)
	run(t, "nbdcopy", uri, dst)
	if got, _ := os.ReadFile(dst); !bytes.Equal(got, want) {
		t.Error("nbdcopy: data differ")
	}
	if out := run(t, "nbdinfo", uri); !strings.Contains(out, "protocol: newstyle-fixed with TLS, using structured packets") {
		t.Error(out)
	}
	for _, priority := range []string{"", ",priority=NORMAL:-VERS-TLS1.3"} {
		out := run(t, "qemu-io", "--object", "tls-creds-x509,id=c,endpoint=client,dir="+dir+priority, "--image-opts",
			"-c", "read -P 0 0 5M", "-c", "write -P 7 1M 3M", "-c", "read -P 7 1M 3M", "-c", "write -P 0 1M 3M", "-c", "flush",
			"driver=nbd,server.type=unix,server.path="+path+",export=x,tls-creds=c,tls-hostname=localhost")
		if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Error(out)
		}
	}
}
