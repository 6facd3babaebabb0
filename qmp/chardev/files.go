package chardev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"unsafe"

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

// files is a device that has its one client from the start.
type files struct {
	*front
	name string // what filename shows
}

func (d *files) filename() string { return d.name }
func (d *files) close()           { d.end() }

func newFiles(f *front, name string, s *fdStream) device {
	d := &files{front: f, name: name}
	f.spawn(func() { f.serve(s) })
	return d
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

func openFile(o *types.ChardevFile, f *front) (device, error) {
	flags := os.O_WRONLY | os.O_CREATE
	if o.Append != nil && *o.Append {
		flags |= os.O_APPEND
	} else {
		flags |= os.O_TRUNC
	}
	out, err := openHost(o.Out, flags)
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
	return newFiles(f, "file", s), nil
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
	return newFiles(f, "pipe", &fdStream{in: in, out: out}), nil
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
	undoTerminal := rawTerminal(0, o.Signal == nil || *o.Signal)
	stdioUsed.taken = true
	return newFiles(f, "stdio", &fdStream{in: in, out: out, restore: func() {
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
	dup, err := dupCloexec(fd)
	if err != nil {
		return nil, nil, err
	}
	if kind != syscall.S_IFREG {
		old, err := fcntl(fd, syscall.F_GETFL, 0)
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

func fcntl(fd, cmd, arg int) (int, error) {
	r, _, e := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), uintptr(cmd), uintptr(arg))
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

func dupCloexec(fd int) (int, error) { return fcntl(fd, syscall.F_DUPFD_CLOEXEC, 3) }

func ioctl(fd int, req uint, arg unsafe.Pointer) error {
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

// makeRaw takes line editing, echo and conversions of input off a terminal's settings.
func makeRaw(t *syscall.Termios, signals bool) {
	t.Iflag &^= syscall.IGNBRK | syscall.BRKINT | syscall.PARMRK | syscall.ISTRIP |
		syscall.INLCR | syscall.IGNCR | syscall.ICRNL | syscall.IXON
	t.Lflag &^= syscall.ECHO | syscall.ECHONL | syscall.ICANON | syscall.IEXTEN
	if !signals {
		t.Lflag &^= syscall.ISIG
	}
	t.Cflag = t.Cflag&^(syscall.CSIZE|syscall.PARENB) | syscall.CS8
	t.Cc[syscall.VMIN], t.Cc[syscall.VTIME] = 1, 0
}

// rawTerminal prepares the terminal fd for a monitor whose input comes key by key. If it is
// one, it is as before after undo. A monitor echoes, so what is typed stays visible.
func rawTerminal(fd int, signals bool) (undo func()) {
	var old syscall.Termios
	if ioctl(fd, syscall.TCGETS, unsafe.Pointer(&old)) != nil {
		return func() {}
	}
	now := old
	if !signals {
		now.Lflag &^= syscall.ISIG
	}
	_ = ioctl(fd, syscall.TCSETS, unsafe.Pointer(&now))
	return func() { _ = ioctl(fd, syscall.TCSETS, unsafe.Pointer(&old)) }
}
