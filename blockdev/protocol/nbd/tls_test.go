package nbd_test

import (
	"os"
	"path/filepath"
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

// withTLS are credentials for both ends, and the folder that has their files.
func withTLS(t *testing.T) (dir string, o objects) {
	t.Helper()
	ca := certs.CA(t)
	dir = certs.Dir(t, ca, ca.Server(t), ca.Client(t))
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

// TestTLSPeers does random requests on servers of other makes over TLS.
func TestTLSPeers(t *testing.T) {
	dir, o := withTLS(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"qemu-nbd": {"qemu-nbd", "-t", "-f", "raw", "-x", "", "-k", "SOCKET", "--object",
			"tls-creds-x509,id=t,endpoint=server,dir=" + dir, "--tls-creds", "t", file},
		"nbdkit": {"nbdkit", "-f", "-U", "SOCKET", "--tls=require", "--tls-verify-peer", "--tls-certificates=" + dir,
			"memory", "4M"},
		"nbdkit, may be": {"nbdkit", "-f", "-U", "SOCKET", "--tls=on", "--tls-certificates=" + dir, "memory", "4M"},
	} {
		t.Run(name, func(t *testing.T) {
			path := outside(t, args...)
			g := drivertest.NewGraph(t)
			n, err := build(t, g, o, &types.BlockdevOptionsNbd{
				Export: new(""), OpenTimeout: new(uint32(20)), TlsCreds: new("client"), TlsHostname: new("localhost"),
				Server: types.SocketAddress{Type: "unix", U: &types.UnixSocketAddress{Path: path}},
			})
			if err != nil {
				t.Fatal(err)
			}
			compare(t, drivertest.AddRoot(t, g, n, drivertest.Writer))
		})
	}
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
