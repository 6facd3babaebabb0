package ctl

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// terminal is a program in a tmux of its own.
type terminal struct {
	t      *testing.T
	socket string
}

// open runs qblockctl with words in a terminal of 110 x 50.
func open(t *testing.T, d *daemon.Daemon, words ...string) *terminal {
	t.Helper()
	return start(t, d, append([]string{binary(t)}, words...)...)
}

// start runs a program in a terminal, in the daemon's folder.
func start(t *testing.T, d *daemon.Daemon, words ...string) *terminal {
	t.Helper()
	if _, err := exec.LookPath("tmux"); err != nil {
		t.Skip("SKIPPED: what happens in a terminal needs tmux, which is not installed")
	}
	dir := tempDir(t)
	x := &terminal{t, filepath.Join(dir, "tmux")}
	// The screen of a program that has ended stays.
	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, []byte("set -g remain-on-exit on\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	command := append([]string{"-f", conf, "-u", "new-session", "-d", "-x", "110", "-y", "50",
		"-e", "XDG_STATE_HOME=" + d.Dir, "-e", "QBLOCKD_SOCK=" + d.QMPSocket(), "-c", d.Dir}, words...)
	x.tmux(command...)
	t.Cleanup(func() { _ = exec.Command("tmux", "-S", x.socket, "kill-server").Run() }) // it may be gone
	return x
}

func (x *terminal) tmux(words ...string) string {
	x.t.Helper()
	cmd := exec.Command("tmux", append([]string{"-S", x.socket}, words...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		x.t.Fatalf("tmux %q: %v\n%s", words, err, out)
	}
	return string(out)
}

// keys types: words of more than one letter that tmux knows are keys (Tab, Up, Enter, C-u), others
// text.
func (x *terminal) keys(words ...string) {
	x.t.Helper()
	x.tmux(append([]string{"send-keys"}, words...)...)
}

// see waits until the screen shows something, and returns the submatches.
func (x *terminal) see(pattern string) []string {
	x.t.Helper()
	re := regexp.MustCompile(pattern)
	var screen string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		// With what has scrolled away: the line that tells the end of a program moves the others.
		screen = x.tmux("capture-pane", "-p", "-S", "-50")
		if m := re.FindStringSubmatch(screen); m != nil {
			return m
		}
	}
	x.t.Fatalf("the screen does not show %s:\n%s", pattern, strings.TrimRight(screen, "\n"))
	return nil
}

// ended waits until the program in the terminal has ended. What tmux writes about it may be drawn
// over.
func (x *terminal) ended() {
	x.t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if strings.TrimSpace(x.tmux("display-message", "-p", "#{pane_dead}")) == "1" {
			return
		}
	}
	x.t.Fatalf("the program is still there:\n%s", x.tmux("capture-pane", "-p"))
}

