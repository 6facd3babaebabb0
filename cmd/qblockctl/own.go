package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// own is a daemon that this program has started for itself, to work on files that no running daemon
// has open. It ends with this program, however that ends.
type own struct {
	*client
	events *eventQueue
	cmd    *exec.Cmd
	over   chan struct{} // closed when the daemon has ended
}

// daemonPath is where the daemon's program is: $QBLOCKD, or beside this one, or in the path.
func daemonPath() (string, error) {
	if p := os.Getenv("QBLOCKD"); p != "" {
		return p, nil
	}
	if self, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(self), "qblockd")
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	p, err := exec.LookPath("qblockd")
	if err != nil {
		return "", errors.New("qblockd, which does the work, is neither beside qblockctl nor in the path; $QBLOCKD may name it")
	}
	return p, nil
}

// startOwn starts a daemon with one monitor, which this program alone is connected to.
func startOwn(ctx context.Context) (*own, error) {
	path, err := daemonPath()
	if err != nil {
		return nil, err
	}
	ends, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	mine, theirs := os.NewFile(uintptr(ends[0]), "monitor"), os.NewFile(uintptr(ends[1]), "monitor")
	defer mine.Close()
	defer theirs.Close()
	o := &own{events: newEventQueue(), over: make(chan struct{})}
	o.cmd = exec.Command(path, "--chardev", "socket,id=ctl,fd=3", "--monitor", "chardev=ctl")
	o.cmd.ExtraFiles, o.cmd.Stderr = []*os.File{theirs}, logs{os.Stderr}
	// Ctrl-C is for this program, which ends the daemon in order.
	o.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	go func() {
		// The signal comes when the thread ends that has started the process.
		runtime.LockOSThread()
		defer close(o.over)
		err := o.cmd.Start()
		started <- err
		if err == nil {
			_ = o.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("qblockd cannot be started: %w", err)
	}
	conn, err := net.FileConn(mine)
	if err == nil {
		o.client, err = negotiate(ctx, conn, path, o.events.put)
	}
	if err != nil {
		o.end()
		return nil, err
	}
	return o, nil
}

// logs passes on what the daemon logs that is of interest to whoever runs the command.
type logs struct{ out io.Writer }

// Write implements io.Writer; the daemon writes whole records.
func (l logs) Write(b []byte) (int, error) {
	for line := range bytes.Lines(b) {
		var rec struct{ Level, Msg string }
		switch {
		case json.Unmarshal(line, &rec) != nil:
			_, _ = l.out.Write(line)
		case rec.Level != "INFO" && rec.Level != "DEBUG":
			fmt.Fprintln(l.out, "qblockd:", printable(rec.Msg))
		}
	}
	return len(b), nil
}

// end ends the daemon, which writes everything down first, and waits for that.
func (o *own) end() {
	_ = o.cmd.Process.Signal(syscall.SIGTERM)
	<-o.over
	if o.client != nil {
		o.close()
	}
}

// imageFormat tells the format of an image file by how it begins, as far as that makes a difference
// here.
func imageFormat(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var head [8]byte
	if n, _ := f.Read(head[:]); n == len(head) && string(head[:4]) == "QFI\xfb" && head[7] >= 2 {
		return "qcow2", nil
	}
	return "raw", nil
}

// runJob executes command, which starts the job id, and waits until the job is over. It returns the
// job as it is then; it is dismissed. If ctx ends the job is cancelled.
func runJob(
	ctx context.Context, c *client, events *eventQueue, command, id string, args map[string]any,
) (*jobResult, error) {
	args["job-id"] = id
	if _, err := c.execute(ctx, command, args); err != nil {
		return nil, err
	}
	for {
		jobs, err := query[[]jobResult](context.WithoutCancel(ctx), c, "query-jobs", nil)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(jobs, func(j jobResult) bool { return j.ID == id })
		if i < 0 {
			return nil, fmt.Errorf("somebody has dismissed the job '%s'", id)
		}
		if jobs[i].Status == "concluded" {
			_, err := c.execute(context.WithoutCancel(ctx), "job-dismiss", map[string]any{"id": id})
			return &jobs[i], err
		}
		select {
		case <-events.wake:
		case <-time.After(time.Second): // an event may have come before its job was looked for
		case <-ctx.Done():
			_, _ = c.execute(context.WithoutCancel(ctx), "job-cancel", map[string]any{"id": id})
			return nil, ctx.Err()
		}
	}
}

// jobResult is what query-jobs shows of a job that is over.
type jobResult struct {
	jobInfo
	Check *imageCheck `json:"x-qblockd-check"`
}

const passwordUsage = "`FILE` with the password of an encrypted image; not for --node, which has it"

// unlock has the definition of an encrypted image name a secret with what is in a file, unless that
// is "".
func (o *own) unlock(ctx context.Context, node map[string]any, password string) error {
	if password == "" {
		return nil
	}
	path, err := filepath.Abs(password)
	if err != nil {
		return err
	}
	if _, err := o.execute(ctx, "object-add", map[string]any{"qom-type": "secret", "id": "password", "file": path}); err != nil {
		return err
	}
	if node["driver"] == "qcow2" {
		node["encrypt"] = map[string]any{"format": "luks", "key-secret": "password"}
	} else {
		node["key-secret"] = "password"
	}
	return nil
}
