package qmp

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Version is what the greeting and query-version report.
type Version struct {
	Major, Minor, Micro int    // of the QEMU whose interface this is
	Package             string // our own name and version
}

// AppendJSON appends the VersionInfo object.
func (v Version) AppendJSON(b []byte) []byte {
	b = fmt.Appendf(b, `{"qemu": {"micro": %d, "minor": %d, "major": %d}, "package": `, v.Micro, v.Minor, v.Major)
	b = value.AppendString(b, v.Package)
	return append(b, '}')
}

// Dispatcher knows the commands and executes requests. It is a types.Registrar. All handlers are
// registered before the first session is served.
type Dispatcher struct {
	version  Version
	commands map[string]command
	stopped  atomic.Bool

	// Log takes what a client does not see; nil: slog's default.
	Log *slog.Logger

	unsent     unsent
	unfinished unfinished

	stopMu sync.Mutex
	// to be woken by Stop
	sessions map[*Session]struct{} // +checklocks:stopMu
}

type command struct {
	run types.HandlerFunc
	oob bool // may run out of band
}

// NewDispatcher returns a dispatcher that knows no commands. The handler of qmp_capabilities,
// which it cannot do without, is registered like any other and calls Negotiate.
func NewDispatcher(v Version) *Dispatcher {
	d := &Dispatcher{version: v, commands: make(map[string]command), sessions: make(map[*Session]struct{})}
	d.unsent.init()
	d.unfinished.limit, d.unfinished.slow = DefaultAllUnfinished, slowMessage
	return d
}

// LimitUnsent bounds what the clients together leave unread, in bytes; DefaultAllUnsent unless it
// is called, before the first session is served.
func (d *Dispatcher) LimitUnsent(n int64) { d.unsent.limit = n }

// Version is the version given to NewDispatcher.
func (d *Dispatcher) Version() Version { return d.version }

// Handle registers the handler of a command; a second one for the same name panics.
func (d *Dispatcher) Handle(name string, f types.HandlerFunc) { d.add(name, command{run: f}) }

// HandleOOB is Handle for a command that may also be executed out of band: then it runs
// beside whatever its session is executing, and must neither block nor take a lock that is
// held across I/O.
func (d *Dispatcher) HandleOOB(name string, f types.HandlerFunc) {
	d.add(name, command{run: f, oob: true})
}

func (d *Dispatcher) add(name string, c command) {
	if _, dup := d.commands[name]; dup {
		panic("qmp: second handler for " + name)
	}
	d.commands[name] = c
}

// Stop makes all sessions execute nothing more: what they have not begun is ignored, without
// a reply. Commands under way finish. It is called by the handler of quit.
func (d *Dispatcher) Stop() {
	d.stopped.Store(true)
	d.stopMu.Lock()
	defer d.stopMu.Unlock()
	for s := range d.sessions {
		s.wake()
	}
}

// Stopped tells whether Stop was called.
func (d *Dispatcher) Stopped() bool { return d.stopped.Load() }

func (d *Dispatcher) enter(s *Session) {
	d.stopMu.Lock()
	defer d.stopMu.Unlock()
	d.sessions[s] = struct{}{}
}

func (d *Dispatcher) leave(s *Session) {
	d.stopMu.Lock()
	defer d.stopMu.Unlock()
	delete(d.sessions, s)
}

func (d *Dispatcher) log() *slog.Logger {
	if d.Log != nil {
		return d.Log
	}
	return slog.Default()
}

// negotiation is the part of a session's state that requests depend on.
type negotiation struct {
	done     bool // commands other than qmp_capabilities are allowed
	oob      bool // the capability was enabled
	readOnly bool // commands that change something are not allowed
}

