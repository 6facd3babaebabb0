package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// tmpfsMagic is the f_type of memory file systems (statfs(2)).
const tmpfsMagic = 0x01021994

// begin finds the programs and makes the folders.
func (b *bench) begin() error {
	b.started = time.Now()
	for _, p := range []string{qsd, nbdkit, qemuNBD, "qemu-img"} {
		if _, err := exec.LookPath(p); err != nil {
			b.absent = append(b.absent, p)
			fmt.Printf("SKIPPED %s: not installed\n", p)
		}
	}
	for _, dir := range []*string{&b.disk, &b.shm} {
		d, err := os.MkdirTemp(*dir, "qblockd-bench-")
		if err != nil {
			b.end()
			return err
		}
		*dir = d
		b.clean = append(b.clean, d)
	}
	if b.qblockd == "" {
		b.qblockd = filepath.Join(b.disk, "qblockd")
		if out, err := exec.CommandContext(b.ctx, "go", "build", "-o", b.qblockd, "qblockd/cmd/qblockd").CombinedOutput(); err != nil {
			b.end()
			return fmt.Errorf("build: %w\n%s", err, out)
		}
	}
	return nil
}

// end stops what still runs and removes the folders.
func (b *bench) end() {
	b.stopAll()
	for _, d := range b.clean {
		os.RemoveAll(d)
	}
}

// folder is where images of a kind lie: "tmpfs" or "disk".
func (b *bench) folder(where string) (string, error) {
	if where == "tmpfs" {
		return b.shm, nil
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(b.disk, &st); err != nil {
		return "", err
	}
	if int64(st.Type) == tmpfsMagic {
		return "", fmt.Errorf("%w: %s is not on a disk (-disk DIR)", errSkip, b.disk)
	}
	return b.disk, nil
}

// proc is a server that runs.
type proc struct {
	side   string
	cmd    *exec.Cmd
	dir    string // its sockets
	stderr bytes.Buffer
	done   chan struct{}
	mon    []string // monitor sockets; the last is for us
	nbd    string   // NBD socket
	q      *monitor
}

func (b *bench) launch(side string, argv []string) (*proc, error) {
	p := &proc{side: side, done: make(chan struct{})}
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stderr = &p.stderr
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	b.procs = append(b.procs, p)
	return p, nil
}

// program is the path of a daemon.
func (b *bench) program(side string) string {
	if side == us {
		return b.qblockd
	}
	return side
}

// daemon starts qblockd or qemu-storage-daemon with monitors for loads, one for us and an NBD
// server, besides args.
func (b *bench) daemon(side string, monitors int, args ...string) (*proc, error) {
	dir, err := os.MkdirTemp(b.shm, "d")
	if err != nil {
		return nil, err
	}
	argv := []string{b.program(side)}
	var mon []string
	for i := range monitors + 1 {
		mon = append(mon, filepath.Join(dir, "m"+strconv.Itoa(i)))
		argv = append(argv, "--chardev", fmt.Sprintf("socket,id=c%d,path=%s,server=on,wait=off", i, mon[i]), "--monitor", fmt.Sprintf("chardev=c%d", i))
	}
	nbd, pid := filepath.Join(dir, "nbd"), filepath.Join(dir, "pid")
	argv = append(argv, "--nbd-server", "addr.type=unix,addr.path="+nbd)
	p, err := b.launch(side, append(append(argv, args...), "--pidfile", pid))
	if err != nil {
		return nil, err
	}
	p.dir, p.mon, p.nbd = dir, mon, nbd
	if err := b.wait(p, pid); err != nil {
		b.stop(p)
		return nil, err
	}
	// QEMU may mishandle a client that comes while it starts.
	for try := 0; ; try++ {
		if p.q, err = dialMonitor(mon[monitors]); err == nil {
			return p, nil
		}
		if try == 20 {
			b.stop(p)
			return nil, fmt.Errorf("monitor: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// server starts nbdkit or qemu-nbd with the raw image at path.
func (b *bench) server(side, path string) (*proc, error) {
	dir, err := os.MkdirTemp(b.shm, "d")
	if err != nil {
		return nil, err
	}
	nbd := filepath.Join(dir, "nbd")
	argv := []string{nbdkit, "-f", "-U", nbd, "file", path}
	if side == qemuNBD {
		argv = []string{qemuNBD, "-t", "-e", "16", "-x", exportName, "-k", nbd, "--image-opts",
			"driver=raw,file.driver=file,file.locking=off,file.filename=" + path}
	}
	p, err := b.launch(side, argv)
	if err != nil {
		return nil, err
	}
	p.dir, p.nbd = dir, nbd
	if err := b.wait(p, nbd); err != nil {
		b.stop(p)
		return nil, err
	}
	return p, nil
}

// wait waits for a file that shows that p is up.
func (b *bench) wait(p *proc, file string) error {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended: %v\n%s", p.side, p.cmd.ProcessState, p.stderr.Bytes())
		case <-b.ctx.Done():
			return b.ctx.Err()
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s does not come up", p.side)
		}
	}
}

// stop ends p; killing it if it does not want to.
func (b *bench) stop(p *proc) {
	if p.q != nil {
		p.q.close()
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	if p.dir != "" {
		os.RemoveAll(p.dir)
	}
	for i, x := range b.procs {
		if x == p {
			b.procs = append(b.procs[:i], b.procs[i+1:]...)
			return
		}
	}
}

func (b *bench) stopAll() {
	for len(b.procs) > 0 {
		b.stop(b.procs[0])
	}
}

// rss is the resident memory of p, KiB.
func (p *proc) rss() (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	f := strings.Fields(rest)
	if len(f) == 0 {
		return 0, fmt.Errorf("%s has no VmRSS", p.side)
	}
	return strconv.ParseFloat(f[0], 64)
}
