package meta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

// world is the graph of one run beside what it has to show.
type world struct {
	x       *rig.Rig
	ctx     context.Context
	dir     string // for sockets and images that outside tools look at
	qemuImg bool
	images  [slots]*image
	jobs    []*job
	faults  faults
	state   state
	count   int // for unique names
	trace   []string
}

// image is a file and what a guest sees of it.
type image struct {
	slot    int
	format  types.BlockdevDriver // qcow2, raw or file
	shape   shape
	data    []byte
	backing *image // as the header says
	closed  bool   // no node
	own     bool   // the node was added by name; else a header opened it
	ro      bool   // the node is read-only
	guest   guest
	canSet  bool // the guest may write
	bg      *background
	// unknown: a job that was cancelled has left something.
	unknown bool
	bitmaps []*dirty
	// leaky: an error of its file may have left clusters that nobody needs.
	leaky bool
}

func (m *image) file() string { return fmt.Sprintf("i%d", m.slot) }
func (m *image) name() string { return fmt.Sprintf("n%d", m.slot) }

// Config says how a run is made, beyond its operations.
type Config struct {
	// Dir is an empty directory for sockets and images.
	Dir string
	// RealFiles puts images into Dir, else they are in memory.
	RealFiles bool
	// QemuImg has qemu-img look at the images in the end.
	QemuImg bool
	// Limit is how long the run may take.
	Limit time.Duration
}

var actions = map[string]func(w *world, m *image, o Op) error{
	"add": (*world).add, "del": (*world).del, "rm": (*world).rm, "attach": (*world).attach, "detach": (*world).detach,
	"write": (*world).write, "zero": (*world).zero, "discard": (*world).discard, "read": (*world).read, "flush": (*world).flush,
	"compress": (*world).compress, "status": (*world).status, "burst": (*world).burst, "start": (*world).start, "join": (*world).join,
	"verify": (*world).verify, "query": (*world).query, "snapshot": (*world).snapshot, "resize": (*world).resize,
	"stream": (*world).stream, "tick": (*world).tick, "pause": (*world).pause, "resume": (*world).resume, "speed": (*world).speed,
	"cancel": (*world).cancel, "finish": (*world).finish,
	"backup": (*world).backup, "mirror": (*world).mirror, "commit": (*world).commit, "bitmap": (*world).bitmap, "reopen": (*world).reopen,
	"create": nil, // the only one that needs no image
}

// Run executes operations and tells what was not as it should be, with the trace of what was done.
func Run(ops []Op, c Config) (trace []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.Limit)
	defer cancel()
	w := &world{ctx: ctx, dir: c.Dir, qemuImg: c.QemuImg, faults: faults{files: map[string]*drivertest.Fault{}}}
	if c.RealFiles {
		w.x = rig.New(c.Dir)
	} else {
		w.x = rig.New("")
		w.x.Store.Wrap(w.faults.wrap)
	}
	w.state.of = map[graph.Key]any{} // +checklocksignore: nobody else knows it yet
	w.x.Graph.SetRecorder(w.state.record)
	done := make(chan error, 1)
	go func() { done <- w.run(ops) }()
	select {
	case err = <-done:
	case <-time.After(c.Limit + 10*time.Second):
		// The goroutines stay behind; the trace is read while they may still write to it, in a
		// process that has failed.
		return w.trace, fmt.Errorf("hangs: no end after %v", c.Limit)
	}
	if err != nil {
		return w.trace, errors.Join(err, w.x.Close())
	}
	return w.trace, w.x.Close()
}

func (w *world) run(ops []Op) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if err := w.startServer(); err != nil {
		return err
	}
	for i, o := range ops {
		if err := w.step(o); err != nil {
			return fmt.Errorf("operation %d, %s: %w", i, o, err)
		}
		if err := w.recorded(); err != nil {
			return fmt.Errorf("operation %d, %s: %w", i, o, err)
		}
	}
	return errors.Join(w.end(), w.recorded())
}

func (w *world) step(o Op) error {
	m := w.images[o.Slot]
	if o.Kind == "create" {
		if m != nil {
			return nil
		}
		return w.create(o)
	}
	if m == nil {
		return nil
	}
	if w.undefined(m) {
		switch o.Kind {
		case "tick", "pause", "resume", "speed", "cancel", "finish", "query":
		default:
			if o.D%4 != 0 {
				return nil
			}
			if err := w.settle(m); err != nil {
				return err
			}
			if w.images[o.Slot] != m {
				return nil
			}
		}
	}
	if m.unknown && !m.closed {
		if err := w.learn(m); err != nil {
			return err
		}
	}
	switch o.Kind {
	case "backup", "mirror", "commit", "reopen", "bitmap", "add", "del", "rm", "attach", "verify", "snapshot", "resize", "stream":
		// These look at nodes, which a job may close at its end.
		for x := m; x != nil; x = x.backing {
			if err := w.jobsOver(x); err != nil {
				return err
			}
		}
		if w.images[o.Slot] != m {
			return nil // a job has made it superfluous
		}
	}
	return actions[o.Kind](w, m, o)
}

// did notes what an operation has come to.
func (w *world) did(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

// node finds the node of an open image.
func (w *world) node(m *image) *graph.Node {
	if m.own {
		return w.x.Graph.Node(m.name())
	}
	for _, up := range w.images {
		if up != nil && !up.closed && up.backing == m {
			if n := w.node(up); n != nil && n.Backing() != nil {
				return n.Backing().Node().SkipFilters()
			}
		}
	}
	return nil
}

// dependents are the images that back on m; open ones only if so asked.
func (w *world) dependents(m *image, open bool) (l []*image) {
	for _, up := range w.images {
		if up != nil && up.backing == m && (!open || !up.closed) {
			l = append(l, up)
		}
	}
	return l
}

// prune closes what was open only for images above that are so no longer.
func (w *world) prune() {
	for again := true; again; {
		again = false
		for _, m := range w.images {
			if m != nil && !m.closed && !m.own && len(w.dependents(m, true)) == 0 {
				m.closed, again = true, true
			}
		}
	}
}

// rnd is a source of random numbers for one operation.
func rnd(o Op) *rand.Rand {
	return rand.New(rand.NewPCG(uint64(o.A)<<32|uint64(o.B), uint64(o.C)<<32|uint64(o.D)))
}

// expect checks the outcome of something that has to fail if fails is not "".
func expect(err error, fails string) error {
	switch {
	case fails != "" && err == nil:
		return fmt.Errorf("succeeded although %s", fails)
	case fails == "" && err != nil:
		return err
	}
	return nil
}

// same compares what was read at off with what should be there.
func same(got, want []byte, off int) error {
	if bytes.Equal(got, want) {
		return nil
	}
	var b strings.Builder
	bad, first := 0, -1
	for i := range want {
		if got[i] != want[i] {
			if first < 0 {
				first = i
			}
			bad++
		}
	}
	fmt.Fprintf(&b, "read %d+%d: %d bytes differ, the first at %d: %#x instead of %#x", off, len(want), bad, off+first, got[first], want[first])
	return errors.New(b.String())
}
