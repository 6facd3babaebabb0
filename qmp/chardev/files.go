package chardev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// fdStream is the one client of a device made of files. When its input ends its output stays
// open: somebody may be reading a log of events.
type fdStream struct {
	in, out *os.File // in may be nil, or the same as out
	once    sync.Once
	restore func() // nil: nothing to do
}

func (s *fdStream) Read(b []byte) (int, error) {
	if s.in == nil {
		return 0, io.EOF
	}
	return s.in.Read(b)
}

func (s *fdStream) Write(b []byte) (int, error) { return s.out.Write(b) }

// Lingers tells that the output is open when the input has ended.
func (s *fdStream) Lingers() bool { return true }

func (s *fdStream) Close() error {
	s.once.Do(func() {
		if s.restore != nil {
			s.restore()
		}
		if s.in != nil && s.in != s.out {
			s.in.Close()
		}
		s.out.Close()
	})
	return nil
}

// newStream makes a device that has its one client, s, from the start.
func newStream(f *front, name string, s io.ReadWriteCloser) device {
	f.spawn(func() { f.serve(s) })
	return &plain{f, name}
}

// openHost opens a file of the host for a device, non-blocking so that a goroutine that
// reads it can be stopped.
func openHost(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|syscall.O_NONBLOCK, 0o666)
	if err != nil {
		return nil, fmt.Errorf("Could not open '%s': %s", path, blk.ErrnoText(err))
	}
	return f, nil
}

// outputFlags opens a file to be written from its end on, or anew.
func outputFlags(appendTo *bool) int {
	if types.Or(appendTo, false) {
		return os.O_WRONLY | os.O_CREATE | os.O_APPEND
	}
	return os.O_WRONLY | os.O_CREATE | os.O_TRUNC
}

func openFile(o *types.ChardevFile, f *front) (device, error) {
	out, err := openHost(o.Out, outputFlags(o.Append))
	if err != nil {
		return nil, err
	}
	s := &fdStream{out: out}
	if o.In != nil {
		if s.in, err = openHost(*o.In, os.O_RDONLY); err != nil {
			out.Close()
			return nil, err
		}
	}
	return newStream(f, "file", s), nil
}

// openPipe opens PATH.in and PATH.out, or PATH for both directions.
func openPipe(o *types.ChardevHostdev, f *front) (device, error) {
	in, inErr := openHost(o.Device+".in", os.O_RDWR)
	out, outErr := openHost(o.Device+".out", os.O_RDWR)
	if inErr != nil || outErr != nil {
		if inErr == nil {
			in.Close()
		}
		if outErr == nil {
			out.Close()
		}
		both, err := openHost(o.Device, os.O_RDWR)
		if err != nil {
			return nil, err
		}
		in, out = both, both
	}
	return newStream(f, "pipe", &fdStream{in: in, out: out}), nil
}

// stdioUsed says that a device has standard input and output.
var stdioUsed struct {
	sync.Mutex
	taken bool
}

func (t *Table) openStdio(o *types.ChardevStdio, f *front) (device, error) {
	if t.opts.Detached {
		return nil, errors.New("cannot use stdio with -daemonize")
	}
	stdioUsed.Lock()
	defer stdioUsed.Unlock()
	if stdioUsed.taken {
		return nil, errors.New("cannot use stdio by multiple character devices")
	}
	in, undoIn, err := reopen(0, os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("Failed to set FD nonblocking: %s", blk.ErrnoText(err))
	}
	out, undoOut, err := reopen(1, os.O_WRONLY)
	if err != nil {
		undoIn()
		in.Close()
		return nil, fmt.Errorf("Failed to set FD nonblocking: %s", blk.ErrnoText(err))
	}
	undoTerminal := rawTerminal(0, types.Or(o.Signal, true))
	stdioUsed.taken = true
	return newStream(f, "stdio", &fdStream{in: in, out: out, restore: func() {
		undoTerminal()
		undoIn()
		undoOut()
		stdioUsed.Lock()
		stdioUsed.taken = false
		stdioUsed.Unlock()
	}}), nil
}

// reopen makes a file of a standard descriptor that never blocks a thread. Terminals and pipes
// are opened anew, since non-blocking mode would otherwise hit everybody who shares them (our
// own error output, the shell); where that cannot be, undo ends that mode again.
func reopen(fd, flags int) (f *os.File, undo func(), err error) {
	undo = func() {}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return nil, nil, err
	}
	path := fmt.Sprintf("/proc/self/fd/%d", fd)
	kind := st.Mode & syscall.S_IFMT
	if kind == syscall.S_IFCHR || kind == syscall.S_IFIFO {
		if f, err := os.OpenFile(path, flags|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0); err == nil {
			return f, undo, nil
		}
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, nil, err
	}
	if kind != syscall.S_IFREG {
		old, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err == nil && old&syscall.O_NONBLOCK == 0 {
			err = syscall.SetNonblock(fd, true)
			undo = func() { _ = syscall.SetNonblock(fd, false) }
		}
		if err != nil {
			syscall.Close(dup)
			return nil, nil, err
		}
	}
	return os.NewFile(uintptr(dup), path), undo, nil
}

// onFD calls do with the descriptor of f.
func onFD(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = do(int(fd)) }); err == nil {
		err = cerr
	}
	return err
}

// makeRaw takes line editing, echo and conversions of input off a terminal's settings.
func makeRaw(t *unix.Termios, signals bool) {
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.IEXTEN
	if !signals {
		t.Lflag &^= unix.ISIG
	}
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
}

// rawTerminal prepares the terminal fd for a monitor whose input comes key by key. If it is
// one, it is as before after undo. A monitor echoes, so what is typed stays visible.
func rawTerminal(fd int, signals bool) (undo func()) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return func() {}
	}
	now := *old
	if !signals {
		now.Lflag &^= unix.ISIG
	}
	_ = unix.IoctlSetTermios(fd, unix.TCSETS, &now)
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) }
}
