package tlspsk

import (
	"bytes"
	"encoding/hex"
	"io"
	"net"
	"os/exec"
	"testing"
	"time"
)

// OpenSSL shares nothing with GnuTLS, and asks for cookies.

// opensslServers are what s_server may be told, and which group comes of it.
var opensslServers = []struct {
	name  string
	args  []string
	group uint16
}{
	{"plain", nil, 0x1d},
	{"retry", []string{"-groups", "P-256"}, 0x17},
	{"cookie", []string{"-stateless"}, 0x1d},
	{"cookie and retry", []string{"-stateless", "-groups", "P-256"}, 0x17},
	{"ChaCha20", []string{"-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"}, 0x1d},
}

// TestOpenSSLServers has us connect to OpenSSL.
func TestOpenSSLServers(t *testing.T) {
	program(t, "openssl")
	for _, x := range opensslServers {
		t.Run(x.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := l.Addr().String()
			l.Close()
			cmd := exec.Command("openssl", append([]string{"s_server", "-accept", addr, "-nocert", "-tls1_3", "-rev", "-quiet",
				"-psk_identity", "qemu", "-psk", hex.EncodeToString(testKey)}, x.args...)...)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			end := func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
			defer end()
			client := dial(t, addr, clientConfig())
			if err := client.Handshake(); err != nil {
				end()
				t.Fatalf("%v\n%s", err, &out)
			}
			if client.group != x.group {
				t.Errorf("got group %x", client.group)
			}
			client.maxRecords = 2
			for range 5 {
				if _, err := client.Write([]byte("hello\n")); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, len("olleh\n"))
				if _, err := io.ReadFull(client, b); err != nil || string(b) != "olleh\n" {
					t.Fatalf("got %q, %v", b, err)
				}
			}
		})
	}
}

// TestOpenSSLClients has OpenSSL connect to us.
func TestOpenSSLClients(t *testing.T) {
	program(t, "openssl")
	for _, x := range []struct {
		name  string
		args  []string
		suite *suite
		group uint16
	}{
		{"plain", nil, suites[0], 0x1d},
		// A client has a share of the first of these groups alone.
		{"retry", []string{"-groups", "P-384:P-256"}, suites[0], 0x17},
		{"ChaCha20", []string{"-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"}, suites[1], 0x1d},
	} {
		t.Run(x.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			cmd := exec.Command("openssl", append([]string{"s_client", "-connect", l.Addr().String(), "-quiet", "-tls1_3",
				"-psk_identity", "qemu", "-psk", hex.EncodeToString(testKey)}, x.args...)...)
			var out, log bytes.Buffer
			cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader([]byte("hello\n")), &out, &log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute))
			nc, err := l.Accept()
			if err != nil {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
				t.Fatal(err, &log)
			}
			_ = nc.SetDeadline(time.Now().Add(time.Minute))
			server := Server(nc, serverConfig())
			b := make([]byte, len("hello\n"))
			if _, err := io.ReadFull(server, b); err != nil || string(b) != "hello\n" {
				t.Errorf("got %q, %v", b, err)
			}
			if server.Peer() != "qemu" || server.Suite() != x.suite.name || server.group != x.group {
				t.Errorf("%q has %s, group %x", server.Peer(), server.Suite(), server.group)
			}
			if _, err := server.Write([]byte("good bye\n")); err != nil {
				t.Error(err)
			}
			server.Close()
			if err := cmd.Wait(); err != nil || out.String() != "good bye\n" {
				t.Errorf("the client ends with %v, and got %q\n%s", err, &out, &log)
			}
		})
	}
}
