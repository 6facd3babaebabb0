package chardev

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/schema/types"
	"qblockd/schema/value"
)

func newTestTable(t *testing.T) *Table {
	tab := NewTable(Options{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	t.Cleanup(tab.Close)
	return tab
}

// backend decodes a ChardevBackend as a client would give it.
func backend(t *testing.T, format string, args ...any) *types.ChardevBackend {
	t.Helper()
	v, err := value.Parse(fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	b, err := types.DecodeChardevBackend(v, 0)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// echo answers each line with the same line.
func echo(c io.ReadWriteCloser) {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
}

func exchange(t *testing.T, c io.ReadWriter, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text+"\n"); err != nil {
		t.Fatal(err)
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if err != nil || got != text+"\n" {
		t.Fatalf("got %q, %v", got, err)
	}
}

func dial(t *testing.T, network, address string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: " + what)
		}
	}
}

// names is what the table shows, newest first.
func names(tab *Table) string {
	var all []string
	for _, i := range tab.Query() {
		all = append(all, fmt.Sprintf("%s=%s/%v", i.Label, i.Filename, i.FrontendOpen))
	}
	return strings.Join(all, " ")
}

func TestUnixServer(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	conf := backend(t, `{"type":"socket","data":{"addr":{"type":"unix","data":{"path":%q}},"wait":false}}`, path)
	tab := newTestTable(t)
	// A file is left alone; a socket that nobody listens on any more is replaced.
	if err := os.WriteFile(path, []byte("a disk"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Add(context.Background(), "m", conf); err == nil ||
		err.Error() != "Failed to add chardev 'm': Failed to bind socket to "+path+": Address already in use" {
		t.Fatalf("on a file: %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "a disk" {
		t.Fatalf("the file: %q, %v", b, err)
	}
	os.Remove(path)
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	if _, err := tab.Add(context.Background(), "m", conf); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("%v, %v", st.Mode(), err)
	}
	if got, want := names(tab), "m=disconnected:unix:"+path+",server=on/false"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if err := tab.Attach("m", echo); err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("m", echo); err == nil || err.Error() != "Device 'm' is in use" {
		t.Errorf("second user: %v", err)
	}
	clients := make([]net.Conn, 5)
	for i := range clients {
		clients[i] = dial(t, "unix", path)
	}
	for i, c := range clients {
		exchange(t, c, fmt.Sprint("hello ", i))
	}
	if got, want := names(tab), "m=unix:"+path+",server=on/true"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for _, c := range clients {
		c.Close()
	}
	eventually(t, "all to be gone", func() bool { return strings.Contains(names(tab), "disconnected:") })
	last := dial(t, "unix", path)
	exchange(t, last, "again")
	tab.Close()
	if _, err := last.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("socket left: %v", err)
	}
}

// A client that comes before there is a user waits for it; the mode can be chosen.
func TestEarlyClient(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "s")
	tab := NewTable(Options{SocketMode: 0o660})
	defer tab.Close()
	b := backend(t, `{"type":"socket","data":{"addr":{"type":"unix","data":{"path":%q}},"wait":true}}`, path)
	opened := make(chan error)
	go func() {
		_, err := tab.Open(context.Background(), "m", b, CommandLine)
		opened <- err
	}()
	eventually(t, "the socket", func() bool { st, err := os.Stat(path); return err == nil && st.Mode().Perm() == 0o660 })
	var c net.Conn
	eventually(t, "listening", func() bool {
		var err error
		c, err = net.Dial("unix", path)
		return err == nil
	})
	defer c.Close()
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("m", echo); err != nil {
		t.Fatal(err)
	}
	exchange(t, c, "early")
}

// Waiting for the first client ends with the context, and leaves nothing.
func TestWaitCancelled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	tab := newTestTable(t)
	ctx, cancel := context.WithCancel(context.Background())
	opened := make(chan error)
	go func() {
		_, err := tab.Open(ctx, "m", backend(t, `{"type":"socket","data":{"addr":{"type":"unix","data":{"path":%q}},"wait":true}}`, path), Monitor)
		opened <- err
	}()
	eventually(t, "the socket", func() bool { _, err := os.Stat(path); return err == nil })
	cancel()
	if err := <-opened; err == nil {
		t.Fatal("opened")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) || names(tab) != "" {
		t.Errorf("left: %v, %s", err, names(tab))
	}
}

func TestClient(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tab := newTestTable(t)
	if _, err := tab.Add(context.Background(), "c", backend(t, `{"type":"socket","data":{"addr":{"type":"unix","data":{"path":%q}},"server":false}}`, path)); err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("c", echo); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, c, "hello")
	if got := names(tab); got != "c=unix:/true" {
		t.Error(got)
	}
	c.Close()
	eventually(t, "disconnection", func() bool { return names(tab) == "c=disconnected:unix:"+path+"/true" })
}

