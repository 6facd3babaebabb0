package commit_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/commit"

	"qblockd/schema/types"
)

const cluster = 64 << 10

// world is a chain of four images, of which the upper two hide parts of those below, and a guest.
type world struct {
	t     testing.TB
	g     *graph.Graph
	m     *jobs.Manager
	nodes map[string]*graph.Node
	files map[string]*drivertest.Fault
	guest *graph.Root
	want  []byte // what the guest must read
	shape string
	// base and active are the clusters of the lowest and the topmost layer.
	base, active int

	mu     sync.Mutex
	events []events.Event
	more   *sync.Cond
}

// Emit implements events.Sink.
func (w *world) Emit(e events.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, e)
	w.more.Broadcast()
}

// await waits until the job has come to a state, or to its end; it tells which.
func (w *world) await(s types.JobStatus) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := 0; ; i++ {
		for i >= len(w.events) {
			w.more.Wait()
		}
		if e, ok := w.events[i].(types.JobStatusChangeEvent); ok {
			if e.Status == s {
				return true
			}
			if e.Status == types.JobStatusConcluded {
				return false
			}
		}
	}
}

var chain = []struct {
	name     string
	clusters int
	written  []int // clusters
	zeroed   []int
}{
	{"base", 10, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, nil},
	{"mid", 14, []int{1, 2, 12}, []int{5}},
	{"top", 12, []int{2, 3, 11}, []int{6}},
	{"active", 16, []int{8, 15}, []int{9}},
}

func newWorld(t testing.TB) *world { return newWorldOf(t, chain[0].clusters, chain[3].clusters) }

// seen is how many clusters are looked at, of disks that are longer.
const seen = 40

// newWorldOf makes base and active layer of that many clusters.
func newWorldOf(t testing.TB, base, active int) *world {
	g, _ := drivertest.NewGraphSink(t)
	w := &world{t: t, g: g, base: base, active: active, nodes: map[string]*graph.Node{}, files: map[string]*drivertest.Fault{}}
	w.more = sync.NewCond(&w.mu)
	w.m = jobs.NewManager(w, nil)
	for i, l := range chain {
		w.layer(i)
		root := w.root(w.nodes[l.name])
		for _, c := range l.written {
			w.write(root, int64(c)*cluster+512, bytes.Repeat([]byte{byte(16*i + c)}, cluster-512))
		}
		if l.name == "base" {
			for c := 10; c < min(base, seen); c++ {
				w.write(root, int64(c)*cluster, bytes.Repeat([]byte{0xba}, cluster))
			}
		}
		r, err := root.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range l.zeroed {
			if err := root.Zero(r, int64(c)*cluster, cluster, 0); err != nil {
				t.Fatal(err)
			}
		}
		root.End(r)
		if l.name != "active" {
			if err := g.CloseRoot(context.Background(), root); err != nil {
				t.Fatal(err)
			}
		} else {
			w.guest = root
		}
	}
	w.want = w.read()
	w.shape = w.look()
	return w
}

func (w *world) root(n *graph.Node) *graph.Root {
	tx := w.g.Begin(context.Background())
	defer tx.Abort()
	root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return root
}

// layer makes the i-th image over the one before.
func (w *world) layer(i int) {
	l := chain[i]
	switch i {
	case 0:
		l.clusters = w.base
	case 3:
		l.clusters = w.active
	}
	w.files[l.name] = drivertest.NewFault(drivertest.NewMemFile(0))
	file := drivertest.AddNode(w.t, w.g, l.name+"-file", w.files[l.name])
	ref := file.Name()
	o := types.BlockdevCreateOptionsQcow2{File: types.BlockdevRef{Reference: &ref}, Size: uint64(l.clusters * cluster)}
	kids := []drivertest.Child{drivertest.File(file)}
	if i > 0 {
		below, format := chain[i-1].name, types.BlockdevDriverQcow2
		o.BackingFile, o.BackingFmt = &below, &format
		kids = append(kids, drivertest.Backing(w.nodes[below]))
	}
	m := blockdev.New(w.g, blockdev.Config{Drivers: drivers.All})
	if err := m.Creator(&types.BlockdevCreateOptions{Driver: types.BlockdevDriverQcow2, U: &o})(context.Background(), nil); err != nil {
		w.t.Fatal(err)
	}
	w.nodes[l.name] = drivertest.MustBuild(w.t, w.g, drivertest.Spec{
		Options: graph.Options{Name: l.name, DriverName: "qcow2", Kind: graph.Format}, Children: kids, Open: qcow2.Def.With(&types.BlockdevOptionsQcow2{})})
}

