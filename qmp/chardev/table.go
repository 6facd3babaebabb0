package chardev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/blockdev/tlscreds"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// Options of a Table.
type Options struct {
	SocketMode os.FileMode  // of sockets in the file system; default 0600
	MaxClients int          // per listening socket; further ones wait; default DefaultMaxClients
	Detached   bool         // the daemon has no terminal: stdio is refused
	Log        *slog.Logger // default: slog's
	// Objects finds credentials for TLS; nil: there are none.
	Objects tlscreds.Objects
}

// DefaultMaxClients is how many clients a listening socket has at most if its table was not told
// otherwise.
const DefaultMaxClients = 1024

// Handler talks to one client. It returns when it is done with it; c is closed then, or when
// the device ends.
type Handler func(c io.ReadWriteCloser)

// Table holds the character devices. All methods may be called from any goroutine.
type Table struct {
	opts Options

	mu sync.Mutex
	// nil while the device is being opened
	devices map[string]device // +checklocks:mu
	// labels, oldest first
	order  []string // +checklocks:mu
	closed bool     // +checklocks:mu

	rings atomic.Int64 // what the ring buffers may hold, in bytes
}

// device is a character device.
type device interface {
	// filename describes where the device leads to, as query-chardev shows it.
	filename() string
	// attach makes h the user of the device, for good.
	attach(h Handler)
	// attached tells whether there is a user.
	attached() bool
	// close ends the device: no new clients, the streams of the others are closed. It returns
	// when all handlers have.
	close()
}

// NewTable returns a table without devices.
func NewTable(o Options) *Table {
	if o.SocketMode == 0 {
		o.SocketMode = 0o600
	}
	if o.MaxClients == 0 {
		o.MaxClients = DefaultMaxClients
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &Table{opts: o, devices: make(map[string]device)}
}

// Origin tells where the description of a device came from.
type Origin int

const (
	// CommandLine devices may name file descriptors that the daemon inherited.
	CommandLine Origin = iota
	// Monitor devices were asked for by a client.
	Monitor
)

// Open makes a device. It blocks while a socket connects, and for wait=on until the first client
// has come; ctx ends that.
//
// Errors: "Chardev with id 'ID' already exists", and what keeps the device from being made.
func (t *Table) Open(
	ctx context.Context, id string, b *types.ChardevBackend, from Origin,
) (*types.ChardevReturn, error) {
	if err := t.reserve(id); err != nil {
		if from == CommandLine {
			err = t.duplicate(id, b)
		}
		return nil, err
	}
	d, err := t.open(ctx, id, b, from)
	t.mu.Lock()
	if err == nil && t.closed {
		err = errors.New("the daemon is ending")
		defer d.close()
	}
	if err != nil {
		t.dropLocked(id)
		t.mu.Unlock()
		return nil, err
	}
	t.devices[id] = d
	t.mu.Unlock()
	ret := &types.ChardevReturn{}
	if p, ok := d.(*pty); ok {
		ret.Pty = &p.path
	}
	return ret, nil
}

// duplicate words that the command line makes a device b that has the label of another.
func (t *Table) duplicate(id string, b *types.ChardevBackend) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch t.devices[id].(type) {
	case *server, *client:
		// QEMU registers sockets in one more place, and there first.
		if b.Type == types.ChardevBackendKindSocket {
			return errors.New("duplicate yank instance")
		}
	}
	return fmt.Errorf("attempt to add duplicate property '%s' to object (type 'container')", id)
}

// Add is Open for a client: chardev-add. Its errors name the device.
func (t *Table) Add(ctx context.Context, id string, b *types.ChardevBackend) (*types.ChardevReturn, error) {
	ret, err := t.Open(ctx, id, b, Monitor)
	if err != nil && !errors.Is(err, errExists) {
		err = fmt.Errorf("Failed to add chardev '%s': %w", id, err)
	}
	return ret, err
}

