package tlspsk

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// GnuTLS is what QEMU and libnbd have TLS of.

func program(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("NOT TESTED WITH GNUTLS: %v", err)
	}
}

const withPSK = ":+ECDHE-PSK:+DHE-PSK:+PSK"

// priorities are what GnuTLS may be told to negotiate, and what comes of it.
var priorities = []struct {
	name, words, suite string
	group              uint16
}{
	{"what QEMU says", "NORMAL" + withPSK, suites[0].name, 0x1d},
	{"ChaCha20", "NORMAL:-CIPHER-ALL:+CHACHA20-POLY1305" + withPSK, suites[1].name, 0x1d},
	{"P-256", "NORMAL:-GROUP-ALL:+GROUP-SECP256R1" + withPSK, suites[0].name, 0x17},
	// A client has a share of the first of these groups alone.
	{"retry", "NORMAL:-GROUP-ALL:+GROUP-SECP384R1:+GROUP-SECP256R1" + withPSK, suites[0].name, 0x17},
	{"TLS 1.3 only", "NORMAL:-VERS-ALL:+VERS-TLS1.3" + withPSK, suites[0].name, 0x1d},
}

// TestGnuTLSClients has GnuTLS connect to us.
func TestGnuTLSClients(t *testing.T) {
	program(t, "gnutls-cli")
	for _, p := range priorities {
		t.Run(p.name, func(t *testing.T) {
			server, out, end := gnutlsClient(t, p.words, hex.EncodeToString(testKey), "hello\n^rekey^\nhello again\n")
			if err := server.Handshake(); err != nil {
				t.Fatal(err, out)
			}
			if server.Peer() != "qemu" || server.Suite() != p.suite || server.group != p.group {
				t.Errorf("%q has %s, group %x", server.Peer(), server.Suite(), server.group)
			}
			key := bytes.Clone(server.in.secret)
			b := make([]byte, len("hello\nhello again\n"))
			if _, err := io.ReadFull(server, b); err != nil || string(b) != "hello\nhello again\n" {
				t.Errorf("got %q, %v", b, err)
			}
			if bytes.Equal(key, server.in.secret) {
				t.Error("the client has not taken another key")
			}
			if _, err := server.Write([]byte("good bye\n")); err != nil { // under another key, as it was asked
				t.Error(err)
			}
			server.Close()
			end()
			if !strings.Contains(out.String(), "good bye\n- Peer has closed the GnuTLS connection") {
				t.Errorf("the client says %s", out)
			}
		})
	}
	t.Run("wrong key", func(t *testing.T) {
		server, out, end := gnutlsClient(t, "NORMAL"+withPSK, strings.Repeat("ab", 16), "")
		if err := server.Handshake(); !isLocal(err, DecryptError) {
			t.Error(err)
		}
		server.Close()
		if end(); !strings.Contains(out.String(), "alert has been received") {
			t.Errorf("the client says %s", out)
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		server, _, end := gnutlsClient(t, "NORMAL:-VERS-TLS1.3"+withPSK, hex.EncodeToString(testKey), "")
		if err := server.Handshake(); !isLocal(err, ProtocolVersion) {
			t.Error(err)
		}
		server.Close()
		end()
	})
}

// gnutlsClient has GnuTLS connect. end waits for it.
func gnutlsClient(t *testing.T, priority, key, input string) (server *Conn, out *bytes.Buffer, end func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	cmd := exec.Command("gnutls-cli", "--inline-commands", "--priority", priority, "--pskusername", "qemu", "--pskkey", key,
		"-p", port, "127.0.0.1")
	in, err := cmd.StdinPipe() // stays open: the client is to end with the connection
	if err != nil {
		t.Fatal(err)
	}
	out = &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() {
		_ = cmd.Wait()
		in.Close()
	}
	_, _ = io.WriteString(in, input)
	_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute))
	nc, err := l.Accept()
	if err != nil {
		_ = cmd.Process.Kill()
		end()
		t.Fatal(err, out)
	}
	_ = nc.SetDeadline(time.Now().Add(time.Minute))
	return Server(nc, serverConfig()), out, end
}

// TestGnuTLSServers has us connect to GnuTLS.
func TestGnuTLSServers(t *testing.T) {
	program(t, "gnutls-serv")
	keys := filepath.Join(t.TempDir(), "keys.psk")
	if err := os.WriteFile(keys, fmt.Appendf(nil, "qemu:%x\n", testKey), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range priorities {
		t.Run(p.name, func(t *testing.T) {
			addr := gnutlsServer(t, p.words, keys)
			client := dial(t, addr, clientConfig())
			if err := client.Handshake(); err != nil {
				t.Fatal(err)
			}
			if client.Suite() != p.suite || client.group != p.group {
				t.Errorf("got %s, group %x", client.Suite(), client.group)
			}
			client.maxRecords = 2
			for range 5 {
				if _, err := client.Write([]byte("hello\n")); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, len("hello\n"))
				if _, err := io.ReadFull(client, b); err != nil || string(b) != "hello\n" {
					t.Fatalf("got %q, %v", b, err)
				}
			}
			wrong := dial(t, addr, Config{Identity: "qemu", Key: []byte("another")})
			if err := wrong.Handshake(); !told(err) {
				t.Errorf("with another key: %v", err)
			}
		})
	}
}

// gnutlsServer has GnuTLS listen, and give back what it gets, until the end of the test.
func gnutlsServer(t *testing.T, priority, keys string) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr = l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command("gnutls-serv", "--echo", "--priority", priority, "--pskpasswd", keys, "-p", port)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return addr
}

func dial(t *testing.T, addr string, c Config) *Conn {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		nc, err := net.Dial("tcp", addr)
		if err == nil {
			_ = nc.SetDeadline(end)
			conn := Client(nc, c)
			t.Cleanup(func() { conn.Close() })
			return conn
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
		<-time.After(5 * time.Millisecond) // it starts
	}
}
