// Package ctl tries qblockctl as its users do: from scripts against a daemon, and in a real
// terminal.
package ctl

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "qblockctl-test-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "qblockctl")
	if out, err := exec.Command("go", "build", "-o", bin, "qblockd/cmd/qblockctl").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return bin, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if bin, err := build(); err == nil {
		os.RemoveAll(filepath.Dir(bin))
	}
	os.Exit(code)
}

func binary(t *testing.T) string {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// ctl runs qblockctl and returns what it printed, what it said on standard error, and its exit
// status.
func ctl(t *testing.T, d *daemon.Daemon, stdin string, words ...string) (out, said string, code int) {
	t.Helper()
	cmd := exec.Command(binary(t), words...)
	cmd.Env = append(os.Environ(), "QBLOCKD_SOCK="+d.QMPSocket())
	cmd.Dir = d.Dir
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}

func must(t *testing.T, d *daemon.Daemon, words ...string) string {
	t.Helper()
	out, said, code := ctl(t, d, "", words...)
	if code != 0 {
		t.Fatalf("%q: exit %d\n%s%s", words, code, out, said)
	}
	return out
}

// tempDir is one with a short name: sockets are in it.
func tempDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// overlay makes a qcow2 file over another and opens it as a node of its name.
func overlay(t *testing.T, q *daemon.QMP, dir, name, backing string, size int) {
	t.Helper()
	path := filepath.Join(dir, name+".qcow2")
	for _, o := range []map[string]any{
		{"driver": "file", "filename": path, "size": 0},
		{"driver": "qcow2", "file": daemon.File(path), "size": size},
	} {
		q.Must(t, "blockdev-create", map[string]any{"job-id": "make", "options": o})
		q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "make", "status": "concluded"})
		q.Must(t, "job-dismiss", map[string]any{"id": "make"})
	}
	more := map[string]any{"file": map[string]any{"driver": "file", "filename": path, "node-name": name + "-f"}}
	if backing != "" {
		more["backing"] = backing
	}
	q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", name, more))
}

func TestOneShot(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	if out := must(t, d, "blockdev-add", "driver=null-co", "node-name=n", "size=1048576"); out != "{}\n" {
		t.Errorf("printed %s", out)
	}
	if out := must(t, d, "query-named-block-nodes", "flat=true"); !strings.Contains(out, `"node-name": "n"`) {
		t.Errorf("printed %s", out)
	}
	for _, c := range []struct {
		words string
		code  int
		said  string
	}{
		{"blockdev-del node-name=nope", 1, "qblockctl: Failed to find node with node-name='nope'\n"},
		{"blockdev-del node-name=12", 1, `is quoted: 'node-name="12"'`},
		{"no-such", 1, "query-commands"},
		{"blockdev-del nope", 2, "'nope' is not of the form KEY=VALUE; see 'qblockctl help'\n"},
		{"amend", 2, "amend: a FILE, or --node; see 'qblockctl help amend'\n"},
		{"amend f", 2, "amend: -o tells what to change; see 'qblockctl help amend'\n"},
		{"amend -o size=1 f", 2, "amend: 'size' cannot be changed; see 'qblockctl help amend'\n"},
		{"check --node nope", 1, "'qblockctl graph' shows the nodes"},
		{"check --nope", 2, "see 'qblockctl help check'\n"},
		{"--nope", 2, "see 'qblockctl help'\n"},
		{"-s /nowhere query-jobs", 1, "is qblockd running?"},
		{"help blockdev-del", 0, ""},
		{"jobs --watch", 0, ""},
	} {
		out, said, code := ctl(t, d, "", strings.Fields(c.words)...)
		if code != c.code || !strings.Contains(said, c.said) {
			t.Errorf("%s: exit %d, %q, %q", c.words, code, out, said)
		}
	}
	// The shell without a terminal.
	out, said, code := ctl(t, d, "# a comment\n\nhelp job-dismiss\nblockdev-del node-name='n'\nblockdev-del node-name=n\nexit\nquit\n", "shell")
	if code != 1 || !strings.Contains(out, "Forget a job") || strings.Count(out, "{}\n") != 1 || !strings.Contains(out, "error: Failed to find node") {
		t.Errorf("shell: exit %d %s %s", code, out, said)
	}
	if out := must(t, d, "query-jobs"); out != "[]\n" {
		t.Errorf("the daemon is gone, or has jobs: %s", out)
	}
	d.Stop(t)
}

// TestEvents: what comes while others work, until the daemon ends.
func TestEvents(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	cmd := exec.Command(binary(t), "-s", d.QMPSocket(), "events", "-n", "2", "JOB_STATUS_CHANGE")
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	q := d.Dial(t)
	for i := 0; ; i++ { // it is not known when it listens
		q.Must(t, "blockdev-create", map[string]any{"job-id": "j", "options": map[string]any{"driver": "file", "filename": filepath.Join(d.Dir, "x"), "size": 0}})
		q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "j", "status": "concluded"})
		q.Must(t, "job-dismiss", map[string]any{"id": "j"})
		select {
		case err := <-done:
			if n := strings.Count(out.String(), " JOB_STATUS_CHANGE "); err != nil || n != 2 || !strings.Contains(out.String(), "id=j") {
				t.Errorf("%v\n%s", err, out.String())
			}
			return
		case <-time.After(20 * time.Millisecond):
		}
		if i == 500 {
			cmd.Process.Kill()
			t.Fatal("no events")
		}
	}
}

