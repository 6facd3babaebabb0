// Package daemon runs a freshly built qblockd for tests and talks QMP and NBD to it.
package daemon

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "qblockd-test-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "qblockd")
	if out, err := exec.Command("go", "build", "-o", bin, "qblockd/cmd/qblockd").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return bin, nil
})

// Binary is the path of a qblockd built from the tree under test.
func Binary(t testing.TB) string {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// Daemon is a running qblockd with a monitor.
type Daemon struct {
	*Process
	Dir    string       // its working directory; sockets are here
	Stderr bytes.Buffer // to be read after the end
}

// Start runs qblockd in dir with a monitor and an NBD server besides args, and returns when it is
// up. It is killed at the end of the test if it is still there.
func Start(t testing.TB, dir string, args ...string) *Daemon {
	t.Helper()
	return StartBinary(t, Binary(t), dir, args...)
}

// StartBinary is Start of another daemon than that of the tree under test.
func StartBinary(t testing.TB, bin, dir string, args ...string) *Daemon {
	t.Helper()
	d := &Daemon{Dir: dir}
	all := append([]string{
		"--pidfile", d.Pidfile(), "--nbd-server", "addr.type=unix,addr.path=" + d.NBDSocket(),
		"--chardev", "socket,id=mon,server=on,wait=off,path=" + d.QMPSocket(), "--monitor", "mon",
	}, args...)
	cmd := exec.Command(bin, all...)
	cmd.Dir, cmd.Stderr = dir, &d.Stderr
	var err error
	if d.Process, err = Launch(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Kill()
		if t.Failed() && d.Stderr.Len() > 0 {
			t.Logf("qblockd said:\n%s", d.Stderr.String())
		}
	})
	// The pid file is written when everything is up.
	if err := d.WaitFor(d.Pidfile(), 20*time.Second); err != nil {
		t.Fatal(err)
	}
	return d
}

// QMPSocket, NBDSocket and Pidfile are the files of the daemon.
func (d *Daemon) QMPSocket() string { return filepath.Join(d.Dir, "qmp.sock") }
func (d *Daemon) NBDSocket() string { return filepath.Join(d.Dir, "nbd.sock") }
func (d *Daemon) Pidfile() string   { return filepath.Join(d.Dir, "pid") }

// URI is the address of an export.
func (d *Daemon) URI(export string) string {
	return "nbd+unix:///" + export + "?socket=" + d.NBDSocket()
}

// Stop ends the daemon by SIGTERM and requires exit status 0.
func (d *Daemon) Stop(t testing.TB) {
	t.Helper()
	_ = d.Cmd.Process.Signal(syscall.SIGTERM)
	if !d.Ended(20 * time.Second) {
		t.Fatal("qblockd does not end")
	}
	if code := d.Cmd.ProcessState.ExitCode(); code != 0 {
		t.Fatalf("qblockd ended with %v\n%s", d.Cmd.ProcessState, d.Stderr.String())
	}
}

// RSS is the daemon's resident memory in bytes.
func (d *Daemon) RSS(t testing.TB) int64 {
	t.Helper()
	n, err := d.Memory("VmRSS")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// FDs is the number of files the daemon has open.
func (d *Daemon) FDs(t testing.TB) int {
	t.Helper()
	l, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

// LeavesNothing does f and requires that the daemon then has as many files open as before: what
// closes them may be a little later than the reply.
func (d *Daemon) LeavesNothing(t testing.TB, f func()) {
	t.Helper()
	before := d.FDs(t)
	f()
	for end := time.Now().Add(10 * time.Second); d.FDs(t) > before; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("%d files are open, %d before", d.FDs(t), before)
			return
		}
	}
}

// QMP is one client of the monitor. It is used by one goroutine.
type QMP struct {
	conn
	r      *bufio.Reader
	Events []Event // received and not yet waited for
}

// Event is an event as received.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// Error is an error reply.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Class + ": " + e.Desc }

type message struct {
	Event
	Return json.RawMessage `json:"return"`
	Err    *Error          `json:"error"`
	QMP    json.RawMessage `json:"QMP"`
}

