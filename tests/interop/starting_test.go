package interop

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// TestSignalWhileStarting: what the start waits for (a client, storage that does not answer) does
// not keep the daemon from ending.
func TestSignalWhileStarting(t *testing.T) {
	for what, args := range map[string][]string{
		"a client":                     {"--chardev", "socket,id=w,path=w.sock,server=on,wait=on"},
		"the other end of a FIFO":      {"--blockdev", "file,node-name=f,filename=fifo,read-only=on"},
		"an image in JSON on the FIFO": {"--blockdev", `{"driver": "raw", "node-name": "r", "read-only": true, "file": {"driver": "file", "filename": "fifo"}}`},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
				t.Fatal(err)
			}
			// Whether the signal comes while it waits or just before, it ends.
			cmd := exec.Command(daemon.Binary(t), append([]string{"--chardev", "socket,id=first,path=first.sock,server=on,wait=on", "--pidfile", "pid"}, args...)...)
			cmd.Dir = dir
			log, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() }).Stop()
			lines := bufio.NewScanner(log)
			if !lines.Scan() || !strings.Contains(lines.Text(), "waiting for connection") {
				t.Fatalf("%q", lines.Text())
			}
			c, err := net.Dial("unix", filepath.Join(dir, "first.sock"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if what == "a client" && !lines.Scan() {
				t.Fatal("it does not wait for the second")
			}
			_ = cmd.Process.Signal(syscall.SIGTERM)
			for lines.Scan() {
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("SIGTERM while it waits for %s: %v", what, err)
			}
			left, _ := filepath.Glob(filepath.Join(dir, "*"))
			if len(left) != 1 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestPtyIsNamed: who starts the daemon is told which terminal it has got.
func TestPtyIsNamed(t *testing.T) {
	cmd := exec.Command(daemon.Binary(t), "--chardev", "pty,id=p", "--chardev", "socket,id=w,path=w.sock,server=on,wait=on")
	cmd.Dir = t.TempDir()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() }).Stop()
	lines := bufio.NewScanner(out)
	lines.Scan()
	if !regexp.MustCompile(`^char device redirected to /dev/pts/\d+ \(label p\)$`).MatchString(lines.Text()) {
		t.Errorf("it says %q", lines.Text())
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestPidfileIsFIFO: a pidfile that is no file is refused at once, as are devices, and stays.
func TestPidfileIsFIFO(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(daemon.Binary(t), "--pidfile", fifo)
	defer time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() }).Stop()
	out, err := cmd.CombinedOutput()
	if want := "qblockd: cannot create PID file: Could not create '" + fifo + "': No such device or address\n"; string(out) != want || err == nil {
		t.Errorf("%v, %q, want %q", err, out, want)
	}
	if _, err := os.Lstat(fifo); err != nil {
		t.Error(err)
	}
}
