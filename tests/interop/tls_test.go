package interop

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"qblockd/blockdev/tlscreds/certs"
	"qblockd/tests/daemon"
)

// proxy passes on what clients and a server say to each other, and keeps it.
type proxy struct {
	path string
	wg   sync.WaitGroup
	mu   sync.Mutex
	said [][2]*bytes.Buffer // by connection: the client, the server
}

func newProxy(t *testing.T, path, to string) *proxy {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{path: path}
	t.Cleanup(func() {
		l.Close()
		p.wg.Wait()
	})
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("unix", to)
			if err != nil {
				c.Close()
				continue
			}
			said := [2]*bytes.Buffer{{}, {}}
			p.mu.Lock()
			p.said = append(p.said, said)
			p.mu.Unlock()
			pass := func(to, from net.Conn, keep *bytes.Buffer) {
				b := make([]byte, 64<<10)
				for {
					n, err := from.Read(b)
					p.mu.Lock()
					keep.Write(b[:n])
					p.mu.Unlock()
					if _, werr := to.Write(b[:n]); err != nil || werr != nil {
						to.Close()
						from.Close()
						return
					}
				}
			}
			p.wg.Go(func() { pass(s, c, said[0]) })
			p.wg.Go(func() { pass(c, s, said[1]) })
		}
	})
	return p
}

