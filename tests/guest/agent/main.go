package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sort"
	"strings"
	"syscall"
	"unsafe"
)

// Command is what the test asks for.
type Command struct {
	Do     string // see commands
	Seed   uint64
	Ops    int64 // await: operations
	Size   int64 // grown: bytes
	Device string
}

// Answer is what the test gets.
type Answer struct {
	Err    string   `json:",omitempty"`
	Faults []string `json:",omitempty"` // what differs from what was written
	Ops    int64    // operations since the load was started
	Wait   int64    // longest request since the last answer, in ns
	What   string   // what took that long
	Pause  int64    // longest time since the last answer in which nothing ran, in ns
	Size   int64    // of the disk, in bytes
	// Features are the bits that the drivers of the disks and the test's end have agreed on, Queues
	// how many rings the disk has.
	Features, Queues int64
}

func main() {
	err := prepare()
	line, e := openLine("/dev/ttyS1")
	if e != nil {
		halt(e)
	}
	a := agent{line: json.NewEncoder(line)}
	go a.meter.watch()
	a.answer(err)
	in := bufio.NewReader(line)
	for {
		b, err := in.ReadBytes('\n')
		if err != nil {
			halt(err)
		}
		var c Command
		if err = json.Unmarshal(b, &c); err == nil {
			err = a.carryOut(&c)
		}
		a.answer(err)
	}
}

// halt ends the machine: without its first process the kernel would panic.
func halt(err error) {
	fmt.Println("agent:", err)
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// agent is what the test talks to.
type agent struct {
	line  *json.Encoder
	disk  *disk
	meter meter
	loads []load
}

// load writes and checks until it is told to end.
type load interface {
	run()
	// end waits until run has ended and checks all that it has written.
	end() error
}

func (a *agent) answer(err error) {
	r := Answer{Faults: a.meter.faults()}
	a.meter.take(&r)
	if a.disk != nil {
		r.Size, _ = a.disk.size()
		r.Features, r.Queues = a.disk.agreed()
	}
	if err != nil {
		r.Err = err.Error()
	}
	_ = a.line.Encode(&r)
}

func (a *agent) carryOut(c *Command) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v\n%s", p, debug.Stack())
		}
	}()
	switch c.Do {
	case "format":
		a.disk = &disk{path: c.Device}
		return a.disk.format()
	case "load":
		return a.start(c.Seed)
	case "await":
		return a.meter.await(c.Ops)
	case "grown":
		return a.disk.grown(c.Size)
	case "check":
		return a.stop()
	case "off":
		halt(nil)
	}
	return fmt.Errorf("unknown command %q", c.Do)
}

// start begins to write.
func (a *agent) start(seed uint64) error {
	p, err := newPages(a.disk.part(2), seed, &a.meter)
	if err != nil {
		return err
	}
	a.loads = []load{p, newFiles(a.disk.mounted(), seed, &a.meter)}
	for _, l := range a.loads {
		l.run()
	}
	return nil
}

// stop ends all writing, and checks what is on the disk.
func (a *agent) stop() error {
	a.meter.stop()
	for _, l := range a.loads {
		if err := l.end(); err != nil {
			return err
		}
	}
	return nil
}

// prepare makes a system of what the kernel has started.
func prepare() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		_ = os.Mkdir(m[1], 0o755)
		if err := syscall.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("%s: %w", m[1], err)
		}
	}
	modules, err := filepath.Glob("/modules/*")
	if err != nil {
		return err
	}
	sort.Strings(modules)
	for _, m := range modules {
		if err := loadModule(m); err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
	}
	return nil
}

// loadModule gives the kernel a driver.
func loadModule(path string) error {
	const finitModule, compressed = 313, 4
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := uintptr(0)
	if !strings.HasSuffix(path, ".ko") {
		flags = compressed
	}
	none := []byte{0}
	_, _, e := syscall.Syscall(finitModule, f.Fd(), uintptr(unsafe.Pointer(&none[0])), flags)
	if e != 0 && e != syscall.EEXIST {
		return e
	}
	return nil
}

// openLine opens a serial line that carries bytes as they are.
func openLine(path string) (*os.File, error) {
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	var t syscall.Termios
	if err := ioctl(fd, syscall.TCGETS, unsafe.Pointer(&t)); err != nil {
		return nil, err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = t.Cflag&^(syscall.CSIZE|syscall.PARENB) | syscall.CS8 | syscall.CREAD | syscall.CLOCAL
	t.Cc[syscall.VMIN], t.Cc[syscall.VTIME] = 1, 0
	if err := ioctl(fd, syscall.TCSETS, unsafe.Pointer(&t)); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), req, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}
