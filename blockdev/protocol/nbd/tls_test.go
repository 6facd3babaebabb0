package nbd_test

import (
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	server "qblockd/blockdev/export/nbd"
	"qblockd/blockdev/protocol/nbd"
	"qblockd/blockdev/tlscreds"
	"qblockd/blockdev/tlscreds/certs"
	"qblockd/graph"
	"qblockd/schema/types"
)

// objects are credentials by name.
type objects map[string]any

func (o objects) Object(id string) any { return o[id] }

// dhParams is the group ffdhe2048 of RFC 7919. Without a file that has one, QEMU's servers make
// their own, which can take long.
const dhParams = `-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
`

// withTLS are credentials for both ends, and the folder that has their files.
func withTLS(t *testing.T) (dir string, o objects) {
	t.Helper()
	ca := certs.CA(t)
	dir = certs.Dir(t, ca, ca.Server(t), ca.Client(t))
	certs.Write(t, dir, "dh-params.pem", []byte(dhParams))
	o = objects{"thing": 7}
	for _, end := range types.QCryptoTLSCredsEndpointValues {
		x, err := tlscreds.NewX509(&types.TlsCredsX509Properties{Dir: &dir, Endpoint: &end}, nil)
		if err != nil {
			t.Fatal(err)
		}
		o[string(end)] = x
	}
	return dir, o
}

// build opens a node with what o has.
func build(t *testing.T, g *graph.Graph, o driver.Objects, opts *types.BlockdevOptionsNbd) (*graph.Node, error) {
	t.Helper()
	return drivertest.Build(g, drivertest.Spec{
		Options: graph.Options{Name: "nbd", Kind: graph.Protocol, DriverName: "nbd"},
		Open: func(x *driver.Opening) (graph.Driver, error) {
			x.Objects = o
			return nbd.Def.Open(x, opts)
		},
	})
}

// TestTLSOptions: what is wrong with the options, or with the server, in QEMU's words.
func TestTLSOptions(t *testing.T) {
	_, o := withTLS(t)
	tls, err := tlscreds.NewServer(o, new("server"), nil)
	if err != nil {
		t.Fatal(err)
	}
	need := serveBy(t, 1<<20, false, server.Options{TLS: tls})
	plain := serve(t, 1<<20, false)
	for _, c := range []struct {
		path        string
		creds, host *string
		want        string
	}{
		{need, new("none"), nil, "No TLS credentials with id 'none'"},
		{need, new("thing"), nil, "Object with id 'thing' is not TLS credentials"},
		{need, new("server"), nil, "Expected TLS credentials for a client endpoint"},
		{need, new("client"), nil, "No hostname for certificate validation"},
		{need, new("client"), new("example.com"), "Certificate does not match the hostname example.com"},
		{need, nil, nil, "TLS negotiation required before option 7 (go)"},
		{plain, new("client"), new("localhost"), "Denied by server for option 5 (starttls)"},
		{need, new("client"), new("localhost"), ""},
	} {
		n, err := build(t, drivertest.NewGraph(t), o, &types.BlockdevOptionsNbd{
			Export: new("x"), TlsCreds: c.creds, TlsHostname: c.host,
			Server: types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: c.path}},
		})
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != c.want || (n != nil) != (c.want == "") {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

// TestTLSRefused: a server that does not want the client says so once the client thinks that all
// is well; the error is that of QEMU's clients, whose servers say nothing.
func TestTLSRefused(t *testing.T) {
	_, o := withTLS(t)
	tls, err := tlscreds.NewServer(o, new("server"), nil)
	if err != nil {
		t.Fatal(err)
	}
	path := serveBy(t, 1<<20, false, server.Options{TLS: tls})
	dir := certs.Dir(t, certs.CA(t), nil, certs.CA(t).Client(t))
	end := types.QCryptoTLSCredsEndpointClient
	o["foreign"], err = tlscreds.NewX509(&types.TlsCredsX509Properties{
		Dir: &dir, Endpoint: &end, SanityCheck: new(false), VerifyPeer: new(false),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = build(t, drivertest.NewGraph(t), o, &types.BlockdevOptionsNbd{
		Export: new("x"), TlsCreds: new("foreign"), TlsHostname: new("localhost"),
		Server: types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}},
	})
	const want = "Failed to read option reply: Cannot read from TLS channel: Input/output error"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %q", err, want)
	}
}
