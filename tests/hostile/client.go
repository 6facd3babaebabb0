package hostile

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"qblockd/tests/daemon"
	"qblockd/tests/trial"
)

type args = map[string]any

// client talks to the daemon and notes what was said. A refusal is an answer; no answer ends the
// case.
type client struct {
	s     *server
	q     *daemon.QMP
	n     *daemon.NBD // of the export "x"; nil: not connected
	trace []string
	names int // of jobs, snapshots and bitmaps
	// cannotWait is the command that the client did not wait for.
	cannotWait string
}

func (c *client) note(format string, args ...any) {
	c.trace = append(c.trace, fmt.Sprintf(format, args...))
}

// name is a new one.
func (c *client) name(prefix string) string {
	c.names++
	return fmt.Sprint(prefix, c.names)
}

// connect begins a conversation.
func (c *client) connect(end time.Time) {
	q, err := daemon.DialQMP(c.s.qmp(), end)
	if err != nil {
		fail(true, "no answer to a new client", "%v", err)
	}
	c.q = q
}

func (c *client) hangUp() {
	if c.n != nil {
		c.n.Drop()
		c.n = nil
	}
}

// errGone: the client has left, as the answer to its command took too long.
var errGone = errors.New("the client has left")

// do executes a command. refused is its error, if it was refused.
func (c *client) do(command string, args any) (ret []byte, refused *daemon.Error) {
	began := time.Now()
	patience := c.s.limits.Patience
	if c.cannotWait != "" {
		patience = c.s.limits.Deadline
	}
	c.q.SetDeadline(began.Add(patience))
	ret, err := c.q.Do(command, args)
	said := func(format string, a ...any) {
		slow := ""
		if took := time.Since(began); took > time.Second {
			slow = fmt.Sprintf(" (%v)", took.Round(time.Millisecond))
		}
		c.note("%s %v: %s%s", command, args, fmt.Sprintf(format, a...), slow)
	}
	switch {
	case err == nil:
		said("ok")
		c.s.count(command + " done")
	case errors.As(err, &refused):
		said("%s", refused.Desc)
		c.s.count(command + " refused")
	case os.IsTimeout(err) && c.cannotWait == "":
		said("no answer")
		c.cannotWait = command
		trial.Must(errGone)
	default:
		said("%v", err)
		fail(true, "no answer to "+command, "%v", err)
	}
	return ret, refused
}

// try is do for what may be refused.
func (c *client) try(command string, args any) (ok bool) {
	_, refused := c.do(command, args)
	return refused == nil
}

// request runs a request of the export and tells whether it succeeded.
func (c *client) request(what string, f func(n *daemon.NBD) error) (ok bool) {
	kind, _, _ := strings.Cut(what, " ")
	if c.n == nil && !c.dial() {
		return false
	}
	c.n.SetDeadline(time.Now().Add(c.s.limits.Deadline))
	err := f(c.n)
	var errno syscall.Errno
	switch {
	case err == nil:
		c.note("%s: ok", what)
		c.s.count(kind + " done")
		return true
	case os.IsTimeout(err):
		c.note("%s: no answer", what)
		fail(true, "no answer to "+kind, "%s", what)
	case errors.As(err, &errno) && errno != syscall.EPIPE && errno != syscall.ECONNRESET:
		c.note("%s: %v", what, errno)
		c.s.count(kind + " failed")
		return false
	}
	c.note("%s: connection lost: %v", what, err)
	c.hangUp()
	if c.s.Ended(100 * time.Millisecond) {
		fail(true, "died", "")
	}
	return false
}

func (c *client) dial() (ok bool) {
	n, err := daemon.DialNBDBy(c.s.nbd(), "x", time.Now().Add(c.s.limits.Deadline))
	if err != nil {
		c.note("connect: %v", err)
		if os.IsTimeout(err) {
			fail(true, "no answer to connect", "%v", err)
		}
		return false
	}
	c.n = n
	return true
}

// event waits for an event about an export or job.
func (c *client) event(name, id string) {
	c.q.SetDeadline(time.Now().Add(c.s.limits.Deadline))
	for {
		e, err := c.q.Next()
		if err != nil {
			fail(true, "no event "+name, "%v", err)
		}
		var d struct{ ID string }
		if json.Unmarshal(e.Data, &d) == nil && e.Name == name && d.ID == id {
			return
		}
	}
}

