package chardev

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// unwanted requires that the other end closes c without having said anything.
func unwanted(t *testing.T, c net.Conn) {
	t.Helper()
	_, _ = io.WriteString(c, "hello\n") // it may be closed already
	if b, _ := io.ReadAll(c); len(b) > 0 {
		t.Errorf("a client that is not wanted gets %q", b)
	}
}

// TestAllowUID: processes of the users that are named are served, others are sent away, also such
// as came before there was a user.
func TestAllowUID(t *testing.T) {
	me := uint32(os.Getuid())
	for _, more := range []string{"", `,"telnet":true`, `,"logfile":"log"`} {
		t.Chdir(t.TempDir())
		tab := newTestTable(t)
		open := func(id string) {
			t.Helper()
			conf := backend(t, `{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"%s"}},"wait":false%s}}`, id, more)
			if _, err := tab.Add(t.Context(), id, conf); err != nil {
				t.Fatal(err)
			}
		}
		open("mine")
		open("others")
		early := dial(t, "unix", "others")
		if err := tab.AttachFor("mine", []uint32{me + 1, me}, echo); err != nil {
			t.Fatal(err)
		}
		if err := tab.AttachFor("others", []uint32{me + 1}, echo); err != nil {
			t.Fatal(err)
		}
		if err := tab.AttachFor("others", []uint32{me}, echo); err == nil || err.Error() != "Device 'others' is in use" {
			t.Errorf("a second user: %v", err)
		}
		c := dial(t, "unix", "mine")
		if more == `,"telnet":true` {
			if _, err := io.ReadFull(c, make([]byte, len(telnetHello))); err != nil {
				t.Fatal(err)
			}
			continue // it is told how to talk before it is looked at
		}
		exchange(t, c, "hello")
		unwanted(t, early)
		unwanted(t, dial(t, "unix", "others"))
	}
}

// TestAllowNobody has a list without users.
func TestAllowNobody(t *testing.T) {
	t.Chdir(t.TempDir())
	tab := newTestTable(t)
	if _, err := tab.Add(t.Context(), "m", backend(t,
		`{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"m"}},"wait":false}}`)); err != nil {
		t.Fatal(err)
	}
	if err := tab.AttachFor("m", []uint32{}, echo); err != nil {
		t.Fatal(err)
	}
	unwanted(t, dial(t, "unix", "m"))
}

// TestAllowUIDOfOthers has processes of several users, as far as a thread is one.
func TestAllowUIDOfOthers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("NOT TESTED: only root can be somebody else")
	}
	name := filepath.Base(t.TempDir()) + fmt.Sprint(os.Getpid())
	tab := newTestTable(t)
	if _, err := tab.Add(t.Context(), "m", backend(t, `{"type":"socket","data":{"wait":false,
		"addr":{"type":"unix","data":{"path":"%s","abstract":true,"tight":true}}}}`, name)); err != nil {
		t.Fatal(err)
	}
	if err := tab.AttachFor("m", []uint32{1234}, echo); err != nil {
		t.Fatal(err)
	}
	dialAs := func(uid int) net.Conn {
		made := make(chan net.Conn, 1)
		go func() {
			runtime.LockOSThread() // for good: the thread ends with the goroutine
			defer close(made)
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				return
			}
			f := os.NewFile(uintptr(fd), "client")
			defer f.Close()
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); e != 0 {
				t.Error(e)
				return
			}
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: "@" + name}); err != nil {
				t.Error(err)
				return
			}
			c, err := net.FileConn(f)
			if err != nil {
				t.Error(err)
				return
			}
			made <- c
		}()
		c := <-made
		if c == nil {
			t.FailNow()
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	exchange(t, dialAs(1234), "hello")
	unwanted(t, dialAs(1235))
	unwanted(t, dialAs(0)) // root is a user like others
	exchange(t, dialAs(1234), "hello again")
}

// TestAllowUIDNeedsUnix: devices whose clients have no user refuse to tell them apart.
func TestAllowUIDNeedsUnix(t *testing.T) {
	tab := newTestTable(t)
	for id, conf := range map[string]string{
		"inet": `{"type":"socket","data":{"addr":{"type":"inet","data":{"host":"127.0.0.1","port":"0"}},"wait":false}}`,
		"null": `{"type":"null","data":{}}`,
		"pty":  `{"type":"pty","data":{}}`,
	} {
		if _, err := tab.Add(t.Context(), id, backend(t, "%s", conf)); err != nil {
			t.Fatal(err)
		}
		want := "'allow-uid' needs a character device that listens on a unix socket, which '" + id + "' does not"
		if err := tab.AttachFor(id, []uint32{0}, echo); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if err := tab.AttachFor("no", []uint32{0}, echo); err == nil || err.Error() != `chardev "no" not found` {
		t.Error(err)
	}
}
