package hostile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/tests/daemon"
)

// Limits are what the daemon has to keep to.
type Limits struct {
	Memory   int64         // resident bytes at most
	Space    int64         // of address space: what lies above ends the process
	Deadline time.Duration // of a command or request
	Patience time.Duration // after which a client leaves, and its command is to end
	// Reference compares what is read with what qemu-img reads.
	Reference bool
}

// server is a daemon with a healthy disk that somebody works on all the time.
type server struct {
	*daemon.Process
	limits Limits
	dir    string // of the sockets, the healthy disk and folder canary
	log    *os.File
	logged int64 // of the log has been looked at

	// Count is told of what a case has done.
	count func(what string)

	stop    atomic.Bool
	wait    sync.WaitGroup
	mu      sync.Mutex
	trouble string // what the client of the healthy disk met with
}

func (s *server) nbd() string  { return filepath.Join(s.dir, "nbd.sock") }
func (s *server) qmp() string  { return filepath.Join(s.dir, "qmp.sock") }
func (s *server) work() string { return filepath.Join(s.dir, "case") }

// newServer prepares dir and starts the daemon bin in it.
func newServer(bin, dir string, limits Limits) (*server, error) {
	s := &server{limits: limits, dir: dir}
	pid := filepath.Join(dir, "pid")
	for _, d := range []string{s.work(), filepath.Join(dir, "canary")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	healthy := NewBase(Spec{Version: 3, ClusterBits: 16, Order: 4, Size: 1 << 20})
	err := errors.Join(healthy.WriteTo(filepath.Join(dir, "healthy.qcow2")), layCanaries(filepath.Join(dir, "canary")))
	if err != nil {
		return nil, err
	}
	for _, f := range []string{s.nbd(), s.qmp(), pid} {
		_ = os.Remove(f)
	}
	if s.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		return nil, err
	}
	cmd := exec.Command("sh", "-c", fmt.Sprintf(`ulimit -v %d; ulimit -c 0; exec "$0" "$@"`, limits.Space>>10), bin,
		"--pidfile", "../pid", "--nbd-server", "addr.type=unix,addr.path="+s.nbd(),
		"--chardev", "socket,id=mon,server=on,wait=off,path="+s.qmp(), "--monitor", "mon",
		"--blockdev", "file,node-name=healthyfile,filename=../healthy.qcow2", "--blockdev", "qcow2,node-name=healthy,file=healthyfile",
		"--export", "nbd,id=healthy,node-name=healthy,writable=on")
	cmd.Dir, cmd.Stderr = s.work(), s.log
	if s.Process, err = daemon.Launch(cmd); err != nil {
		return nil, err
	}
	if err := s.WaitFor(pid, limits.Deadline); err != nil {
		s.Kill()
		err = fmt.Errorf("%w: %s", err, s.said())
		s.kill()
		return nil, err
	}
	s.wait.Go(s.guest)
	return s, nil
}

func (s *server) kill() {
	s.stop.Store(true)
	s.Kill()
	s.wait.Wait()
	s.log.Close()
}

// quit ends the daemon in order and tells whether it did.
func (s *server) quit() bool {
	s.stop.Store(true)
	s.wait.Wait()
	_ = s.Cmd.Process.Signal(syscall.SIGTERM)
	ok := s.Ended(s.limits.Deadline)
	s.kill()
	return ok && s.Cmd.ProcessState.ExitCode() == 0
}

// guest works on the healthy disk.
func (s *server) guest() {
	report := func(format string, args ...any) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.trouble == "" && !s.Ended(0) {
			s.trouble = fmt.Sprintf(format, args...)
		}
	}
	n, err := daemon.DialNBD(s.nbd(), "healthy")
	if err != nil {
		report("cannot connect: %v", err)
		return
	}
	defer n.Drop()
	q, err := daemon.DialQMP(s.qmp(), time.Now().Add(s.limits.Deadline))
	if err != nil {
		report("no monitor: %v", err)
		return
	}
	defer q.Close()
	r := rand.New(rand.NewPCG(1, 2))
	var have [64]byte
	buf := make([]byte, 4096)
	for i := 0; !s.stop.Load(); i++ {
		began := time.Now()
		n.SetDeadline(began.Add(s.limits.Deadline))
		q.SetDeadline(began.Add(s.limits.Deadline))
		at := r.IntN(len(have))
		var err error
		switch i % 8 {
		case 0, 1, 2:
			have[at] = byte(r.Uint32()) | 1
			err = n.WriteAt(bytes.Repeat(have[at:at+1], 4096), int64(at)*4096*3)
		case 3:
			err = n.Flush()
		case 4:
			_, err = q.Do("query-block-exports", nil)
		default:
			err = n.ReadAt(buf, int64(at)*4096*3)
			if err == nil && have[at] != 0 && bytes.Count(buf, have[at:at+1]) != len(buf) {
				report("reads something else than was written")
				return
			}
		}
		if err != nil && !s.stop.Load() {
			// A daemon that is going down takes a moment.
			if !s.Ended(time.Second) {
				report("after %v: %v", time.Since(began).Round(time.Millisecond), err)
			}
			return
		}
		time.Sleep(2 * time.Millisecond) // the pace of a guest that does not want the whole machine
	}
}