// Change replaces the device called id by a new one: chardev-change. The old one must have no
// user; it is gone also if the new one cannot be made.
func (t *Table) Change(ctx context.Context, id string, b *types.ChardevBackend) (*types.ChardevReturn, error) {
	if err := t.end(id, func(d device) error {
		switch {
		case d == nil:
			return fmt.Errorf("Chardev '%s' does not exist", id)
		case isMux(d):
			return errors.New("Mux device hotswap not supported yet")
		case d.attached():
			return errors.New("Chardev user does not support chardev hotswap")
		}
		return nil
	}); err != nil {
		return nil, err
	}
	return t.Add(ctx, id, b)
}

// Remove removes the device called id, which must have no user: chardev-remove.
func (t *Table) Remove(id string) error {
	return t.end(id, func(d device) error {
		switch {
		case d == nil:
			return notFound(id)
		case d.attached():
			return fmt.Errorf("Chardev '%s' is busy", id)
		}
		return nil
	})
}

// end takes the device called id out of the table and closes it, unless check, which is given nil
// where there is none, refuses.
func (t *Table) end(id string, check func(device) error) error {
	t.mu.Lock()
	d := t.devices[id]
	err := check(d)
	if err == nil {
		t.dropLocked(id)
	}
	t.mu.Unlock()
	if err == nil {
		d.close()
	}
	return err
}

// SendBreak sends a break signal: chardev-send-break. No user of a device here knows what to do
// with one, so it is only checked that the device exists, as in QEMU.
func (t *Table) SendBreak(id string) error {
	if t.find(id) == nil {
		return notFound(id)
	}
	return nil
}

// Attach makes h the user of the device called id: it runs for each client, also for one that
// has come before.
func (t *Table) Attach(id string, h Handler) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.attachLocked(id, h)
}

// +checklocks:t.mu
func (t *Table) attachLocked(id string, h Handler) error {
	d := t.devices[id]
	switch {
	case d == nil:
		return fmt.Errorf("chardev \"%s\" not found", id)
	case isMux(d):
		if d.(*mux).full() {
			return inUse(id)
		}
	case d.attached():
		return inUse(id)
	}
	d.attach(h)
	return nil
}

// AttachFor is Attach for processes of those users alone: clients of others are sent away. Only who
// listens on a unix socket can tell them apart.
func (t *Table) AttachFor(id string, uids []uint32, h Handler) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d := t.devices[id]; d != nil {
		if s, ok := d.(*server); !ok || !s.local() {
			return fmt.Errorf("'allow-uid' needs a character device that listens on a unix socket, which '%s' does not", id)
		}
	}
	var log sockets.Seldom // whoever reaches the socket may try as often as they like
	return t.attachLocked(id, func(c io.ReadWriteCloser) {
		uid, err := peerUID(c)
		switch {
		case err != nil:
			log.Log(t.opts.Log, slog.LevelWarn, "character device "+id+": a client is not known", "refused-before", "error", err)
			c.Close()
		case !slices.Contains(uids, uid):
			log.Log(t.opts.Log, slog.LevelInfo, "character device "+id+": a client is not wanted", "refused-before", "uid", uid)
			c.Close()
		default:
			h(c)
		}
	})
}

// Query describes all devices, the newest first: query-chardev.
func (t *Table) Query() []*types.ChardevInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]*types.ChardevInfo, 0, len(t.order))
	for _, id := range t.order {
		if d := t.devices[id]; d != nil {
			open := d.attached() && !isMux(d) // a mux never says so, like QEMU's
			list = append(list, &types.ChardevInfo{Label: id, Filename: d.filename(), FrontendOpen: open})
		}
	}
	slices.Reverse(list)
	return list
}

// Backends lists the kinds of devices that can be made: query-chardev-backends.
func (t *Table) Backends() []*types.ChardevBackendInfo {
	var list []*types.ChardevBackendInfo
	for _, k := range types.ChardevBackendKindValues {
		list = append(list, &types.ChardevBackendInfo{Name: string(k)})
	}
	return list
}