func (w *world) write(root *graph.Root, off int64, p []byte) {
	w.t.Helper()
	r, err := root.Begin(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	defer root.End(r)
	if err := root.WriteAt(r, blk.Buf(p), off, 0); err != nil {
		w.t.Error(err)
	}
}

func (w *world) read() []byte {
	w.t.Helper()
	r, err := w.guest.Begin(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	defer w.guest.End(r)
	p := make([]byte, max(min(w.active, seen), 16)*cluster)
	if err := w.guest.ReadAt(r, blk.Buf(p[:min(w.guest.Node().Size(), int64(len(p)))]), 0, 0); err != nil {
		w.t.Error(err)
	}
	return p
}

// look is the graph as a text: edges, claims, what headers name, blocked operations.
func (w *world) look() string {
	s := ""
	topology := w.g.Topology()
	for _, e := range topology.Edges {
		s += fmt.Sprintf("%s -%s-> %s %v frozen %v\n", e.Edge.Parent().Describe(), e.Edge.ChildName(), e.Node.Name(), e.Claim, e.Edge.Frozen())
	}
	for _, n := range topology.Nodes {
		s += fmt.Sprintf("%s ro %v bitmaps %d", n.Name(), n.ReadOnly(), len(n.DirtyBitmaps()))
		if b, ok := n.Driver().(graph.Backed); ok {
			name, format := b.BackingFile()
			s += " over " + name + " " + format
		}
		for op := graph.OpBackupSource; op <= graph.OpReplace; op++ {
			if err := n.Blocked(op); err != nil {
				s += " " + err.Error()
			}
		}
		s += "\n"
	}
	return s
}

// readers read all of the disk, over and over, until stop is called: it never changes.
func (w *world) readers() (stop func()) {
	over := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				if !bytes.Equal(w.read(), w.want) {
					w.t.Error("what a guest reads has changed")
					return
				}
			}
		})
	}
	return func() { close(over); wg.Wait() }
}

func (w *world) args() types.BlockCommitArgs {
	return types.BlockCommitArgs{JobID: new("j"), Device: "active", TopNode: new("top"), BaseNode: new("base"), AutoDismiss: new(false)}
}

func (w *world) begin(a types.BlockCommitArgs) (release func(), err error) {
	return blockjob.Start(context.Background(), w.g, w.m, commit.FromArgs(blockdev.New(w.g, blockdev.Config{Drivers: drivers.All}), &a))
}

func (w *world) start(a types.BlockCommitArgs) *jobs.Job {
	w.t.Helper()
	release, err := w.begin(a)
	if err != nil {
		w.t.Fatal(err)
	}
	release()
	return w.m.Get("j")
}

// finished waits for the job and returns its outcome.
func (w *world) finished(j *jobs.Job) error {
	w.t.Helper()
	select {
	case <-j.Finished():
	case <-time.After(time.Minute):
		w.t.Fatal("the job hangs")
	}
	for _, f := range w.files {
		f.Clear()
	}
	err := j.Err()
	if e := j.Dismiss(); e != nil {
		w.t.Error(e)
	}
	return err
}

// committed requires that the job has done what it should, and that nothing else of it is left.
func (w *world) committed(j *jobs.Job) {
	w.t.Helper()
	if err := w.finished(j); err != nil {
		w.t.Fatal(err)
	}
	active, base := w.nodes["active"], w.nodes["base"]
	want, _, err := blockdev.New(w.g, blockdev.Config{Drivers: drivers.All}).HeaderName(graph.Now, base)
	if err != nil {
		w.t.Error(err)
	}
	if name, format := active.Driver().(graph.Backed).BackingFile(); name != want || format != "qcow2" || active.Backing().Node() != base {
		w.t.Errorf("the overlay is over %s (%s)", name, format)
	}
	if !bytes.Equal(w.read(), w.want) {
		w.t.Error("what a guest reads has changed")
	}
	if base.Size() != int64(max(w.base, 12))*cluster {
		w.t.Errorf("the base has %d bytes", base.Size())
	}
	if l := base.Parents(); len(l) != 2 || l[0].ParentNode() != active && l[1].ParentNode() != active { // the other layer is the user's, and stays over it
		w.t.Errorf("the base has %d parents", len(l))
	}
	for _, n := range []*graph.Node{active, base} {
		for op := graph.OpBackupSource; op <= graph.OpReplace; op++ {
			if err := n.Blocked(op); err != nil && op != graph.OpCommitTarget && n != base {
				w.t.Error(err)
			}
		}
	}
}