func TestReconnect(t *testing.T) {
	for _, option := range []string{`"reconnect":1`, `"reconnect-ms":20`} {
		t.Run(option, func(t *testing.T) { testReconnect(t, option) })
	}
}

func testReconnect(t *testing.T, option string) {
	path := filepath.Join(t.TempDir(), "s")
	tab := newTestTable(t)
	if _, err := tab.Add(context.Background(), "c", backend(t, `{"type":"socket","data":{"addr":{"type":"unix","data":{"path":%q}},"server":false,%s}}`, path, option)); err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("c", echo); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 2 {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, "hello")
		c.Close()
	}
}

func TestInet(t *testing.T) {
	tab := newTestTable(t)
	if _, err := tab.Add(context.Background(), "i", backend(t, `{"type":"socket","data":{"addr":{"type":"inet","data":{"host":"127.0.0.1","port":"0"}},"telnet":true}}`)); err != nil {
		t.Fatal(err)
	}
	name := names(tab)
	var port int
	if n, _ := fmt.Sscanf(name, "i=disconnected:telnet:127.0.0.1:%d,server=on/false", &port); n != 1 {
		t.Fatal(name)
	}
	if err := tab.Attach("i", echo); err != nil {
		t.Fatal(err)
	}
	c := dial(t, "tcp", fmt.Sprint("127.0.0.1:", port))
	hello := make([]byte, len(telnetHello))
	if _, err := io.ReadFull(c, hello); err != nil || string(hello) != string(telnetHello) {
		t.Fatalf("%v, %v", hello, err)
	}
	if _, err := c.Write([]byte{'a', iac, do, 1, 'b', iac, 241, iac}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte{iac, 'c', '\n'}); err != nil {
		t.Fatal(err)
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if err != nil || got != "ab\xffc\n" {
		t.Errorf("%q, %v", got, err)
	}
	want := fmt.Sprintf("i=telnet:127.0.0.1:%d,server=on <-> %s/true", port, c.LocalAddr())
	if got := names(tab); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestFdSocket(t *testing.T) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	tab := newTestTable(t)
	if _, err := tab.Open(context.Background(), "f", backend(t, `{"type":"socket","data":{"addr":{"type":"fd","data":{"str":"%d"}},"server":false}}`, fds[0]), CommandLine); err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("f", echo); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "peer")
	defer f.Close()
	exchange(t, f, "over a descriptor")
}