// take is what was said on each connection since the last call.
func (p *proxy) take() (all [][2][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.said {
		all = append(all, [2][]byte{bytes.Clone(s[0].Bytes()), bytes.Clone(s[1].Bytes())})
	}
	p.said = nil
	return all
}

// hidden requires that nothing but what asks for TLS, and its answer, was said in the clear.
func hidden(t *testing.T, what string, said [2][]byte) {
	t.Helper()
	starttls := append([]byte("IHAVEOPT"), 0, 0, 0, 5, 0, 0, 0, 0)
	client, server := said[0], said[1]
	if len(client) < 4+len(starttls) || !bytes.Equal(client[4:4+len(starttls)], starttls) {
		t.Errorf("%s: the client begins with %q", what, client[:min(len(client), 40)])
		return
	}
	for i, b := range [][]byte{client[4+len(starttls):], server[min(len(server), 18+20):]} {
		for len(b) > 0 {
			if b[0] < 20 || b[0] > 23 || len(b) > 1 && b[1] != 3 {
				t.Errorf("%s: end %d says %q in the clear", what, i, b[:min(len(b), 40)])
				return
			}
			if len(b) < 5 {
				break
			}
			b = b[min(len(b), 5+int(binary.BigEndian.Uint16(b[3:]))):]
		}
	}
}

// tlsCase is a server and a client under TLS. Ends name folders with their files.
type tlsCase struct {
	name           string
	kind           string // of the credentials: x509 or psk
	server, client string
	serverOpts     map[string]any
	clientOpts     map[string]any
	host           string // "" is localhost
	authz          string // who may connect, by name
	want           string // of the client, in QEMU's words; "" if it may connect
	anyText        bool   // the words of the client are those of its library
}

// refusedLater is what a client says whose server turns it away after the handshake, as it sees it:
// whether that is with its next words or with the answer is a matter of time.
const refusedLater = "Failed to read option reply: |Failed to send option request header: "

func tlsFolders(t *testing.T) map[string]string {
	ca := certs.CA(t)
	old := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	gone := ca.Client(t)
	dirs := map[string]string{
		"sound":    certs.Dir(t, ca, ca.Server(t), ca.Client(t)),
		"bare":     certs.Dir(t, ca, nil, nil),
		"stranger": certs.Dir(t, ca, certs.CA(t).Server(t), certs.CA(t).Client(t)),
		"old":      certs.Dir(t, ca, ca.Server(t, old), ca.Client(t, old)),
		"gone":     certs.Dir(t, ca, nil, gone),
		"revoking": certs.Dir(t, ca, ca.Server(t), nil),
		"keys":     t.TempDir(), "other keys": t.TempDir(),
	}
	certs.Write(t, dirs["revoking"], "ca-crl.pem", ca.Revoke(t, gone))
	certs.Write(t, dirs["keys"], "keys.psk", []byte(pskKeys))
	certs.Write(t, dirs["other keys"], "keys.psk", []byte("qemu:00112233445566778899aabbccddeeff\n"))
	return dirs
}

var tlsCases = []tlsCase{
	{name: "certificates", kind: "x509", server: "sound", client: "sound"},
	{name: "keys", kind: "psk", server: "keys", client: "keys"},
	{name: "another name of a key", kind: "psk", server: "keys", client: "keys", clientOpts: map[string]any{"username": "alice"}},
	{name: "server unknown", kind: "x509", server: "stranger", client: "sound",
		want: "The certificate hasn't got a known issuer"},
	{name: "server expired", kind: "x509", server: "old", client: "sound", want: "The certificate is not trusted"},
	{name: "wrong host", kind: "x509", server: "sound", client: "sound", host: "example.com",
		want: "Certificate does not match the hostname example.com"},
	{name: "client without certificate, nobody asks", kind: "x509", server: "sound", client: "bare",
		serverOpts: map[string]any{"verify-peer": false}},
	{name: "client without certificate", kind: "x509", server: "sound", client: "bare", want: refusedLater},
	{name: "client unknown", kind: "x509", server: "sound", client: "stranger", want: refusedLater},
	{name: "client expired", kind: "x509", server: "sound", client: "old", want: refusedLater},
	{name: "client revoked", kind: "x509", server: "revoking", client: "gone", want: refusedLater},
	{name: "client allowed", kind: "x509", server: "sound", client: "sound", authz: certs.ClientSubject},
	{name: "client not allowed", kind: "x509", server: "sound", client: "sound", authz: "nobody", want: refusedLater},
	{name: "wrong key", kind: "psk", server: "keys", client: "other keys", anyText: true},
	{name: "unknown name", kind: "psk", server: "other keys", client: "keys", clientOpts: map[string]any{"username": "alice"},
		anyText: true},
}

// tlsPrograms are who takes part, each with each.
func tlsPrograms(t *testing.T) (l []string) {
	for _, p := range []string{"qemu-storage-daemon", "qsd10"} {
		if path, err := exec.LookPath(p); err == nil {
			l = append(l, path)
		} else {
			t.Logf("SKIPPED: %s is not installed", p)
		}
	}
	return append(l, daemon.Binary(t))
}

// startFor makes the NBD server of a daemon one of a case.
func (c *tlsCase) startFor(t *testing.T, q *daemon.QMP, socket, dir string) {
	t.Helper()
	creds := map[string]any{"qom-type": "tls-creds-" + c.kind, "id": "t", "endpoint": "server", "dir": dir}
	if c.kind == "x509" {
		creds["sanity-check"] = false
	}
	for k, v := range c.serverOpts {
		creds[k] = v
	}
	q.Must(t, "object-add", creds)
	start := map[string]any{"tls-creds": "t", "addr": map[string]any{"type": "unix", "data": map[string]any{"path": socket}}}
	if c.authz != "" {
		q.Must(t, "object-add", map[string]any{"qom-type": "authz-simple", "id": "a", "identity": c.authz})
		start["tls-authz"] = "a"
	}
	q.Must(t, "nbd-server-start", start)
	q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n", "name": "x"})
}

// connect has a client open the export, and returns what it says of that.
func (c *tlsCase) connect(t *testing.T, q *daemon.QMP, socket, dir string) string {
	t.Helper()
	creds := map[string]any{"qom-type": "tls-creds-" + c.kind, "id": "t", "endpoint": "client", "dir": dir}
	if c.kind == "x509" {
		creds["sanity-check"] = false
	}
	for k, v := range c.clientOpts {
		creds[k] = v
	}
	q.Must(t, "object-add", creds)
	host := "localhost"
	if c.host != "" {
		host = c.host
	}
	q.SetDeadline(time.Now().Add(10 * time.Second))
	defer q.SetDeadline(time.Time{})
	_, err := q.Do("blockdev-add", map[string]any{"driver": "nbd", "node-name": "c", "export": "x", "read-only": true,
		"tls-creds": "t", "tls-hostname": host, "server": map[string]any{"type": "unix", "path": socket}})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return hangs
	}
	if err == nil {
		q.Must(t, "blockdev-del", map[string]any{"node-name": "c"})
	}
	q.Must(t, "object-del", map[string]any{"id": "t"})
	if err != nil {
		return strings.TrimPrefix(err.Error(), "GenericError: ")
	}
	return ""
}

