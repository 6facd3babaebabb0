package chardev

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"

	"qblockd/schema/types"
)

// muxUsers is how many users one mux takes.
const muxUsers = 4

// muxEscape, Ctrl-A, is the key that makes the next one a command of the mux.
const muxEscape = 1

// mux lets several users share the one client of another device. The output of all of them
// goes to the client; its input to the one in focus: at first the first user, and after each
// Ctrl-A C the next one.
type mux struct {
	*front
	interrupt func() // what Ctrl-A X does

	mu    sync.Mutex
	users []Handler // +checklocks:mu
	// index in users
	focus int // +checklocks:mu
	// of the device below
	clients []*muxClient // +checklocks:mu
}

// muxClient is a client of the device below and its streams, one for each user.
type muxClient struct {
	c       io.ReadWriteCloser
	writeMu sync.Mutex
	inputs  []*io.PipeWriter // guarded by mux.mu
}

// muxStream is what a user sees of a client.
type muxStream struct {
	*io.PipeReader
	client *muxClient
}

func (s *muxStream) Write(b []byte) (int, error) {
	s.client.writeMu.Lock()
	defer s.client.writeMu.Unlock()
	return s.client.c.Write(b)
}

func (t *Table) openMux(o *types.ChardevMux, f *front) (device, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := &mux{front: f, interrupt: func() { _ = syscall.Kill(os.Getpid(), syscall.SIGINT) }}
	base := t.devices[o.Chardev]
	if base == nil {
		return nil, fmt.Errorf("mux: base chardev %s not found", o.Chardev)
	}
	if m, ok := base.(*mux); ok && m.full() || !ok && base.attached() {
		return nil, inUse(o.Chardev)
	}
	base.attach(d.serveClient)
	return d, nil
}

func (*mux) filename() string { return "mux" }

// attached is always true: a mux cannot be removed or changed.
func (*mux) attached() bool { return true }

func (d *mux) full() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.users) >= muxUsers
}

func (d *mux) attach(h Handler) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.users = append(d.users, h)
	for _, c := range d.clients {
		d.joinLocked(c, h)
	}
}

// joinLocked gives the user h its stream of c.
//
// +checklocks:d.mu
func (d *mux) joinLocked(c *muxClient, h Handler) {
	r, w := io.Pipe()
	c.inputs = append(c.inputs, w)
	s := &muxStream{r, c}
	if !d.spawn(func() { d.serveTo(s, h) }) {
		r.Close()
	}
}

// serveClient is the handler that the mux gives the device below.
func (d *mux) serveClient(c io.ReadWriteCloser) {
	mc := &muxClient{c: c}
	d.mu.Lock()
	d.clients = append(d.clients, mc)
	for _, h := range d.users {
		d.joinLocked(mc, h)
	}
	d.mu.Unlock()
	d.distribute(mc)
	d.mu.Lock()
	d.clients = slices.DeleteFunc(d.clients, func(x *muxClient) bool { return x == mc })
	for _, w := range mc.inputs {
		w.Close()
	}
	d.mu.Unlock()
}

// distribute reads mc's input to its end.
func (d *mux) distribute(mc *muxClient) {
	buf := make([]byte, 4096)
	escaped := false
	for {
		n, err := mc.c.Read(buf)
		var run []byte
		for _, c := range buf[:n] {
			switch {
			case escaped:
				escaped = false
				if c == muxEscape {
					run = append(run, c)
					continue
				}
				d.input(mc, run)
				run = run[:0]
				d.command(mc, c)
			case c == muxEscape:
				escaped = true
			default:
				run = append(run, c)
			}
		}
		d.input(mc, run)
		if err != nil {
			return
		}
	}
}

// input hands b to the user in focus, waiting for it to take it.
func (d *mux) input(mc *muxClient, b []byte) {
	d.mu.Lock()
	var w *io.PipeWriter
	if d.focus < len(mc.inputs) {
		w = mc.inputs[d.focus]
	}
	d.mu.Unlock()
	if w != nil && len(b) > 0 {
		_, _ = w.Write(b) // a user that has ended misses it
	}
}

// command executes what followed the escape.
func (d *mux) command(mc *muxClient, c byte) {
	switch c {
	case 'c':
		d.mu.Lock()
		if len(d.users) > 0 {
			d.focus = (d.focus + 1) % len(d.users)
		}
		d.mu.Unlock()
	case 'x':
		d.interrupt()
	case 'h', '?':
		mc.writeMu.Lock()
		defer mc.writeMu.Unlock()
		_, _ = io.WriteString(mc.c, "\r\nCtrl-A h  this text\r\nCtrl-A c  input to the next user\r\n"+
			"Ctrl-A x  end the daemon\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n")
	}
}

func (d *mux) close() {
	d.mu.Lock()
	for _, c := range d.clients {
		for _, w := range c.inputs {
			w.Close()
		}
	}
	d.mu.Unlock()
	d.end()
}