// Dial connects a further client and negotiates.
func (d *Daemon) Dial(t testing.TB) *QMP {
	t.Helper()
	q, err := DialQMP(d.QMPSocket(), time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.Close)
	return q
}

// DialQMP connects to the monitor at a unix socket and negotiates. The deadline is that of
// SetDeadline.
func DialQMP(socket string, deadline time.Time) (*QMP, error) {
	q := &QMP{}
	err := q.dial(socket, deadline, func() error {
		q.r = bufio.NewReaderSize(q.c, 1<<20)
		m, err := q.next()
		if err == nil && m.QMP == nil {
			err = fmt.Errorf("greeting: %+v", m)
		}
		if err == nil {
			_, err = q.Do("qmp_capabilities", nil)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return q, nil
}

// Close leaves without a word.
func (q *QMP) Close() { q.Drop() }

// Next returns the next event, of those kept or as it comes.
func (q *QMP) Next() (Event, error) {
	for len(q.Events) == 0 {
		m, err := q.next()
		if err != nil {
			return Event{}, err
		}
		if m.Name != "" {
			return m.Event, nil
		}
	}
	e := q.Events[0]
	q.Events = q.Events[1:]
	return e, nil
}

func (q *QMP) next() (m message, err error) {
	line, err := q.r.ReadBytes('\n')
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(line, &m)
}

// Send writes a command and does not wait for its reply.
func (q *QMP) Send(command string, args any) error {
	o := map[string]any{"execute": command}
	if args != nil {
		o["arguments"] = args
	}
	b, err := json.Marshal(o)
	if err == nil {
		_, err = q.c.Write(append(b, '\n'))
	}
	return err
}

// Do executes a command; an error reply is an *Error. Events on the way are kept.
func (q *QMP) Do(command string, args any) (json.RawMessage, error) {
	if err := q.Send(command, args); err != nil {
		return nil, err
	}
	return q.reply()
}

// Reply waits for the reply to a command that was sent; an error reply is an *Error.
func (q *QMP) Reply() error {
	_, err := q.reply()
	return err
}

func (q *QMP) reply() (json.RawMessage, error) {
	for {
		m, err := q.next()
		switch {
		case err != nil:
			return nil, err
		case m.Name != "":
			q.Events = append(q.Events, m.Event)
		case m.Err != nil:
			return nil, m.Err
		default:
			return m.Return, nil
		}
	}
}

// Must is Do for what has to succeed.
func (q *QMP) Must(t testing.TB, command string, args any) json.RawMessage {
	t.Helper()
	r, err := q.Do(command, args)
	if err != nil {
		t.Fatalf("%s %v: %v", command, args, err)
	}
	return r
}

// Wait returns the first event of that name whose data contain all of want, from those kept on. It
// fails the test after a minute.
func (q *QMP) Wait(t testing.TB, name string, want map[string]any) Event {
	t.Helper()
	_ = q.c.SetReadDeadline(time.Now().Add(time.Minute))
	defer q.c.SetReadDeadline(time.Time{})
	for i := 0; ; i++ {
		for i >= len(q.Events) {
			m, err := q.next()
			if err != nil {
				t.Fatalf("waiting for %s %v: %v (have %v)", name, want, err, q.Events)
			}
			if m.Name != "" {
				q.Events = append(q.Events, m.Event)
			}
		}
		e := q.Events[i]
		var data map[string]any
		_ = json.Unmarshal(e.Data, &data)
		hit := e.Name == name
		for k, v := range want {
			hit = hit && data[k] == v
		}
		if hit {
			q.Events = q.Events[i+1:]
			return e
		}
	}
}

// Blockdev makes the arguments of blockdev-add from a driver, a node name and further members.
func Blockdev(driver, node string, more map[string]any) map[string]any {
	o := map[string]any{"driver": driver, "node-name": node}
	maps.Copy(o, more)
	return o
}

// File is the definition of a file node without a name.
func File(path string) map[string]any { return map[string]any{"driver": "file", "filename": path} }