// mostAnswer is the longest answer to a query: 65535 snapshots of a node, of its overlay and in the
// chain of that are long.
const mostAnswer = 64 << 20

// query asks for everything there is to know.
func (c *client) query() {
	for _, q := range []struct {
		name string
		args any
	}{
		{"query-named-block-nodes", nil}, {"query-block", nil}, {"x-debug-query-block-graph", nil},
		{"query-blockstats", args{"query-nodes": true}},
	} {
		ret, refused := c.do(q.name, q.args)
		if refused != nil {
			fail(false, "a query fails", "%s: %s", q.name, refused.Desc)
		}
		if len(ret) > mostAnswer {
			fail(false, "a long answer", "%s: %d bytes", q.name, len(ret))
		}
	}
}

// empty: nothing of the case is left in the daemon.
func (c *client) empty() {
	ret, _ := c.do("query-named-block-nodes", args{"flat": true})
	var nodes []struct {
		Name string `json:"node-name"`
	}
	trial.Must(json.Unmarshal(ret, &nodes))
	for _, n := range nodes {
		if n.Name != "healthy" && n.Name != "healthyfile" {
			fail(true, "a node stays", "%s", n.Name)
		}
	}
}

// mostStatus bounds how often one status of a disk is asked for, whatever its size.
const mostStatus = 40

// status asks for the status of the whole disk, as far as that goes.
func (c *client) status() {
	limit := func() time.Time { return time.Now().Add(c.s.limits.Deadline) }
	s, err := daemon.DialStatus(c.s.nbd(), "x", limit(), "base:allocation", "qemu:allocation-depth",
		"qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1", "qemu:dirty-bitmap:b2")
	if err != nil {
		c.note("status: %v", err)
		if os.IsTimeout(err) {
			fail(true, "no answer to connect", "%v", err)
		}
		return
	}
	defer s.Drop()
	off := int64(0)
	for i := 0; i < mostStatus && off < s.Size; i++ {
		step := min(s.Size-off, 1<<31)
		s.SetDeadline(limit())
		m, err := s.Ask(off, step)
		switch {
		case os.IsTimeout(err):
			fail(true, "no answer to status", "at %d", off)
		case err != nil:
			c.note("status at %d: %v", off, err)
		default:
			step = covered(m)
		}
		if step == 0 {
			fail(false, "an empty status", "at %d", off)
		}
		off += step
	}
	c.note("status: %d of %d bytes", off, s.Size)
}

// job runs a job to its end, or for a while.
func (c *client) job(command string, a args) (ok bool) {
	id := c.name("job")
	a["job-id"] = id
	if !c.try(command, a) {
		return false
	}
	end := time.Now().Add(time.Second)
	if a["sync"] == "none" {
		end = time.Now() // it does not end by itself
	}
	for cancelled := false; ; {
		c.q.SetDeadline(end)
		e, err := c.q.Next()
		var d struct{ ID, Device, Status, Error string }
		switch {
		case os.IsTimeout(err) && !cancelled:
			cancelled, end = true, end.Add(c.s.limits.Deadline)
			c.try("block-job-cancel", args{"device": id, "force": true})
		case err != nil:
			fail(true, "a job does not end", "%s: %v", command, err)
		case json.Unmarshal(e.Data, &d) != nil:
		case e.Name == "BLOCK_JOB_READY" && d.Device == id:
			if command == "blockdev-mirror" {
				c.try("block-job-cancel", args{"device": id, "force": true})
			} else {
				c.try("block-job-complete", args{"device": id})
			}
		case e.Name == "BLOCK_JOB_COMPLETED" && d.Device == id:
			ok = d.Error == ""
			c.note("%s ended: %q", id, d.Error)
		case e.Name == "BLOCK_JOB_CANCELLED" && d.Device == id:
			ok = false
		case e.Name != "JOB_STATUS_CHANGE" || d.ID != id:
		case d.Status == "concluded" && command == "x-blockdev-amend":
			c.try("job-dismiss", args{"id": id})
			return ok
		case d.Status == "null":
			return ok && !cancelled
		}
	}
}
