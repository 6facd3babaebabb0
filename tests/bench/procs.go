package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"qblockd/tests/daemon"
)

// tmpfsMagic is the f_type of memory file systems (statfs(2)).
const tmpfsMagic = 0x01021994

// begin finds the programs and makes the folders.
func (b *bench) begin() error {
	b.started = time.Now()
	for _, p := range []string{qsd, qsd10, nbdkit, qemuNBD, "qemu-img"} {
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
	*daemon.Process
	side   string
	dir    string // its sockets
	stderr bytes.Buffer
	mon    []string // monitor sockets; the last is for us
	nbd    string   // NBD socket
	q      *monitor
}

// launch starts a server with a folder for its sockets, of which argv is told, and waits for a file
// there that shows that it is up.
func (b *bench) launch(side, up string, argv func(p *proc) []string) (*proc, error) {
	p := &proc{side: side}
	var err error
	if p.dir, err = os.MkdirTemp(b.shm, "d"); err != nil {
		return nil, err
	}
	p.nbd = filepath.Join(p.dir, "nbd")
	args := argv(p)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = &p.stderr
	if p.Process, err = daemon.Launch(cmd); err != nil {
		return nil, errors.Join(err, os.RemoveAll(p.dir))
	}
	b.procs = append(b.procs, p)
	if err := p.WaitFor(filepath.Join(p.dir, up), 20*time.Second); err != nil {
		b.stop(p)
		return nil, fmt.Errorf("%w\n%s", err, p.stderr.Bytes())
	}
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
	p, err := b.launch(side, "pid", func(p *proc) []string {
		argv := []string{b.program(side)}
		for i := range monitors + 1 {
			p.mon = append(p.mon, filepath.Join(p.dir, "m"+strconv.Itoa(i)))
			argv = append(argv, "--chardev", fmt.Sprintf("socket,id=c%d,path=%s,server=on,wait=off", i, p.mon[i]),
				"--monitor", fmt.Sprintf("chardev=c%d", i))
		}
		argv = append(argv, "--nbd-server", "addr.type=unix,addr.path="+p.nbd)
		return append(append(argv, args...), "--pidfile", filepath.Join(p.dir, "pid"))
	})
	if err != nil {
		return nil, err
	}
	// QEMU may mishandle a client that comes while it starts.
	for try := 0; ; try++ {
		if p.q, err = dialMonitor(p.mon[monitors]); err == nil {
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
	return b.launch(side, "nbd", func(p *proc) []string {
		if side == qemuNBD {
			return []string{qemuNBD, "-t", "-e", "16", "-x", exportName, "-k", p.nbd, "--image-opts",
				"driver=raw,file.driver=file,file.locking=off,file.filename=" + path}
		}
		return []string{nbdkit, "-f", "-U", p.nbd, "file", path}
	})
}

// stop ends p; killing it if it does not want to.
func (b *bench) stop(p *proc) {
	if p.q != nil {
		p.q.close()
	}
	_ = p.Cmd.Process.Signal(syscall.SIGTERM)
	if !p.Ended(5 * time.Second) {
		p.Kill()
	}
	os.RemoveAll(p.dir)
	b.procs = slices.DeleteFunc(b.procs, func(x *proc) bool { return x == p })
}

func (b *bench) stopAll() {
	for len(b.procs) > 0 {
		b.stop(b.procs[0])
	}
}

// rss is the resident memory of p, KiB.
func (p *proc) rss() (float64, error) {
	n, err := p.Memory("VmRSS")
	return float64(n) / 1024, err
}

// cpu is the processor time of p so far, in seconds.
func (p *proc) cpu() (float64, error) {
	var ts syscall.Timespec
	clock := ^uintptr(p.Cmd.Process.Pid)<<3 | 2 // CPUCLOCK_SCHED of a process, see clock_getcpuclockid(3)
	if _, _, e := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clock, uintptr(unsafe.Pointer(&ts)), 0); e != 0 {
		return 0, e
	}
	return float64(ts.Nano()) / 1e9, nil
}
