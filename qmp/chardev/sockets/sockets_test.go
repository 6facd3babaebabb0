package sockets

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	mode := func() os.FileMode {
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Mode()
	}
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	l, _, err := ListenUnix(UnixAddr{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	if mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v", mode())
	}
	// A socket in the way is replaced; closing the first listener then leaves the second's alone.
	syscall.Umask(0o077)
	l2, _, err := ListenUnix(UnixAddr{Path: path, Mode: 0o666})
	if err != nil {
		t.Fatal(err)
	}
	if mode() != os.ModeSocket|0o666 {
		t.Errorf("mode %v", mode())
	}
	l.Close()
	mode()
	l2.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	os.WriteFile(path, []byte("data"), 0o600)
	for _, c := range []struct{ path, want string }{
		{path, "Failed to bind socket to " + path + ": Address already in use"},
		{dir, "Failed to unlink socket " + dir + ": Is a directory"},
		{"/nonexistent-dir/x", "Failed to bind socket to /nonexistent-dir/x: No such file or directory"},
		{strings.Repeat("x", 109), "UNIX socket path '" + strings.Repeat("x", 109) + "' is too long"},
	} {
		if _, _, err := ListenUnix(UnixAddr{Path: c.path}); err == nil || err.Error() != c.want {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
	for _, padded := range []bool{false, true} {
		l, _, err := ListenUnix(UnixAddr{Path: "qblockd-test" + filepath.Base(dir), Abstract: true, Padded: padded})
		if err != nil {
			t.Fatal(err)
		}
		// Package net cannot say an address of full length.
		if !padded {
			nc, err := net.Dial("unix", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			nc.Close()
		}
		l.Close()
	}
}

// An address may be filled to the last byte, by a path or an abstract name; an empty path stands
// for a new file.
func TestLengths(t *testing.T) {
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	t.Setenv("TMPDIR", dir)
	at := func(n int) string { return dir + "/" + strings.Repeat("s", n-len(dir)-1) }
	for _, a := range []UnixAddr{
		{Path: at(107)}, {Path: at(108)}, {Path: ""}, {Path: "@/../" + at(90)},
		{Path: strings.Repeat("n", 106), Abstract: true}, {Path: strings.Repeat("n", 107), Abstract: true},
		{Path: strings.Repeat("m", 50), Abstract: true, Padded: true},
	} {
		if a.Path != "" && a.Path[0] == '@' {
			t.Chdir(dir)
			a.Path = "@name"
		}
		l, path, err := ListenUnix(a)
		if err != nil {
			t.Errorf("%+v: %v", a, err)
			continue
		}
		got := make(chan error, 1)
		go func() {
			c, err := l.Accept()
			if err == nil {
				_, err = c.Write([]byte("hello"))
				c.Close()
			}
			got <- err
		}()
		a.Path = path
		c, err := DialUnix(a)
		if err != nil {
			t.Fatalf("%+v: %v", a, err)
		}
		if p, err := io.ReadAll(c); string(p) != "hello" || err != nil {
			t.Errorf("%+v: %q %v", a, p, err)
		}
		if err := <-got; err != nil {
			t.Error(err)
		}
		c.Close()
		l.Close()
		if _, err := os.Lstat(path); !a.Abstract && !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	for _, a := range []UnixAddr{{Path: at(109)}, {Path: strings.Repeat("n", 108), Abstract: true}} {
		_, _, err := ListenUnix(a)
		_, err2 := DialUnix(a)
		for _, err := range []error{err, err2} {
			var h interface{ Hint() string }
			if err == nil || err.Error() != "UNIX socket path '"+a.Path+"' is too long" || !errors.As(err, &h) ||
				h.Hint() != map[bool]string{false: "Path must be less than 108 bytes", true: "Path must be less than 107 bytes"}[a.Abstract] {
				t.Errorf("%v", err)
			}
		}
	}
	if _, err := DialUnix(UnixAddr{}); err == nil || err.Error() != "Failed to connect to '': Connection refused" {
		t.Error(err)
	}
}

// The file goes also where the directory was changed meanwhile.
func TestRelativePath(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	l, _, err := ListenUnix(UnixAddr{Path: "s"})
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir("/")
	l.Close()
	if _, err := os.Lstat(filepath.Join(dir, "s")); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

// counter counts the lines of a log.
type counter int

func (c *counter) Write(p []byte) (int, error) { *c++; return len(p), nil }

// Who cannot accept logs a line now and then, and pauses longer and longer, but not for long.
func TestTrouble(t *testing.T) {
	var lines counter
	log := slog.New(slog.NewTextHandler(&lines, nil))
	var x Trouble
	var sum, most time.Duration
	for range 100 {
		d := x.Failed(log, "cannot accept", syscall.EMFILE)
		sum, most = sum+d, max(most, d)
	}
	if lines != 1 || most > time.Second || sum < 50*time.Second {
		t.Errorf("%d lines, pauses of %v in all, at most %v", lines, sum, most)
	}
	if x.Over(); x.Failed(log, "cannot accept", syscall.EMFILE) > 100*time.Millisecond {
		t.Error("a new trouble begins with a long pause")
	}
}

// TestSeldom: the first is told, the others are counted until the next may be told.
func TestSeldom(t *testing.T) {
	var out strings.Builder
	log := slog.New(slog.NewTextHandler(&out, nil))
	var s Seldom
	for range 5 {
		s.Log(log, slog.LevelInfo, "refused", "before", "uid", 7)
	}
	if n := strings.Count(out.String(), "refused"); n != 1 || strings.Contains(out.String(), "before") {
		t.Errorf("%d lines: %s", n, out.String())
	}
	s.mu.Lock()
	s.last = s.last.Add(-quietFor)
	s.mu.Unlock()
	if s.Log(log, slog.LevelInfo, "refused", "before"); !strings.Contains(out.String(), "before=4") {
		t.Error(out.String())
	}
	s.mu.Lock()
	s.last = s.last.Add(-quietFor)
	s.mu.Unlock()
	out.Reset()
	if s.Log(log, slog.LevelInfo, "refused", "before"); strings.Contains(out.String(), "before") {
		t.Error(out.String())
	}
}
