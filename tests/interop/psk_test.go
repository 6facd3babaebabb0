package interop

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/schema/types"
	"qblockd/tests/daemon"
)

const pskKeys = "qemu:0123456789abcdef0123456789abcdef\nalice:fedcba9876543210fedcba9876543210\n"

func writeKeys(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "keys.psk")
	if err := os.WriteFile(path, []byte(pskKeys), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPSKClients has clients of QEMU and libnbd read and write what qblockd serves by keys.
func TestPSKClients(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "nbdinfo", "nbdcopy")
	dir := t.TempDir()
	writeKeys(t, dir)
	sh(t, dir, "truncate -s 8M disk; head -c 8M /dev/urandom > want; cp want disk")
	d := daemon.Start(t, dir, "--blockdev", "file,node-name=n,filename=disk",
		"--object", "tls-creds-psk,id=t,endpoint=server,dir="+dir)
	defer d.Stop(t)
	q := d.Dial(t)
	q.Must(t, "nbd-server-stop", nil)
	q.Must(t, "nbd-server-start", map[string]any{"tls-creds": "t",
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": dir + "/tls.sock"}}})
	q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n", "name": "x", "writable": true})
	uri := "nbds+unix://alice@/x?socket=" + dir + "/tls.sock&tls-psk-file=" + dir + "/keys.psk"
	if out := sh(t, dir, "nbdinfo '%s'", uri); !strings.Contains(out, "with TLS") {
		t.Errorf("nbdinfo says %s", out)
	}
	sh(t, dir, "nbdcopy '%s' got && cmp got want", uri)
	sh(t, dir, "tac want | head -c 8M > new; truncate -s 8M new; nbdcopy new '%s' && nbdcopy '%s' got && cmp got new", uri, uri)
	for _, version := range []string{"", "10"} {
		if _, err := exec.LookPath("qemu-img" + version); err != nil {
			t.Logf("SKIPPED: qemu-img%s is not installed", version)
			continue
		}
		opts := "driver=nbd,server.type=unix,server.path=tls.sock,export=x,tls-creds=c"
		sh(t, dir, "qemu-img%s convert --object tls-creds-psk,id=c,endpoint=client,dir=. --image-opts %s -O raw back && cmp back new",
			version, opts)
		sh(t, dir, "qemu-io%s --object tls-creds-psk,id=c,endpoint=client,dir=.,username=alice --image-opts %s "+
			"-c 'write -P 7 1M 3M' -c 'read -P 7 1M 3M' -c flush", version, opts)
		sh(t, dir, "cp new disk")
		sh(t, dir, "mkdir -p wrong && echo qemu:00112233445566778899aabbccddeeff > wrong/keys.psk; "+
			"! qemu-img%s info --object tls-creds-psk,id=c,endpoint=client,dir=wrong --image-opts %s", version, opts)
	}
	sh(t, dir, "! nbdinfo 'nbd+unix:///x?socket=tls.sock' 2>/dev/null")
}

// TestPSKServers has us connect to servers of QEMU and nbdkit by a key.
func TestPSKServers(t *testing.T) {
	for _, server := range []string{
		"qemu-nbd -t -k %[1]s/s -f raw --object tls-creds-psk,id=t,endpoint=server,dir=%[1]s --tls-creds t %[1]s/disk",
		"qemu-nbd10 -t -k %[1]s/s -f raw --object tls-creds-psk,id=t,endpoint=server,dir=%[1]s --tls-creds t %[1]s/disk",
		"nbdkit -f -U %[1]s/s --tls=require --tls-psk=%[1]s/keys.psk memory 1M",
	} {
		name, _, _ := strings.Cut(server, " ")
		t.Run(name, func(t *testing.T) {
			need(t, name)
			dir := t.TempDir()
			writeKeys(t, dir)
			sh(t, dir, "truncate -s 1M disk")
			cmd := exec.Command("bash", "-c", "exec "+fmt.Sprintf(server, dir))
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}()
			for _, username := range []string{"qemu", "alice"} {
				end := types.QCryptoTLSCredsEndpointClient
				p := &types.TlsCredsPskProperties{Username: &username}
				p.Dir, p.Endpoint = &dir, &end
				creds, err := tlscreds.NewPSK(p)
				if err != nil {
					t.Fatal(err)
				}
				listExports(t, filepath.Join(dir, "s"), creds)
			}
		})
	}
}

// listExports asks a server for TLS, and what it has.
func listExports(t *testing.T, socket string, creds *tlscreds.PSK) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	nc, err := net.Dial("unix", socket)
	for err != nil && time.Now().Before(deadline) { // it starts
		<-time.After(5 * time.Millisecond)
		nc, err = net.Dial("unix", socket)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	_ = nc.SetDeadline(deadline)
	if _, err := io.CopyN(io.Discard, nc, 18); err != nil { // the greeting
		t.Fatal(err)
	}
	option := func(nc net.Conn, b []byte, opt uint32) nbdwire.OptReply {
		t.Helper()
		if _, err := nc.Write(nbdwire.AppendOption(b, opt, nil)); err != nil {
			t.Fatal(err)
		}
		head := make([]byte, 20)
		if _, err := io.ReadFull(nc, head); err != nil {
			t.Fatal(err)
		}
		r, err := nbdwire.ParseOptReply(head)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := option(nc, []byte{0, 0, 0, 3}, nbdwire.OptStartTLS); r.Type != nbdwire.RepAck {
		t.Fatalf("TLS is answered by %#x", r.Type)
	}
	c, err := creds.Client(nc, "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if r := option(c, nil, nbdwire.OptList); r.Type != nbdwire.RepServer && r.Type != nbdwire.RepAck {
		t.Errorf("a list is answered by %#x", r.Type)
	}
}