// reply executes one request and appends the whole reply, without line end, to out.
func (d *Dispatcher) reply(ctx context.Context, neg *negotiation, request value.Value, out []byte) []byte {
	obj, ok := request.(*value.Dict)
	if !ok {
		return appendFailure(out, nil, false, errNotObject)
	}
	id, hasID := obj.Get("id")
	start := len(out)
	out = append(out, `{"return": `...)
	mark := len(out)
	res, err := d.execute(ctx, neg, obj, out)
	if err != nil {
		return appendFailure(out[:start], id, hasID, err)
	}
	if out = res; len(out) == mark {
		out = append(out, "{}"...)
	}
	if hasID {
		out = append(out, `, "id": `...)
		out = value.Append(out, id)
	}
	return append(out, '}')
}

// appendFailure appends an error reply; err's text is the description.
func appendFailure(out []byte, id value.Value, hasID bool, err error) []byte {
	out = append(out, '{')
	if hasID {
		out = append(out, `"id": `...)
		out = value.Append(out, id)
		out = append(out, ", "...)
	}
	out = append(out, `"error": {"class": `...)
	out = value.AppendString(out, Class(err))
	out = append(out, `, "desc": `...)
	out = value.AppendString(out, err.Error())
	return append(out, "}}"...)
}

// execute checks a request and runs its command.
func (d *Dispatcher) execute(ctx context.Context, neg *negotiation, obj *value.Dict, out []byte) ([]byte, error) {
	req, err := checkRequest(obj, neg.oob)
	if err != nil {
		return out, err
	}
	if !neg.done && req.command != "qmp_capabilities" {
		return out, errNegotiate
	}
	c, ok := d.commands[req.command]
	if !ok {
		return out, notFound("The command " + req.command + " has not been found")
	}
	if neg.readOnly && !readOnly[req.command] {
		return out, fmt.Errorf("The command %s is not allowed on a read-only monitor", req.command)
	}
	if req.oob && !c.oob {
		return out, noOOB(req.command)
	}
	p := &trace.CommandInBand
	if req.oob {
		p = &trace.CommandOutOfBand
	}
	if p.On() {
		p.Log(slog.String("command", req.command), slog.Int("arguments", req.args.Len()))
	}
	return d.run(ctx, req, c, out)
}

// run executes the command of a checked request. A panic in it is an error of the command.
func (d *Dispatcher) run(ctx context.Context, req request, c command, out []byte) (res []byte, err error) {
	if panics.Contained() {
		defer func() {
			if p := recover(); p != nil {
				res, err = out, panics.Report("command '"+req.command+"'", p)
			}
		}()
	}
	return c.run(ctx, req.args, out)
}

// request is a checked request.
type request struct {
	command string
	args    *value.Dict // not nil
	oob     bool        // given as exec-oob
}

// checkRequest finds the first fault of a request in the order of QEMU's hash table.
func checkRequest(obj *value.Dict, allowOOB bool) (request, error) {
	var r request
	var key string // the member that named the command
	var err error
	obj.EachHashed(func(name string, v value.Value) bool {
		switch {
		case name == "execute", name == "exec-oob" && allowOOB:
			s, ok := v.(string)
			switch {
			case !ok:
				err = inputError(name, "must be a string")
			case key != "":
				err = inputError(name, "clashes with '"+key+"'")
			}
			r.command, r.oob, key = s, name == "exec-oob", name
		case name == "arguments":
			var ok bool
			if r.args, ok = v.(*value.Dict); !ok {
				err = inputError(name, "must be an object")
			}
		case name != "id":
			err = inputError(name, "is unexpected")
		}
		return err == nil
	})
	switch {
	case err != nil:
		return r, err
	case key == "":
		return r, errNoExecute
	case r.args == nil:
		r.args = &value.Dict{}
	}
	return r, nil
}

// isOOB tells whether a request is to overtake those that wait.
func isOOB(v value.Value) bool {
	obj, ok := v.(*value.Dict)
	if !ok {
		return false
	}
	_, oob := obj.Get("exec-oob")
	_, exec := obj.Get("execute")
	return oob && !exec
}
