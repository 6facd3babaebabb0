package player

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"qblockd/tests/daemon"
)

// prelude is given to every shell command: map_of prints qemu-img's map with neighbouring extents
// of one kind joined, so that where clusters lie in the host file does not show.
const prelude = `map_of() { qemu-img map -U --output=json "$@" | jq -c 'reduce .[] as $e ([]; ($e|del(.offset,.start,.length)) as $k
| if length>0 and (.[-1]|del(.start,.length))==$k and .[-1].start+.[-1].length==$e.start
then .[-1].length+=$e.length else .+[$e|del(.offset)] end)' | python3 -c 'import json,sys
for l in sys.stdin: print(json.dumps(json.loads(l)))'; }
`

// process is a running server.
type process struct {
	*daemon.Process
	out, err *os.File
}

func (p *play) env() []string {
	return append(os.Environ(), "LC_ALL=C", "TZ=UTC", "HOME="+p.root)
}

func (p *play) spawn(args []string) {
	for _, c := range p.conns {
		c.close()
	}
	p.conns, p.order = map[string]*conn{}, nil
	out, err1 := os.Create(filepath.Join(p.root, ".stdout"))
	errf, err2 := os.Create(filepath.Join(p.root, ".stderr"))
	if err1 != nil || err2 != nil {
		p.add(fmt.Sprintf("- cannot run the server: %v %v", err1, err2))
		return
	}
	cmd := exec.Command(p.server, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir, cmd.Env = out, errf, p.root, p.env()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	started, err := daemon.Launch(cmd)
	if err != nil {
		p.add("- cannot run the server: " + err.Error())
		return
	}
	p.proc = &process{started, out, errf}
}

func (p *play) start(rest string, connect, negotiate, daemon bool) {
	args := splitWords(p.subst(rest))
	if connect {
		args = append(splitWords(p.subst("${MON:main}")), args...)
	}
	if daemon {
		args = append(args, "--daemonize", "--pidfile", p.root+"/server.pid")
	}
	p.spawn(args)
	if p.proc == nil {
		return
	}
	if daemon {
		if p.waitProc(10 * time.Second) {
			p.add(fmt.Sprintf("- parent exit %d", p.proc.Cmd.ProcessState.ExitCode()))
		} else {
			p.add("- parent still there")
		}
		text, err := os.ReadFile(p.root + "/server.pid")
		if p.daemonPid, _ = strconv.Atoi(strings.TrimSpace(string(text))); err != nil || p.daemonPid == 0 {
			p.add("- no pidfile")
		}
	}
	if connect {
		p.connect("main", "", negotiate, false)
	}
}

// process does the directives about programs; false if word is none of them.
func (p *play) process(word, rest string) bool {
	switch word {
	case "sh":
		p.shell(rest, false)
	case "verify":
		p.shell(rest, true)
	case "nbd":
		uri, cmd, _ := strings.Cut(strings.TrimSpace(rest), " ")
		if uri == "-" {
			uri = "nbd+unix:///?socket=${NBD}"
		} else if !strings.HasPrefix(uri, "nbd") {
			uri = "nbd+unix:///" + uri + "?socket=${NBD}"
		}
		p.shell(strings.ReplaceAll(cmd, "${URI}", "'"+p.subst(uri)+"'"), true)
	case "start":
		p.start(rest, true, true, false)
	case "start-raw":
		p.start(rest, true, false, false)
	case "start-bare":
		p.start(rest, false, false, false)
	case "start-daemon":
		p.start(rest, true, true, true)
	case "expect-exit":
		p.expectExit()
	case "signal":
		p.signal(rest)
	default:
		return false
	}
	return true
}

func (p *play) shell(cmd string, capture bool) {
	ctx, cancel := context.WithTimeout(context.Background(), min(15*time.Second, time.Until(p.limit)))
	defer cancel()
	var out bytes.Buffer
	c := exec.CommandContext(ctx, "/bin/bash", "-c", prelude+p.subst(cmd))
	c.Dir, c.Env, c.Stdout, c.Stderr = p.root, p.env(), &out, &out
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = time.Second
	err := c.Run()
	if ctx.Err() != nil {
		p.slow++
		p.add("- command ran too long")
	}
	code := 0
	if err != nil {
		code = c.ProcessState.ExitCode()
	}
	text := p.norm.console(strings.ToValidUTF8(out.String(), "\uFFFD"))
	if !capture {
		if code != 0 {
			p.add(fmt.Sprintf("- sh failed [exit %d] %.300s", code, strings.TrimSpace(text)))
		}
		return
	}
	for _, ln := range strings.Split(text, "\n") {
		if ln = strings.TrimRight(ln, " \t\r"); ln != "" {
			p.add("| " + ln)
		}
	}
	if code != 0 {
		p.add(fmt.Sprintf("| [exit %d]", code))
	}
}

// waitProc waits for the server's process for d; true if it has ended.
func (p *play) waitProc(d time.Duration) bool {
	return p.proc != nil && p.proc.Ended(max(0, min(d, time.Until(p.limit))))
}

func (p *play) dead() bool { return p.proc == nil || p.proc.Ended(0) && p.daemonPid == 0 }

func (p *play) noteDeath() {
	if p.proc == nil || !p.proc.Ended(0) {
		return
	}
	if ws := p.proc.Cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		p.add(fmt.Sprintf("- server killed by signal %d", ws.Signal()))
	}
}