// hangs is what a client says that does not answer: the reference, now and then, when its server
// goes away in the middle of a handshake.
const hangs = "(nothing)"

// TestTLSMatrix has the reference and us serve and connect, each with each, soundly and with
// everything that can be wrong. What clients say is logged side by side; what goes over the wire is
// encrypted in any case.
func TestTLSMatrix(t *testing.T) {
	need(t, "qemu-storage-daemon")
	dirs := tlsFolders(t)
	programs := tlsPrograms(t)
	start := func(bin string) (*daemon.Daemon, *daemon.QMP) {
		d := daemon.StartBinary(t, bin, t.TempDir(), "--blockdev", "null-co,node-name=n,size=1048576,read-zeroes=on")
		q := d.Dial(t)
		q.Must(t, "nbd-server-stop", nil)
		return d, q
	}
	clients := map[string]*daemon.QMP{}
	for _, bin := range programs {
		_, clients[bin] = start(bin)
	}
	ours := programs[len(programs)-1]
	for _, bin := range programs {
		d, q := start(bin)
		socket := filepath.Join(d.Dir, "tls")
		p := newProxy(t, filepath.Join(d.Dir, "proxy"), socket)
		for _, c := range tlsCases {
			c.startFor(t, q, socket, dirs[c.server])
			said := map[string]string{}
			for _, client := range programs {
				text := c.connect(t, clients[client], p.path, dirs[c.client])
				said[client] = text
				what := fmt.Sprintf("%s: %s serves %s", c.name, filepath.Base(bin), filepath.Base(client))
				t.Logf("%s: %s", what, text)
				wrong := c.want != "" || c.anyText
				fits := slices.ContainsFunc(strings.Split(c.want, "|"), func(s string) bool { return strings.HasPrefix(text, s) })
				if text == hangs && client != ours {
					_, clients[client] = start(client)
					continue
				}
				if (text != "") != wrong || client == ours && !fits {
					t.Errorf("%s: %q, want %q", what, text, c.want)
				}
				for _, x := range p.take() {
					hidden(t, what, x)
				}
			}
			q.Must(t, "nbd-server-stop", nil)
			q.Must(t, "object-del", map[string]any{"id": "t"})
			if c.authz != "" {
				q.Must(t, "object-del", map[string]any{"id": "a"})
			}
		}
	}
}

// TestTLSIsAsked has a client without TLS at a server that wants it, and the other way round:
// neither says anything of what it is about.
func TestTLSIsAsked(t *testing.T) {
	dirs := tlsFolders(t)
	for _, bin := range tlsPrograms(t) {
		d := daemon.StartBinary(t, bin, t.TempDir(), "--blockdev", "null-co,node-name=n,size=1048576,read-zeroes=on")
		q := d.Dial(t)
		q.Must(t, "nbd-server-stop", nil)
		socket := filepath.Join(d.Dir, "tls")
		(&tlsCases[0]).startFor(t, q, socket, dirs["sound"])
		p := newProxy(t, filepath.Join(d.Dir, "proxy"), socket)
		us := daemon.Start(t, t.TempDir())
		u := us.Dial(t)
		_, err := u.Do("blockdev-add", map[string]any{"driver": "nbd", "node-name": "c", "export": "x", "read-only": true,
			"server": map[string]any{"type": "unix", "path": p.path}})
		if err == nil || !strings.Contains(err.Error(), "TLS negotiation required before option") {
			t.Errorf("%s: %v", filepath.Base(bin), err)
		}
		t.Logf("%s wants TLS: %v", filepath.Base(bin), err)
		q.Must(t, "nbd-server-stop", nil)
		q.Must(t, "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": socket}}})
		q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n", "name": "x"})
		p.take()
		text := tlsCases[0].connect(t, u, p.path, dirs["sound"])
		if !strings.Contains(text, "Denied by server for option 5 (starttls)") {
			t.Errorf("%s without TLS: %q", filepath.Base(bin), text)
		}
		t.Logf("%s has no TLS: %s", filepath.Base(bin), text)
		for _, x := range p.take() {
			if bytes.Contains(x[0], []byte("x")) {
				t.Errorf("the client says %q", x[0])
			}
		}
		us.Stop(t)
	}
}

