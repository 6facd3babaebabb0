package guest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
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

// device is how the guest sees the disk.
type device struct {
	queues                   int
	packed, indirect, events bool
}

func (d device) String() string {
	return fmt.Sprintf("num-queues=%d,packed=%s,indirect_desc=%s,event_idx=%s",
		d.queues, onOff(d.packed), onOff(d.indirect), onOff(d.events))
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// Feature bits of virtio. Source: virtio 1.2, Reserved Feature Bits.
const (
	featureIndirect = 1 << 28
	featureEventIdx = 1 << 29
	featurePacked   = 1 << 34
)

// features are the bits that d stands for.
func (d device) features() (f int64) {
	for bit, on := range map[int64]bool{featureIndirect: d.indirect, featureEventIdx: d.events, featurePacked: d.packed} {
		if on {
			f |= bit
		}
	}
	return f
}

// accel is what the guest runs by. A machine that is virtual itself may have a /dev/kvm by which no
// guest gets anywhere.
func accel() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !regexp.MustCompile(`\b(vmx|svm)\b`).Match(info) {
		return "tcg,thread=multi"
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg,thread=multi"
	}
	f.Close()
	return "kvm"
}

// machine is a guest.
type machine struct {
	t       *testing.T
	p       *daemon.Process
	stderr  bytes.Buffer
	console string // file with what the kernel says
	line    net.Conn
	in      *bufio.Reader
}

// patience bounds each answer of the guest: those that come after a load of its own choice, on a
// machine without KVM.
const patience = 5 * time.Minute

// What each guest has.
const (
	memory  = 384 // MiB
	cmdline = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"
)

// arguments are those of a machine that runs by QEMU alone, above a vhost-user back end.
func (r *round) arguments(m *machine, line string, d device) []string {
	size := fmt.Sprintf("%dM", memory)
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", accel(), "-cpu", "max", "-smp", fmt.Sprint(max(2, d.queues)), "-m", size, // a processor uses one queue
		"-object", "memory-backend-memfd,id=mem,share=on,size=" + size, "-machine", "q35,memory-backend=mem",
		"-kernel", r.kernel.image, "-initrd", r.initrd, "-append", cmdline,
		"-chardev", "file,id=console,path=" + m.console, "-serial", "chardev:console",
		"-chardev", "socket,id=line,path=" + line, "-serial", "chardev:line",
		"-chardev", "socket,id=disk,reconnect=1,path=" + r.h.socket(),
		"-device", "vhost-user-blk-pci,chardev=disk," + d.String(),
	}
}

// launch starts a machine whose second serial line is to be connected to the socket line, and waits
// until its agent is there.
func launch(t *testing.T, command func(m *machine, line string) *exec.Cmd) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, console: filepath.Join(dir, "console")}
	l, err := net.Listen("unix", filepath.Join(dir, "line"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := command(m, l.Addr().String())
	cmd.Stdout, cmd.Stderr = &m.stderr, &m.stderr
	if m.p, err = daemon.Launch(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.end)
	_ = l.(*net.UnixListener).SetDeadline(time.Now().Add(patience))
	go func() { // who waits for a machine that has failed does not wait long
		for !m.p.Ended(time.Minute) {
		}
		l.Close()
	}()
	if m.line, err = l.Accept(); err != nil {
		t.Fatalf("the machine does not start: %v", err)
	}
	m.in = bufio.NewReader(m.line)
	m.answer("boot")
	return m
}

// end ends the machine without asking it, and tells what it said if the test has failed. What runs
// it may have to end another process, too.
func (m *machine) end() {
	_ = m.p.Cmd.Process.Signal(syscall.SIGTERM)
	if !m.p.Ended(20 * time.Second) {
		m.p.Kill()
	}
	if m.line != nil {
		m.line.Close()
	}
	if m.t.Failed() {
		b, _ := os.ReadFile(m.console)
		m.t.Logf("QEMU said:\n%s\nthe kernel said:\n%s", m.stderr.String(), b[max(0, len(b)-4000):])
	}
}

// command and answer are those of the agent.
type command struct {
	Do     string
	Seed   uint64 `json:",omitempty"`
	Ops    int64  `json:",omitempty"`
	Size   int64  `json:",omitempty"`
	Device string `json:",omitempty"`
}

type answer struct {
	Err              string
	Faults           []string
	Ops, Wait, Pause int64
	Size             int64
	What             string
	Features, Queues int64
}

// do has the agent carry c out.
func (m *machine) do(c command) answer {
	m.t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.line.Write(append(b, '\n')); err != nil {
		m.t.Fatal(err)
	}
	return m.answer(c.Do)
}

// answer waits for what the agent says about a command; what is wrong ends the test.
func (m *machine) answer(what string) (a answer) {
	m.t.Helper()
	_ = m.line.SetReadDeadline(time.Now().Add(patience))
	b, err := m.in.ReadBytes('\n')
	if err != nil {
		m.t.Fatalf("%s: the guest does not answer: %v", what, err)
	}
	if err := json.Unmarshal(b, &a); err != nil {
		m.t.Fatalf("%s: %q: %v", what, b, err)
	}
	if a.Err != "" || len(a.Faults) > 0 {
		m.t.Fatalf("%s: %s\n%s", what, a.Err, strings.Join(a.Faults, "\n"))
	}
	return a
}

// off ends the guest as its user would.
func (m *machine) off() {
	m.t.Helper()
	if _, err := fmt.Fprintln(m.line, `{"Do":"off"}`); err != nil {
		m.t.Fatal(err)
	}
	if !m.p.Ended(patience) {
		m.t.Fatal("the machine does not end")
	}
}