func (p *play) expectExit() {
	for _, name := range slices.Clone(p.order) {
		if c := p.conns[name]; c != nil {
			p.drain(c, p.deadline())
			if !c.eof {
				p.add("- " + name + " still open")
			}
		}
	}
	code := p.reap()
	if code == "0" && len(p.conns) > 0 {
		return // what a server that ended well has printed is its own affair
	}
	if p.proc == nil {
		return
	}
	for _, f := range []struct {
		tag string
		f   *os.File
	}{{"stdout", p.proc.out}, {"stderr", p.proc.err}} {
		text, _ := os.ReadFile(f.f.Name())
		first, _, _ := strings.Cut(p.norm.console(strings.ToValidUTF8(string(text), "\uFFFD")), "\n")
		if len(text) > 0 {
			p.add(f.tag + ": " + strings.TrimRight(first, " \t\r"))
		}
	}
}

// reap waits for the server's end and records it.
func (p *play) reap() (code string) {
	deadline := p.deadline()
	switch {
	case p.daemonPid != 0:
		for p.daemonAlive() {
			if time.Now().After(deadline) {
				p.add("- server still running")
				return ""
			}
			time.Sleep(10 * time.Millisecond) // not our child: nothing to wait for
		}
		p.daemonPid = 0
		code = "gone"
	case p.proc == nil:
		code = "none"
	case !p.waitProc(time.Until(deadline)):
		p.add("- server still running")
		return ""
	default:
		if ws := p.proc.Cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
			p.noteDeath()
			return ""
		}
		code = strconv.Itoa(p.proc.Cmd.ProcessState.ExitCode())
	}
	p.add("- exit " + code)
	return code
}

func (p *play) daemonAlive() bool {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.daemonPid))
	if err != nil || !bytes.Contains(cmdline, []byte(p.root)) {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.daemonPid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// killServer ends whatever is still there.
func (p *play) killServer() {
	for _, c := range p.conns {
		c.close()
	}
	if p.daemonPid != 0 && p.daemonAlive() {
		_ = syscall.Kill(p.daemonPid, syscall.SIGKILL)
	}
	if p.proc == nil {
		return
	}
	if !p.proc.Ended(0) {
		_ = p.proc.Cmd.Process.Signal(syscall.SIGTERM)
		if !p.proc.Ended(time.Second) {
			p.proc.Kill()
		}
	}
	p.proc.out.Close()
	p.proc.err.Close()
}
