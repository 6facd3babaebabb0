// Package player plays conversations with a QMP storage daemon and writes what comes back as a
// normalised transcript, to be compared with a recorded one. The syntax of conversations is
// described in tests/conv/README.md.
package player

import (
	"cmp"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Transcript is what a play came to: steps, each with its entries.
type Transcript []Step

// Step is one step of a conversation and what it led to.
type Step struct {
	Text    string
	Entries []string
}

// String is the form in which transcripts are recorded.
func (t Transcript) String() string {
	var b strings.Builder
	for _, s := range t {
		b.WriteString("> " + s.Text + "\n")
		for _, e := range s.Entries {
			b.WriteString(e + "\n")
		}
	}
	return b.String()
}

type entry struct{ key, text string }

type play struct {
	server string
	root   string
	norm   *normaliser
	begin  time.Time
	limit  time.Time
	slow   int // waits in vain
	steps  Transcript

	inRegion bool
	region   []entry

	proc      *process
	daemonPid int
	conns     map[string]*conn
	order     []string // of conns
}

// Play plays the conversation in file against server, a program's path. The server and everything
// the conversation starts is gone when it returns. It takes 30 seconds at most unless the file says
// otherwise.
func Play(server, file string) (Transcript, error) {
	steps, err := readSteps(file)
	if err != nil {
		return nil, err
	}
	root, err := os.MkdirTemp("", "qd-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(root)
	server, err = filepath.Abs(server)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	p := &play{server: server, root: root, norm: newNormaliser(root, server), begin: now,
		limit: now.Add(30 * time.Second), conns: map[string]*conn{}}
	defer p.killServer()
	for _, text := range steps {
		if time.Now().After(p.limit) {
			p.add("- out of time")
			break
		}
		if err := p.one(text); err != nil {
			return nil, err
		}
	}
	p.flushRegion()
	return p.steps, nil
}

func (p *play) one(text string) error {
	if !strings.HasPrefix(text, "!") {
		name, body := connArg(text)
		p.step(text)
		p.exchange(name, body)
		return nil
	}
	word, rest, _ := strings.Cut(text[1:], " ")
	switch word {
	case "unordered":
		p.step("!unordered")
		p.inRegion = true
		for _, c := range p.conns {
			c.region = c.mark
		}
		return nil
	case "ordered":
		p.flushRegion()
		return nil
	}
	if !quietWords[word] {
		p.step(text)
	}
	if p.rule(word, rest) || p.process(word, rest) || p.talk(word, rest) {
		return nil
	}
	return fmt.Errorf("unknown directive !%s", word)
}

func (p *play) step(text string) {
	if !p.inRegion {
		p.steps = append(p.steps, Step{Text: text})
	}
}

func (p *play) add(text string) { p.addKeyed(text, "") }

// addKeyed adds what is sorted by key where the order does not matter.
func (p *play) addKeyed(text, key string) {
	if p.inRegion {
		p.region = append(p.region, entry{key, text})
		return
	}
	if len(p.steps) == 0 {
		p.step("(start)")
	}
	s := &p.steps[len(p.steps)-1]
	s.Entries = append(s.Entries, text)
}

func (p *play) flushRegion() {
	if !p.inRegion {
		return
	}
	p.inRegion = false
	got := p.region
	p.region = nil
	slices.SortStableFunc(got, func(a, b entry) int { return strings.Compare(a.key, b.key) })
	for _, e := range got {
		p.add(e.text)
	}
}

// deadline is that of one step; a server that let us wait in vain gets less patience.
func (p *play) deadline() time.Time {
	per := 10 * time.Second
	switch {
	case p.slow >= 3:
		per = time.Second
	case p.slow > 0:
		per = 3 * time.Second
	}
	return time.Now().Add(min(per, time.Until(p.limit)))
}

// record writes a message down and tells whether it was a reply.
func (p *play) record(c *conn, m any) (reply bool) {
	tag := ""
	if c.name != "main" {
		tag = c.name
	}
	text := canon(p.norm.message(m))
	d, _ := m.(map[string]any)
	if ev, ok := d["event"]; ok {
		c.events = append(c.events, d)
		data, _ := d["data"].(map[string]any)
		key := fmt.Sprint(ev)
		for _, k := range []string{"id", "device", "node-name"} {
			if s, ok := data[k].(string); ok && s != "" {
				key = s
				break
			}
		}
		p.addKeyed(tag+"* "+text, "1"+tag+key)
		return false
	}
	p.addKeyed(tag+"< "+text, "0"+tag)
	return true
}

func (p *play) conn(name string) *conn {
	if p.conns[name] == nil && name == "main" && p.proc == nil {
		p.start("", true, true, false)
	}
	return p.conns[name]
}

func (p *play) exchange(name, body string) {
	c := p.conn(name)
	switch {
	case c == nil:
		p.add("- not connected")
	case c.send([]byte(p.subst(body)+"\n")) || len(c.pending) > 0 || !c.eof:
		p.receive(c, 1)
	default:
		p.add("- connection closed")
	}
}

func (p *play) next(c *conn, deadline time.Time) (m any, ok bool) {
	for len(c.pending) == 0 {
		if c.eof {
			return nil, false
		}
		if !time.Now().Before(deadline) {
			p.slow++
			return nil, false
		}
		c.pump(deadline)
	}
	m = c.pending[0]
	c.pending = c.pending[1:]
	return m, true
}

// missed writes down that something has not come: with the connection, or in time.
func (p *play) missed(c *conn, late string) {
	if !c.eof {
		p.add(late)
		return
	}
	p.add("- connection closed")
	p.waitProc(500 * time.Millisecond)
	p.noteDeath()
}

// receive reads until n more replies have come.
func (p *play) receive(c *conn, n int) {
	for n > 0 {
		m, ok := p.next(c, p.deadline())
		if !ok {
			p.missed(c, "- no reply")
			return
		}
		if p.record(c, m) {
			n--
		}
	}
}

// talk does the directives about connections; false if word is none of them.
func (p *play) talk(word, rest string) bool {
	name, body := connArg(rest)
	switch word {
	case "connect", "connect-raw", "connect-silent":
		name, path, _ := strings.Cut(strings.TrimSpace(rest), " ")
		p.connect(name, p.subst(strings.TrimSpace(path)), word == "connect", word == "connect-silent")
	case "disconnect":
		name := orMain(rest)
		if c := p.conns[name]; c != nil {
			c.close()
			delete(p.conns, name)
		}
	case "wait":
		ev, js, _ := strings.Cut(strings.TrimSpace(body), " ")
		want := map[string]any{}
		if js = strings.TrimSpace(js); js != "" {
			v, _ := parse([]byte(p.subst(js)))
			want, _ = v.(map[string]any)
		}
		p.waitEvent(p.conn(name), ev, want)
	case "wait-job":
		f := strings.Fields(body)
		p.waitEvent(p.conn(name), "JOB_STATUS_CHANGE", map[string]any{"id": f[0], "status": f[1]})
	case "raw", "raw-repeat":
		n, data := 1, strings.TrimSpace(body)
		if word == "raw-repeat" {
			count, text, _ := strings.Cut(data, " ")
			n, _ = strconv.Atoi(count)
			data = strings.TrimSpace(text)
		}
		p.sendOn(name, []byte(strings.Repeat(string(unescape(p.subst(data))), n)))
	case "send":
		p.sendOn(name, []byte(p.subst(strings.TrimSpace(body))+"\n"))
	case "recv":
		n, err := strconv.Atoi(strings.TrimSpace(body))
		if err != nil {
			n = 1
		}
		if c := p.conn(name); c != nil {
			p.receive(c, n)
		} else {
			p.add("- not connected")
		}
	case "quiet":
		ms, _ := strconv.ParseFloat(strings.TrimSpace(body), 64)
		p.quiet(p.conn(name), time.Now().Add(time.Duration(ms*float64(time.Millisecond))))
	case "closed":
		p.expectClosed(orMain(rest))
	case "framing":
		ends := ""
		if c := p.conn(orMain(rest)); c != nil {
			slices.Sort(c.eols)
			ends = strings.Join(c.eols, " ")
		}
		p.add("- line ends: " + ends)
	default:
		return false
	}
	return true
}

// orMain is the connection that is named, or the one that is always there.
func orMain(rest string) string { return cmp.Or(strings.TrimSpace(rest), "main") }

func (p *play) sendOn(name string, b []byte) {
	if c := p.conn(name); c == nil || !c.send(b) {
		p.add("- cannot send")
	}
}

func (p *play) quiet(c *conn, end time.Time) {
	for c != nil && time.Now().Before(end) && (!c.eof || len(c.pending) > 0) {
		c.pump(end)
		for _, m := range c.pending {
			p.record(c, m)
		}
		c.pending = nil
	}
}

func (p *play) expectClosed(name string) {
	c := p.conns[name]
	if c != nil {
		p.drain(c, p.deadline())
	}
	if c == nil || c.eof {
		p.add("- closed")
	} else {
		p.add("- still open")
	}
}

// drain records everything until the connection ends.
func (p *play) drain(c *conn, deadline time.Time) {
	for m, ok := p.next(c, deadline); ok; m, ok = p.next(c, deadline) {
		p.record(c, m)
	}
}

func (p *play) waitEvent(c *conn, name string, want map[string]any) {
	if c == nil {
		p.add("- not connected")
		return
	}
	deadline := p.deadline()
	i := c.mark
	if p.inRegion {
		i = c.region
	}
	for {
		for ; i < len(c.events); i++ {
			e := c.events[i]
			data, _ := e["data"].(map[string]any)
			if (name == "*" || e["event"] == name) && subset(want, data) {
				c.mark = max(c.mark, i+1)
				return
			}
		}
		m, ok := p.next(c, deadline)
		if !ok {
			p.missed(c, "- event did not come")
			return
		}
		p.record(c, m)
	}
}

func subset(want, have map[string]any) bool {
	for k, w := range want {
		h, ok := have[k]
		if !ok {
			return false
		}
		if wd, isDict := w.(map[string]any); isDict {
			hd, ok := h.(map[string]any)
			if !ok || !subset(wd, hd) {
				return false
			}
		} else if !reflect.DeepEqual(w, h) {
			return false
		}
	}
	return true
}

func (p *play) connect(name, path string, negotiate, silent bool) {
	if path == "" {
		path = filepath.Join(p.root, name+".sock")
	}
	deadline := p.deadline()
	var nc net.Conn
	for {
		var err error
		if nc, err = net.Dial("unix", path); err == nil {
			break
		}
		dead := p.dead()
		if dead || time.Now().After(deadline) {
			p.add("- cannot connect")
			if dead {
				p.noteDeath()
			} else {
				p.slow++
			}
			return
		}
		time.Sleep(5 * time.Millisecond) // the socket file appears without a notice
	}
	c := &conn{name: name, c: nc}
	if p.conns[name] == nil {
		p.order = append(p.order, name)
	}
	p.conns[name] = c
	if silent {
		return
	}
	m, ok := p.next(c, p.deadline())
	if !ok {
		p.add("- no greeting")
		return
	}
	d, _ := m.(map[string]any)
	if !negotiate || d["QMP"] == nil {
		p.record(c, m)
		if !negotiate {
			return
		}
	}
	c.send([]byte(`{"execute":"qmp_capabilities"}` + "\n"))
	m, _ = p.next(c, p.deadline())
	if got := canon(m); got != `{"return": {}}` {
		p.add("- negotiation failed: " + got)
	}
}

func (p *play) pid() int {
	switch {
	case p.daemonPid != 0:
		return p.daemonPid
	case p.proc != nil:
		return p.proc.Cmd.Process.Pid
	}
	return 0
}

func (p *play) signal(name string) {
	sigs := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "KILL": syscall.SIGKILL}
	if pid := p.pid(); pid != 0 && (p.daemonPid != 0 || !p.proc.Ended(0)) {
		_ = syscall.Kill(pid, sigs[strings.TrimSpace(name)])
	}
}
