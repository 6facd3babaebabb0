package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fault is the one I/O that fails: the at-th from arming among all of the file.
type fault struct {
	file  string
	at    int
	err   error
	after bool // the I/O takes effect all the same
	ops   drivertest.Op
	twice bool // the next one fails as well
}

func (f *fault) count() int {
	if f.twice {
		return 2
	}
	return 1
}

var sockets atomic.Int64

// env is a graph on files that can fail.
type env struct {
	*rig.Rig
	ctx    context.Context
	cs     int
	socket string      // abstract, of the NBD server
	root   *graph.Root // on top, if the scenario has one
	old    []byte      // what top shows before the scenario
	new    []byte      // and after it; sectors may be either when it has failed

	mu     sync.Mutex
	opened map[string][]*drivertest.Fault
	armed  *fault
	from   map[*drivertest.Fault]int64 // calls before arming
}

func newEnv(ctx context.Context, cs int) *env {
	socket := fmt.Sprintf("qblockd-faults-%d-%d", os.Getpid(), sockets.Add(1))
	e := &env{Rig: rig.New(""), ctx: ctx, cs: cs, socket: socket,
		opened: map[string][]*drivertest.Fault{}, from: map[*drivertest.Fault]int64{}}
	e.Store.Wrap(func(name string, d graph.Driver) graph.Driver {
		f := drivertest.NewFault(d)
		e.mu.Lock()
		defer e.mu.Unlock()
		if a := e.armed; a != nil && a.file == name {
			calls, failed := e.seen(name)
			if failed == 0 && calls <= int64(a.at) {
				f.Inject(drivertest.Rule{Ops: a.ops, Skip: a.at - int(calls), Count: a.count(), Err: a.err, AfterEffect: a.after})
			}
		}
		e.opened[name] = append(e.opened[name], f)
		return f
	})
	return e
}

// seen are the calls and failures of a file since arming. e.mu is held.
func (e *env) seen(name string) (calls, failed int64) {
	for _, f := range e.opened[name] {
		calls += f.Calls() - e.from[f]
		failed += f.Failed()
	}
	return calls, failed
}

// arm lets an I/O fail from now on. Of several nodes on a file, which read it in turns, the last is
// meant.
func (e *env) arm(a *fault) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.armed = a
	for _, l := range e.opened {
		for _, f := range l {
			e.from[f] = f.Calls()
		}
	}
	if l := e.opened[a.file]; len(l) > 0 {
		l[len(l)-1].Inject(drivertest.Rule{Ops: a.ops, Skip: a.at, Count: a.count(), Err: a.err, AfterEffect: a.after})
	}
}

// disarm ends that and tells whether the fault has struck.
func (e *env) disarm() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, failed := e.seen(e.armed.file)
	for _, f := range e.opened[e.armed.file] {
		f.Clear()
	}
	e.armed = nil
	return failed > 0
}

// dump is the graph as text: nodes, edges, claims, and how many files are open.
func (e *env) dump() string {
	var b bytes.Buffer
	t := e.Graph.Topology()
	for _, n := range t.Nodes {
		fmt.Fprintf(&b, "%s %s ro=%v owned=%v size=%d inflight=%d blocked=%v\n", n.Name(), n.DriverName(), n.ReadOnly(), n.MonitorOwned(),
			sizeOf(n), n.IO().InFlight(), n.Blocked(graph.OpStream))
	}
	for _, x := range t.Edges {
		fmt.Fprintf(&b, "%s -%s-> %s %v frozen=%v\n", x.Edge.Parent().Describe(), x.Edge.ChildName(), x.Node.Name(), x.Claim, x.Edge.Frozen())
	}
	for _, r := range t.Roots {
		fmt.Fprintf(&b, "root drained=%v inflight=%d\n", r.Drained(), r.InFlight())
	}
	fmt.Fprintf(&b, "%d files, %d jobs, %d exports\n", e.Store.Open(), len(e.Jobs.Query()), len(e.Exports.Query()))
	return b.String()
}

// sizeOf leaves out files: what a failed operation has made longer is a leak.
func sizeOf(n *graph.Node) int64 {
	if n.Kind() == graph.Protocol {
		return 0
	}
	return n.Size()
}

func (e *env) unit(f func(r *blk.Req) error) error {
	r, err := e.root.Begin(e.ctx)
	if err != nil {
		return err
	}
	defer e.root.End(r)
	return f(r)
}

func (e *env) write(p []byte, off int, f blk.Flags) error {
	return e.unit(func(r *blk.Req) error { return e.root.WriteAt(r, blk.Buf(p), int64(off), f) })
}