// thirty adds 30 nodes: a chain of ten qcow2 files with an export on top and one in the middle, and
// five plain disks.
func thirty(t *testing.T, d *daemon.Daemon, q *daemon.QMP) {
	t.Helper()
	backing := ""
	for i := range 10 {
		name := fmt.Sprintf("layer%d", i)
		overlay(t, q, d.Dir, name, backing, 1<<20)
		backing = name
	}
	for i := range 5 {
		path := filepath.Join(d.Dir, fmt.Sprintf("disk%d.img", i))
		if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		q.Must(t, "blockdev-add", daemon.Blockdev("raw", fmt.Sprintf("disk%d", i),
			map[string]any{"file": map[string]any{"driver": "file", "filename": path, "node-name": fmt.Sprintf("disk%d-f", i)}}))
	}
	for id, node := range map[string]string{"top": "layer9", "middle": "layer4"} {
		q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": id, "node-name": node, "writable": id == "top"})
	}
}

func TestGraph(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	q := d.Dial(t)
	if out := must(t, d, "graph"); out != "no block nodes\n" {
		t.Error(out)
	}
	thirty(t, d, q)
	text := must(t, d, "graph")
	for i := range 10 {
		if strings.Count(text, fmt.Sprintf(": layer%d (qcow2, 1 MiB", i)) != 1 || strings.Count(text, fmt.Sprintf(": layer%d-f (file, ", i)) != 1 {
			t.Errorf("layer %d:\n%s", i, text)
		}
	}
	for _, want := range []string{"export top (nbd, writable)\n└─ root: layer9 ", "\nexport middle (nbd)\n└─ root: layer4  (see above)\n", "\ndisk3 (raw, 4 KiB)\n└─ file: disk3-f "} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks %q:\n%s", want, text)
		}
	}
	if dot := must(t, d, "graph", "--format=dot"); strings.Count(dot, " -> ") != 9+15+2 || !strings.HasPrefix(dot, "digraph") {
		t.Errorf("%s", dot)
	}
	must(t, d, "graph", "-o", "graph.svg")
	svg, err := os.ReadFile(filepath.Join(d.Dir, "graph.svg"))
	if err != nil {
		t.Fatal(err)
	}
	for x := xml.NewDecoder(bytes.NewReader(svg)); ; {
		if _, err := x.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v\n%s", err, svg)
		}
	}
	if n := bytes.Count(svg, []byte("<rect ")); n != 1+30+2 {
		t.Errorf("%d boxes", n-1)
	}
}

// TestJobs: the table, and the exit status of a watch tells whether a job failed.
func TestJobs(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	q := d.Dial(t)
	startStream(t, d, q, 1)
	if out := must(t, d, "jobs"); !strings.Contains(out, "\nflat  stream  ") || !strings.Contains(out, "1 B/s") {
		t.Errorf("%s", out)
	}
	cmd := exec.Command(binary(t), "-s", d.QMPSocket(), "jobs", "-w")
	var out bytes.Buffer
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 256)
	n, _ := pipe.Read(first) // it watches now
	q.Must(t, "block-job-set-speed", map[string]any{"device": "flat", "speed": 0})
	_, _ = io.Copy(&out, pipe)
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "flat stream 100% completed\n") {
		t.Errorf("%v\n%s%s", err, first[:n], out.String())
	}
	// A job that has failed and is to be dismissed: it has nothing left to do.
	q.Must(t, "blockdev-create", map[string]any{"job-id": "bad", "options": map[string]any{"driver": "file", "filename": d.Dir, "size": 0}})
	q.Wait(t, "JOB_STATUS_CHANGE", map[string]any{"id": "bad", "status": "concluded"})
	if out, said, code := ctl(t, d, "", "jobs", "--watch"); code != 1 || !strings.Contains(said, "job 'bad' failed: ") {
		t.Errorf("exit %d %s %s", code, out, said)
	}
}

// startStream starts the job "flat", 32 MiB at most that many bytes a second.
func startStream(t *testing.T, d *daemon.Daemon, q *daemon.QMP, speed int) {
	t.Helper()
	const size = 32 << 20
	base := filepath.Join(d.Dir, "base.img")
	if err := os.WriteFile(base, bytes.Repeat([]byte{7}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	q.Must(t, "blockdev-add", daemon.Blockdev("file", "base", map[string]any{"filename": base}))
	overlay(t, q, d.Dir, "top", "base", size)
	q.Must(t, "block-stream", map[string]any{"job-id": "flat", "device": "top", "speed": speed})
}

// TestCompletionAnswers: what the shells' scripts are told.
func TestCompletionAnswers(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	must(t, d, "blockdev-add", "driver=null-co", "node-name=one")
	must(t, d, "blockdev-add", "driver=null-co", "node-name=two")
	for words, want := range map[string]string{
		"blockdev-d":                  "blockdev-del\n",
		"gra":                         "graph",
		"blockdev-del node":           "node-name=\n",
		"blockdev-del node-name=":     "node-name=one\nnode-name=two\n",
		"blockdev-add driver=nul":     "driver=null-aio\ndriver=null-co\n",
		"graph --format s":            "svg\n",
		"events BLOCK_EX":             "BLOCK_EXPORT_DELETED\n",
		"help query-job":              "query-jobs\n",
		"-s " + d.QMPSocket() + " qu": "query-block\n",
	} {
		out, _, code := ctl(t, d, "", append([]string{"__complete"}, strings.Fields(words)...)...)
		if code != 0 || !strings.HasPrefix(out, want) {
			t.Errorf("%s: exit %d, %s", words, code, out)
		}
	}
}
