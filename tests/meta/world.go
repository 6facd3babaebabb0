package meta

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// world is the graph of one run beside what it has to show.
type world struct {
	x       *rig.Rig
	ctx     context.Context
	dir     string // for sockets and images that outside tools look at
	qemuImg bool
	images
	underway
	faults faults
	state  state
	count  int // for unique names
	trace  []string
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
	go func() { done <- trial.Run(func() { w.run(ops) }) }()
	select {
	case err = <-done:
		return w.trace, errors.Join(err, w.x.Close())
	case <-time.After(c.Limit + 10*time.Second):
		// The goroutines stay behind; the trace is read while they may still write to it, in a
		// process that has failed.
		return w.trace, fmt.Errorf("hangs: no end after %v", c.Limit)
	}
}

func (w *world) run(ops []Op) {
	trial.Must(w.x.NBD.Start(w.ctx, &types.NbdServerOptions{Addr: types.SocketAddress{
		Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddress{Path: w.socket()}}}))
	for i, o := range ops {
		trial.In(fmt.Sprintf("operation %d, %s", i, o), func() {
			w.step(o)
			w.recorded()
		})
	}
	w.end()
	w.recorded()
}

// op is an operation under way, with a source of chance of its own.
type op struct {
	*world
	Op
	r *rand.Rand
}

func (w *world) at(o Op) *op {
	return &op{w, o, rand.New(rand.NewPCG(uint64(o.A)<<32|uint64(o.B), uint64(o.C)<<32|uint64(o.D)))}
}

func (w *world) step(o Op) {
	m, k := w.images[o.Slot], kindOf(o.Kind)
	if (m == nil) != (k.needs == noImage) {
		return
	}
	if k.needs == noImage {
		k.do(w.at(o), nil)
		return
	}
	if w.undefined(m) && k.needs != nothing {
		if o.D%4 != 0 {
			return
		}
		if w.settle(m); w.images[o.Slot] != m {
			return
		}
	}
	if m.unknown && !m.closed {
		w.learn(m)
	}
	if k.needs == nodes {
		for x := m; x != nil; x = x.backing {
			w.jobsOver(x)
		}
		if w.images[o.Slot] != m {
			return // a job has made it superfluous
		}
	}
	k.do(w.at(o), m)
}

// did notes what an operation has come to.
func (w *world) did(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

// unique makes a name.
func (w *world) unique(prefix string) string {
	w.count++
	return fmt.Sprint(prefix, w.count)
}

// mustNode is node of an image that has one.
func (w *world) mustNode(m *image) *graph.Node {
	n := w.node(m)
	if n == nil {
		trial.Fail("%s has no node", m.name())
	}
	return n
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

// images are those that are there, by slot.
type images [slots]*image

// free is a slot without an image, or -1.
func (l *images) free() int { return slices.Index(l[:], nil) }

// dependents are the images that back on m; open ones only if so asked.
func (l *images) dependents(m *image, open bool) (on []*image) {
	for _, up := range l {
		if up != nil && up.backing == m && (!open || !up.closed) {
			on = append(on, up)
		}
	}
	return on
}

// prune closes what was open only for images above that are so no longer.
func (l *images) prune() {
	for again := true; again; {
		again = false
		for _, m := range l {
			if m != nil && !m.closed && !m.own && len(l.dependents(m, true)) == 0 {
				m.closed, again = true, true
			}
		}
	}
}

// expect checks the outcome of something that has to fail if fails is not "", and tells whether it
// has.
func expect(err error, fails string) (failed bool) {
	if fails == "" {
		trial.Must(err)
	} else if err == nil {
		trial.Fail("succeeded although %s", fails)
	}
	return fails != ""
}