// troubled returns what the guest of the healthy disk met with.
func (s *server) troubled() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trouble
}

// peak is the most memory that was resident since calm, in bytes; 0 of one that has ended.
func (s *server) peak() int64 {
	n, _ := s.Memory("VmHWM")
	return n
}

// calm makes peak count from now on.
func (s *server) calm() {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.Cmd.Process.Pid), []byte("5"), 0o600)
}

// said returns what the daemon has logged since the last time.
func (s *server) said() string {
	b, err := io.ReadAll(io.NewSectionReader(s.log, s.logged, 4<<20))
	if err != nil && !errors.Is(err, os.ErrClosed) {
		return err.Error()
	}
	s.logged += int64(len(b))
	return string(b)
}

var (
	// cause is the line that says why the process ended, or that a panic was caught.
	cause   = regexp.MustCompile(`(?m)^(panic: |fatal error: |runtime: |SIG|unexpected fault).*$`)
	numbers = regexp.MustCompile(`0x[0-9a-f]+|\d+`)
	// frame is a function of ours on a stack.
	frame = regexp.MustCompile(`(?m)^qblockd/([^\s(]*(?:\(\*?\w+\))?[^\s(]*)\(`)
)

// diagnosis makes one line of a log that tells of a panic; "" if it does not.
func diagnosis(log string) string {
	i := strings.Index(log, "panic")
	if m := cause.FindStringIndex(log); m != nil {
		i = m[0]
	} else if k := strings.Index(log, "panic: "); k >= 0 {
		i = k
	}
	if i < 0 {
		return ""
	}
	line, rest, _ := strings.Cut(log[i:], "\n")
	line = numbers.ReplaceAllString(strings.TrimSuffix(line, " [recovered, repanicked]"), "N")
	line = line[:min(len(line), 160)]
	if m := frame.FindStringSubmatch(rest); m != nil {
		line += " in " + m[1]
	}
	return line
}

// layCanaries makes the files that no image may change, in a folder that images may name.
func layCanaries(dir string) error {
	write := func(name string, b []byte) error {
		return os.WriteFile(filepath.Join(dir, name), b, 0o600)
	}
	dirty := NewBase(Spec{Version: 3, ClusterBits: 12, Order: 4, Size: 2 << 20, Lazy: true, Dirty: true, Bitmaps: true})
	_ = os.Remove(filepath.Join(dir, "fifo"))
	err := errors.Join(write("secret", bytes.Repeat([]byte("secret\n"), 1000)), write("raw", make([]byte, 64<<10)), write("log", make([]byte, 64<<10)),
		NewBase(Spec{Version: 3, ClusterBits: 12, Order: 4, Size: 2 << 20}).WriteTo(filepath.Join(dir, "disk.qcow2")),
		dirty.WriteTo(filepath.Join(dir, "dirty.qcow2")), syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	if err != nil {
		return err
	}
	list, err := os.ReadDir(dir)
	for _, e := range list {
		if err == nil {
			err = os.Chtimes(filepath.Join(dir, e.Name()), long, long)
		}
	}
	return err
}

// long ago: what was written to since shows it.
var long = time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)

// changed returns the name of a file in dir that was written to, or is gone or new; known are how
// many there are.
func changed(dir string, known int) string {
	list, err := os.ReadDir(dir)
	if err != nil {
		return err.Error()
	}
	for _, e := range list {
		if i, err := e.Info(); err != nil || !i.ModTime().Equal(long) {
			return e.Name()
		}
	}
	if len(list) != known {
		return fmt.Sprintf("%d files instead of %d", len(list), known)
	}
	return ""
}