// Close ends all devices and removes their sockets. It returns when all handlers have.
func (t *Table) Close() {
	t.mu.Lock()
	t.closed = true
	var all panics.Group
	for id, d := range t.devices {
		if d != nil {
			all.Go("the end of a character device", d.close)
			delete(t.devices, id)
		}
	}
	t.order = nil
	t.mu.Unlock()
	all.Wait()
}

func (t *Table) find(id string) device {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.devices[id]
}

var errExists = errors.New("exists")

// reserve takes the label id for a device that is being opened.
func (t *Table) reserve(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.devices[id]; ok {
		return blk.Text("Chardev with id '"+id+"' already exists", errExists)
	}
	t.devices[id] = nil
	t.order = append(t.order, id)
	return nil
}

// +checklocks:t.mu
func (t *Table) dropLocked(id string) {
	delete(t.devices, id)
	t.order = slices.DeleteFunc(t.order, func(s string) bool { return s == id })
}

// open makes the device that b describes.
func (t *Table) open(ctx context.Context, id string, b *types.ChardevBackend, from Origin) (device, error) {
	switch u := b.U.(type) {
	case *types.ChardevSocketWrapper:
		return t.withLog(u.Data.Logfile, u.Data.Logappend, func(f *front) (device, error) {
			return t.openSocket(ctx, id, &u.Data, from, f)
		})
	case *types.ChardevFileWrapper:
		return t.withLog(u.Data.Logfile, u.Data.Logappend, with(openFile, &u.Data))
	case *types.ChardevHostdevWrapper:
		open := openPipe
		switch b.Type {
		case types.ChardevBackendKindSerial:
			open = openSerial
		case types.ChardevBackendKindParallel:
			open = openParallel
		}
		return t.withLog(u.Data.Logfile, u.Data.Logappend, with(open, &u.Data))
	case *types.ChardevStdioWrapper:
		return t.withLog(u.Data.Logfile, u.Data.Logappend, with(t.openStdio, &u.Data))
	case *types.ChardevRingbufWrapper:
		return t.withLog(u.Data.Logfile, u.Data.Logappend, func(f *front) (device, error) {
			return newRingbuf(&u.Data, string(b.Type), f, &t.rings)
		})
	case *types.ChardevUdpWrapper:
		return t.withLog(u.Data.Logfile, u.Data.Logappend, func(f *front) (device, error) {
			return openUDP(ctx, &u.Data, f)
		})
	case *types.ChardevMuxWrapper:
		return t.withLog(u.Data.Logfile, u.Data.Logappend, with(t.openMux, &u.Data))
	case *types.ChardevCommonWrapper:
		return t.withLog(u.Data.Logfile, u.Data.Logappend, func(f *front) (device, error) {
			if b.Type == types.ChardevBackendKindPty {
				return openPty(f)
			}
			return &plain{f, "null"}, nil
		})
	}
	panic(fmt.Sprintf("chardev: backend %q with %T", b.Type, b.U))
}

// with is open with its options.
func with[T any](open func(*T, *front) (device, error), options *T) func(*front) (device, error) {
	return func(f *front) (device, error) { return open(options, f) }
}

// withLog opens the log file of a device, if it is to have one, and then the device.
func (t *Table) withLog(path *string, appendTo *bool, open func(*front) (device, error)) (device, error) {
	f := newFront()
	if path != nil {
		log, err := os.OpenFile(*path, outputFlags(appendTo), 0o666)
		if err != nil {
			return nil, fmt.Errorf("Could not create '%s': %s", *path, blk.ErrnoText(err))
		}
		f.log = log
	}
	d, err := open(f)
	if err != nil && f.log != nil {
		f.log.Close()
	}
	return d, err
}

func isMux(d device) bool {
	_, ok := d.(*mux)
	return ok
}

func inUse(id string) error    { return fmt.Errorf("Device '%s' is in use", id) }
func notFound(id string) error { return fmt.Errorf("Chardev '%s' not found", id) }
