package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Process is a program that was started.
type Process struct {
	Cmd  *exec.Cmd
	done chan struct{}
}

// Launch starts cmd.
func Launch(cmd *exec.Cmd) (*Process, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{Cmd: cmd, done: make(chan struct{})}
	go func() { _ = cmd.Wait(); close(p.done) }()
	return p, nil
}

// WaitFor waits for a file that shows that the process is up, for at most limit.
func (p *Process) WaitFor(file string, limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			return nil
		}
		switch {
		case p.Ended(0):
			return fmt.Errorf("%s ended: %v", p.Cmd.Path, p.Cmd.ProcessState)
		case time.Now().After(end):
			return fmt.Errorf("%s does not come up", p.Cmd.Path)
		}
	}
}

// Ended waits for the end of the process for at most limit and tells whether it came.
func (p *Process) Ended(limit time.Duration) bool {
	select {
	case <-p.done:
		return true
	default:
	}
	select {
	case <-p.done:
		return true
	case <-time.After(limit):
		return false
	}
}

// Kill ends the process, if it is still there.
func (p *Process) Kill() {
	_ = p.Cmd.Process.Kill()
	<-p.done
}

// Memory is a line of /proc/PID/status that is about memory, in bytes: VmRSS, VmHWM, VmSize.
func (p *Process) Memory(field string) (n int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), field+":")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		return 0, fmt.Errorf("%s of a process that has ended: %w", field, err)
	}
	return n << 10, nil
}