func TestPtyPipeFile(t *testing.T) {
	dir := t.TempDir()
	tab := newTestTable(t)
	log := filepath.Join(dir, "log")
	ret, err := tab.Add(context.Background(), "t", backend(t, `{"type":"pty","data":{"logfile":%q}}`, log))
	if err != nil {
		t.Skipf("SKIPPED: no pseudo terminals: %v", err)
	}
	if got := names(tab); ret.Pty == nil || got != "t=pty:"+*ret.Pty+"/false" {
		t.Fatal(got)
	}
	if err := tab.Attach("t", echo); err != nil {
		t.Fatal(err)
	}
	for range 2 { // one client after the other
		f, err := os.OpenFile(*ret.Pty, os.O_RDWR|syscall.O_NOCTTY, 0)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, f, "on a terminal")
		f.Close()
	}
	if b, err := os.ReadFile(log); err != nil || !strings.HasPrefix(string(b), "on a terminal\n") {
		t.Errorf("log: %q, %v", b, err)
	}

	pipe := filepath.Join(dir, "p")
	for _, end := range []string{".in", ".out"} {
		if err := syscall.Mkfifo(pipe+end, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tab.Add(context.Background(), "p", backend(t, `{"type":"pipe","data":{"device":%q}}`, pipe)); err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("p", echo); err != nil {
		t.Fatal(err)
	}
	in, err := os.OpenFile(pipe+".in", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(pipe+".out", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	exchange(t, struct {
		io.Reader
		io.Writer
	}{out, in}, "through a pipe")

	inFile, outFile := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	if err := os.WriteFile(inFile, []byte("one\ntwo\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Add(context.Background(), "f", backend(t, `{"type":"file","data":{"in":%q,"out":%q}}`, inFile, outFile)); err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("f", echo); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the copy", func() bool { b, _ := os.ReadFile(outFile); return string(b) == "one\ntwo\n" })
}

// TestErrors has QEMU's words.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	tab := newTestTable(t)
	unix := func(path, more string) string {
		return fmt.Sprintf(`{"type":"socket","data":{"addr":{"type":"unix","data":{"path":%q}}%s}}`, path, more)
	}
	inet := func(addr, more string) string {
		return fmt.Sprintf(`{"type":"socket","data":{"addr":{"type":"inet","data":{%s}}%s}}`, addr, more)
	}
	long := "/tmp/" + strings.Repeat("x", 120)
	for in, want := range map[string]string{
		unix(dir+"/no", `,"server":false`):                                                       "Failed to connect to '" + dir + "/no': No such file or directory",
		unix(dir+"/no", `,"server":false,"reconnect":-1`):                                        "Failed to connect to '" + dir + "/no': No such file or directory",
		unix(dir+"/no/s", ""):                                                                    "Failed to bind socket to " + dir + "/no/s: No such file or directory",
		unix(long, ""):                                                                           "UNIX socket path '" + long + "' is too long",
		unix("", `,"server":false`):                                                              "Failed to connect to '': Connection refused",
		unix("w", `,"server":false,"wait":true`):                                                 "'wait' option is incompatible with socket in client connect mode",
		unix("w", `,"reconnect":1`):                                                              "'reconnect' option is incompatible with socket in server listen mode",
		unix("w", `,"reconnect-ms":1`):                                                           "'reconnect-ms' option is incompatible with socket in server listen mode",
		unix("w", `,"server":false,"reconnect":0,"reconnect-ms":0`):                              "'reconnect' and 'reconnect-ms' are mutually exclusive",
		inet(`"host":"127.0.0.1","port":"1"`, `,"server":false`):                                 "Failed to connect to '127.0.0.1:1': Connection refused",
		inet(`"host":"127.0.0.1","port":"abc"`, ``):                                              "address resolution failed for 127.0.0.1:abc: Servname not supported for ai_socktype",
		inet(`"host":"127.0.0.1","port":"0","ipv4":false,"ipv6":false`, ""):                      "Cannot disable IPv4 and IPv6 at same time",
		`{"type":"socket","data":{"addr":{"type":"fd","data":{"str":"9"}}}}`:                     "only QEMU supports file descriptor passing",
		`{"type":"socket","data":{"addr":{"type":"fd","data":{"str":"9"}},"reconnect":1}}`:       "'reconnect' option is incompatible with 'fd' address type",
		fmt.Sprintf(`{"type":"file","data":{"out":%q}}`, dir+"/no/x"):                            "Could not open '" + dir + "/no/x': No such file or directory",
		fmt.Sprintf(`{"type":"pipe","data":{"device":%q}}`, dir+"/no"):                           "Could not open '" + dir + "/no': No such file or directory",
		fmt.Sprintf(`{"type":"null","data":{"logfile":%q}}`, dir+"/no/x"):                        "Could not create '" + dir + "/no/x': No such file or directory",
		`{"type":"mux","data":{"chardev":"nope"}}`:                                               "mux: base chardev nope not found",
		`{"type":"udp","data":{"remote":{"type":"inet","data":{"host":"127.0.0.1","port":""}}}}`: "remote port not specified",
		`{"type":"udp","data":{"remote":{"type":"unix","data":{"path":"/x"}}}}`:                  "socket type unsupported for datagram",
		`{"type":"serial","data":{"device":"/nope"}}`:                                            "Could not open '/nope': No such file or directory",
		`{"type":"parallel","data":{"device":"/nope"}}`:                                          "Could not open '/nope': No such file or directory",
		`{"type":"parallel","data":{"device":"/dev/null"}}`:                                      "not a parallel port: Inappropriate ioctl for device",
		`{"type":"ringbuf","data":{"size":3}}`:                                                   "size of ringbuf chardev must be power of two",
		`{"type":"ringbuf","data":{"size":-9223372036854775808}}`:                                "size of ringbuf chardev must be power of two",
		`{"type":"ringbuf","data":{"size":4611686018427387904}}`:                                 "size of ringbuf chardev must be at most 67108864",
	} {
		_, err := tab.Add(context.Background(), "x", backend(t, "%s", in))
		if err == nil || err.Error() != "Failed to add chardev 'x': "+want {
			t.Errorf("%s: %v, want %s", in, err, want)
		}
	}
	null := backend(t, `{"type":"null","data":{}}`)
	if _, err := tab.Add(context.Background(), "n", null); err != nil {
		t.Fatal(err)
	}
	_, dup := tab.Add(context.Background(), "n", null)
	_, gone := tab.Change(context.Background(), "y", null)
	_, changed := tab.Change(context.Background(), "n", backend(t, `{"type":"ringbuf","data":{"size":16}}`))
	attach := tab.Attach("n", echo)
	_, used := tab.Change(context.Background(), "n", null)
	for got, want := range map[error]string{
		dup:                            "Chardev with id 'n' already exists",
		gone:                           "Chardev 'y' does not exist",
		tab.Remove("y"):                "Chardev 'y' not found",
		tab.SendBreak("y"):             "Chardev 'y' not found",
		used:                           "Chardev user does not support chardev hotswap",
		tab.Remove("n"):                "Chardev 'n' is busy",
		tab.Attach("y", echo):          `chardev "y" not found`,
		tab.RingbufWrite("y", "", nil): "Device 'y' not found",
	} {
		if got == nil || got.Error() != want {
			t.Errorf("%v, want %s", got, want)
		}
	}
	if changed != nil || attach != nil || names(tab) != "n=ringbuf/true" {
		t.Errorf("%v, %v, %s", changed, attach, names(tab))
	}
}

func TestUDP(t *testing.T) {
	peer, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	spare, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	port := spare.LocalAddr().(*net.UDPAddr).Port
	spare.Close()
	tab := newTestTable(t)
	if _, err := tab.Add(context.Background(), "u", backend(t, `{"type":"udp","data":{
		"remote":{"type":"inet","data":{"host":"127.0.0.1","port":"%d"}},
		"local":{"type":"inet","data":{"host":"127.0.0.1","port":"%d"}}}}`, peer.LocalAddr().(*net.UDPAddr).Port, port)); err != nil {
		t.Fatal(err)
	}
	if err := tab.Attach("u", echo); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.WriteToUDP([]byte("hello\n"), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}); err != nil {
		t.Fatal(err)
	}
	_ = peer.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 100)
	if n, err := peer.Read(buf); err != nil || string(buf[:n]) != "hello\n" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if got := names(tab); got != "u=udp/true" {
		t.Error(got)
	}
}