// TestMonitorOverTLS has programs that know nothing of QEMU speak QMP over TLS.
func TestMonitorOverTLS(t *testing.T) {
	dirs := tlsFolders(t)
	sound, keys := dirs["sound"], dirs["keys"]
	d := daemon.Start(t, t.TempDir(),
		"--object", "tls-creds-x509,id=x,endpoint=server,dir="+sound, "--object", "tls-creds-psk,id=p,endpoint=server,dir="+keys,
		"--chardev", "socket,id=x,host=127.0.0.1,port=0,server=on,wait=off,tls-creds=x", "--monitor", "x",
		"--chardev", "socket,id=p,host=127.0.0.1,port=0,server=on,wait=off,tls-creds=p", "--monitor", "p")
	q := d.Dial(t)
	port := map[string]string{}
	for _, l := range strings.Split(string(q.Must(t, "query-chardev", nil)), "},") {
		for _, id := range []string{"x", "p"} {
			if _, after, ok := strings.Cut(l, "127.0.0.1:"); ok && strings.Contains(l, `"label": "`+id+`"`) {
				port[id], _, _ = strings.Cut(after, ",")
			}
		}
	}
	const key = "0123456789abcdef0123456789abcdef"
	x509Files := fmt.Sprintf("%s/client-cert.pem %s/client-key.pem %s/ca-cert.pem", sound, sound, sound)
	var cert, priv, ca string
	_, _ = fmt.Sscan(x509Files, &cert, &priv, &ca)
	for _, c := range []struct{ name, program string }{
		{"gnutls-cli, certificates", fmt.Sprintf("gnutls-cli --x509certfile %s --x509keyfile %s --x509cafile %s -p %s localhost",
			cert, priv, ca, port["x"])},
		{"gnutls-cli, key", "gnutls-cli --priority NORMAL:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK --pskusername qemu --pskkey " + key +
			" -p " + port["p"] + " 127.0.0.1"},
		{"openssl, certificates", fmt.Sprintf("openssl s_client -quiet -verify_return_error -verify_hostname localhost -cert %s -key %s "+
			"-CAfile %s -connect 127.0.0.1:%s", cert, priv, ca, port["x"])},
		{"openssl, key", "openssl s_client -quiet -tls1_3 -psk_identity qemu -psk " + key + " -connect 127.0.0.1:" + port["p"]},
	} {
		t.Run(c.name, func(t *testing.T) {
			need(t, strings.Fields(c.program)[0])
			speakQMP(t, exec.Command("bash", "-c", "exec "+c.program))
		})
	}
	out, _ := exec.Command("bash", "-c", "echo '{\"execute\":\"quit\"}' | timeout 5 socat - tcp:127.0.0.1:"+port["x"]).CombinedOutput()
	if bytes.Contains(out, []byte("QMP")) {
		t.Errorf("without TLS: %q", out)
	}
	d.Stop(t)
}

// speakQMP talks to a monitor through a program.
func speakQMP(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		w.Close()
		close(ended)
	}()
	var all bytes.Buffer
	wait := func(text string) {
		t.Helper()
		b := make([]byte, 4096)
		for !strings.Contains(all.String(), text) {
			n, err := r.Read(b)
			all.Write(b[:n])
			if err != nil {
				t.Fatalf("waited in vain for %s: %s", text, &all)
			}
		}
		all.Reset()
	}
	wait(`{"QMP": `)
	_, _ = io.WriteString(in, "{\"execute\":\"qmp_capabilities\"}\n")
	wait(`{"return": {}}`)
	_, _ = io.WriteString(in, "{\"execute\":\"query-version\",\"id\":\"over TLS\"}\n")
	wait(`"id": "over TLS"`)
	in.Close()
	_ = cmd.Process.Kill()
	go func() { _, _ = io.Copy(io.Discard, r) }()
	<-ended
}