func TestShellInTerminal(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	q := d.Dial(t)
	x := open(t, d, "shell")
	x.see(`(?m)^qblockd> *$`)

	// Commands, arguments, values and names.
	x.keys("blockdev-a", "Tab")
	x.see(`qblockd> blockdev-add $|qblockd> blockdev-add *\n`)
	x.keys("dri", "Tab", "null-c", "Tab", "node", "Tab")
	x.see(`qblockd> blockdev-add driver=null-co node-name=\s*\n`)
	x.keys("first", "Enter")
	x.see(`(?m)^\{\}$`)
	x.keys("blockdev-del n", "Tab", "Tab")
	x.see(`qblockd> blockdev-del node-name=first\s*\n`)
	x.keys("C-u", "blockdev-add driver=qcow2 file.driver=f", "Tab")
	x.see(`qblockd> blockdev-add driver=qcow2 file.driver=file\s*\n`)
	x.keys("lazy", "Tab", "Tab", "Tab")
	x.see(`lazy-refcounts=false +lazy-refcounts=true`)

	// An event in the middle of a line: it is shown above, the line stays.
	x.keys("C-u", "help job-di")
	x.see(`qblockd> help job-di\s*\n`)
	q.Must(t, "blockdev-create", map[string]any{"job-id": "made", "options": map[string]any{"driver": "file", "filename": filepath.Join(d.Dir, "x"), "size": 0}})
	x.see(`JOB_STATUS_CHANGE status=concluded id=made\nqblockd> help job-di\s*\n`)
	x.keys("Tab", "Enter")
	x.see(`Forget a job`)
	x.keys("job-dismiss id=m", "Tab", "Enter")
	x.see(`status=null id=made`)

	x.keys("nonsense", "Enter")
	x.see(`error: The command nonsense has not been found`)
	x.keys("graph", "Enter")
	x.see(`(?m)^first \(null-co, 1 GiB\)`)
	// A command that takes too long can be given up, and the next one is answered.
	if err := syscall.Mkfifo(filepath.Join(d.Dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	x.keys("blockdev-add driver=file node-name=stuck read-only=true filename=fifo", "Enter")
	x.see(`filename=fifo *\n *\n`)
	x.keys("C-c")
	x.see(`error: given up`)
	x.keys("help job-cancel", "Enter")
	x.see(`id: string\n +the job`)
	// The daemon is not ended by mistake.
	x.keys("quit", "Enter")
	x.see(`ends the daemon.*\(y/n\)`)
	x.keys("n", "Enter", "exit", "Enter")
	x.ended()
	secondShell(t, d)
}

// secondShell has the lines of the first one, and outlives the daemon.
func secondShell(t *testing.T, d *daemon.Daemon) {
	y := open(t, d, "shell")
	y.see(`(?m)^qblockd> *$`)
	y.keys("Up")
	y.see(`qblockd> exit`)
	y.keys("Up", "Up", "Up", "Up", "Up")
	y.see(`qblockd> nonsense`)
	y.keys("C-u", "blockdev-add driver=n", "Up")
	y.see(`qblockd> blockdev-add driver=null-co node-name=first\s*\n`)
	if fi, err := os.Stat(filepath.Join(d.Dir, "qblockctl", "history")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", fi, err)
	}
	// The daemon may go and come back.
	y.keys("C-u", "quit", "Enter", "y", "Enter")
	y.see(`(?m)^\{\}$`)
	if !d.Ended(20 * time.Second) {
		t.Fatal("quit did not end the daemon")
	}
	y.see(`the daemon closed the connection`)
	y.keys("query-jobs", "Enter")
	y.see(`error: is qblockd running\?`)
}

// TestProgressInTerminal: the bar of a job moves, and stays when the job has ended.
func TestProgressInTerminal(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	q := d.Dial(t)
	startStream(t, d, q, 4<<20)
	x := open(t, d, "jobs", "--watch")
	percent := func(text string) int { n, _ := strconv.Atoi(text); return n }
	line := `flat stream +\[(=*)>?-*\] +(\d+)% +[\d.]+ .?i?B/s +ETA \S+ +running`
	first := x.see(line)
	var next []string
	for next = first; percent(next[2]) <= percent(first[2])+5; {
		next = x.see(line)
	}
	if len(next[1]) <= len(first[1]) {
		t.Errorf("the bar does not move: %s, then %s", first[0], next[0])
	}
	x.see(`MiB/s +ETA \d+:\d\d`)
	q.Must(t, "block-job-set-speed", map[string]any{"device": "flat", "speed": 0})
	x.see(`flat stream +\[=+\] +100% +completed\n`)
	x.ended()
}

// TestGraphInTerminal: thirty nodes fit a terminal, each on one line.
func TestGraphInTerminal(t *testing.T) {
	d := daemon.Start(t, tempDir(t))
	thirty(t, d, d.Dial(t))
	x := open(t, d, "graph")
	x.see(`(?s)export top \(nbd, writable\).*layer9.*▼ backing: layer8.*▼ backing: layer0.*disk4-f.*export middle \(nbd\)\n└─ root: layer4  \(see above\)`)
	for _, l := range strings.Split(x.tmux("capture-pane", "-p", "-S", "-50"), "\n") {
		if strings.Contains(l, "qcow2,") && !strings.Contains(l, "layer") {
			t.Errorf("a line was broken: %s", l)
		}
	}
}

// TestBashInTerminal: bash completes commands, arguments and names.
func TestBashInTerminal(t *testing.T) {
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("SKIPPED: bash is not installed")
	}
	d := daemon.Start(t, tempDir(t))
	must(t, d, "blockdev-add", "driver=null-co", "node-name=one")
	must(t, d, "blockdev-add", "driver=null-co", "node-name=two")
	x := start(t, d, "bash", "--norc", "--noprofile")
	x.keys("PATH="+filepath.Dir(binary(t))+":$PATH PS1='ready> '; source <(qblockctl completion bash)", "Enter")
	x.see(`(?m)^ready> $|^ready> *\n`)
	x.keys("qblockctl blockdev-d", "Tab", "no", "Tab", "tw", "Tab")
	x.see(`ready> qblockctl blockdev-del node-name=two *\n`)
	x.keys("Enter")
	x.see(`(?m)^\{\}$`)
	x.keys("qblockctl blockdev-add driver=raw file.driver=null", "Tab", "Tab", "Tab", "c", "Tab", "file.si", "Tab", "9")
	x.see(`null-aio +null-co`)
	x.see(`ready> qblockctl blockdev-add driver=raw file.driver=null-co file.size=9 *\n`)
	x.keys("C-u", "qblockctl graph --fo", "Tab", "sv", "Tab")
	x.see(`ready> qblockctl graph --format svg *\n`)
}