func (e *env) flush() error { return e.unit(e.root.Flush) }

// makeImage makes a qcow2 image of so many clusters.
func (e *env) makeImage(name string, clusters int, backing string, lazy bool) error {
	o := types.BlockdevCreateOptionsQcow2{Size: uint64(clusters * e.cs), ClusterSize: rig.Ptr(uint64(e.cs)),
		LazyRefcounts: &lazy}
	if backing != "" {
		o.BackingFile, o.BackingFmt = &backing, rig.Ptr(types.BlockdevDriverQcow2)
	}
	if e.cs == 512 {
		o.RefcountBits = rig.Ptr(int64(64)) // many refcount blocks
	}
	return errors.Join(e.MakeFile(name, 0, nil), e.CreateQcow2(e.ctx, name, o))
}

// options are those of a qcow2 node.
func (e *env) options(name string, backing *types.BlockdevRefOrNull) *types.BlockdevOptions {
	unmap := rig.Ptr(types.BlockdevDiscardOptionsUnmap)
	file := e.File(name)
	file.Definition.Discard = unmap
	return &types.BlockdevOptions{Driver: types.BlockdevDriverQcow2, NodeName: &name, Discard: unmap,
		U: &types.BlockdevOptionsQcow2{File: file, Backing: backing,
			L2CacheSize: rig.Ptr(int64(1)), L2CacheEntrySize: rig.Ptr(int64(512))}}
}

const clusters = 40

// chain makes base <- top: base is full, top has some data.
func (e *env) chain() error {
	if err := errors.Join(e.makeImage("base", clusters, "", false), e.makeImage("top", clusters, "base", false)); err != nil {
		return err
	}
	if err := e.fill("base", &types.BlockdevRefOrNull{Null: true}, func(e *env) error {
		return e.write(bytes.Repeat([]byte{1}, clusters*e.cs), 0, 0)
	}); err != nil {
		return err
	}
	e.old = bytes.Repeat([]byte{1}, clusters*e.cs)
	return e.fill("top", nil, func(e *env) error {
		for _, c := range []int{3, 4, 5, 20, 30} {
			p := bytes.Repeat([]byte{2}, e.cs)
			copy(e.old[c*e.cs:], p)
			if err := e.write(p, c*e.cs, 0); err != nil {
				return err
			}
		}
		return nil
	})
}

// fill opens an image, lets f write to it, and closes it.
func (e *env) fill(name string, backing *types.BlockdevRefOrNull, f func(e *env) error) error {
	if err := e.add(name, backing); err != nil {
		return err
	}
	return errors.Join(e.attach(name), f(e), e.detach(), e.Nodes.Del(e.ctx, name))
}

func (e *env) add(name string, backing *types.BlockdevRefOrNull) error {
	return e.Nodes.Add(e.ctx, e.options(name, backing))
}

func (e *env) attach(name string) (err error) {
	e.root, err = e.AttachRoot(e.ctx, e.Graph.Node(name), false)
	return err
}

func (e *env) detach() error {
	if e.root == nil {
		return nil
	}
	r := e.root
	e.root = nil
	return e.Graph.CloseRoot(e.ctx, r)
}

// guest is chain with top open and a guest on it.
func (e *env) guest() error {
	if err := e.chain(); err != nil {
		return err
	}
	return errors.Join(e.add("top", nil), e.attach("top"))
}

// read is all that top shows.
func (e *env) read() ([]byte, error) {
	p := make([]byte, e.root.Size())
	return p, e.unit(func(r *blk.Req) error { return e.root.ReadAt(r, blk.Buf(p), 0, 0) })
}

// contents checks what top shows: that of new, or, unless exact, each sector that of old or new.
// What was to be cut off and was not may be anything.
func (e *env) contents(exact bool) error {
	got, err := e.read()
	if err != nil {
		return err
	}
	if len(e.new) < len(e.old) && !exact {
		got = got[:len(e.new)]
	}
	at := func(p []byte, i int) []byte {
		if len(p) < i+512 {
			return nil
		}
		return p[i : i+512]
	}
	for i := 0; i < len(got); i += 512 {
		s := at(got, i)
		if bytes.Equal(s, at(e.new, i)) || !exact && (bytes.Equal(s, at(e.old, i))) {
			continue
		}
		return fmt.Errorf("sector %d begins with %d", i/512, s[0])
	}
	if exact && len(got) != len(e.new) {
		return fmt.Errorf("size %d instead of %d", len(got), len(e.new))
	}
	return nil
}
