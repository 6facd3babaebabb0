package commit_test

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"sync"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/commit"
	"qblockd/jobs/jobtest"
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
	*jobtest.Events
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
	w := &world{
		t: t, g: g, base: base, active: active, Events: jobtest.NewEvents(),
		nodes: map[string]*graph.Node{}, files: map[string]*drivertest.Fault{},
	}
	w.m = jobs.NewManager(w, nil)
	for i, l := range chain {
		w.layer(i)
		jobtest.Visit(t, w.nodes[l.name], func(root *graph.Root) error {
			for _, c := range l.written {
				w.write(root, int64(c)*cluster+512, bytes.Repeat([]byte{byte(16*i + c)}, cluster-512))
			}
			if l.name == "base" {
				for c := 10; c < min(base, seen); c++ {
					w.write(root, int64(c)*cluster, bytes.Repeat([]byte{0xba}, cluster))
				}
			}
			for _, c := range l.zeroed {
				if err := jobtest.Zero(root, int64(c)*cluster, cluster); err != nil {
					return err
				}
			}
			return nil
		})
	}
	w.guest = drivertest.AddRoot(t, g, w.nodes["active"], drivertest.Writer)
	w.want = w.read()
	w.shape = jobtest.Look(w.g)
	return w
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
	var below *graph.Node
	if i > 0 {
		below = w.nodes[chain[i-1].name]
	}
	w.nodes[l.name] = jobtest.Layer(w.t, w.g, l.name, w.files[l.name], int64(l.clusters)*cluster, below)
}

func (w *world) write(root *graph.Root, off int64, p []byte) {
	w.t.Helper()
	if err := jobtest.Write(root, off, p); err != nil {
		w.t.Error(err)
	}
}

func (w *world) read() []byte {
	w.t.Helper()
	p := make([]byte, max(min(w.active, seen), 16)*cluster)
	if err := jobtest.Read(w.guest, 0, p[:min(w.guest.Node().Size(), int64(len(p)))]); err != nil {
		w.t.Error(err)
	}
	return p
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
	return types.BlockCommitArgs{
		JobID: new("j"), Device: "active", TopNode: new("top"), BaseNode: new("base"), AutoDismiss: new(false),
	}
}

func (w *world) manager() *blockdev.Manager {
	return blockdev.New(w.g, blockdev.Config{Drivers: drivers.All})
}

func (w *world) begin(a types.BlockCommitArgs) (release func(), err error) {
	return blockjob.Start(context.Background(), w.g, w.m, commit.FromArgs(w.manager(), &a))
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
	return jobtest.Finish(w.t, j, slices.Collect(maps.Values(w.files))...)
}

// committed requires that the job has done what it should, and that nothing else of it is left.
func (w *world) committed(j *jobs.Job) {
	w.t.Helper()
	if err := w.finished(j); err != nil {
		w.t.Fatal(err)
	}
	active, base := w.nodes["active"], w.nodes["base"]
	want, _, err := w.manager().HeaderName(graph.Now, base)
	if err != nil {
		w.t.Error(err)
	}
	name, format := active.Driver().(graph.Backed).BackingFile()
	if name != want || format != "qcow2" || active.Backing().Node() != base {
		w.t.Errorf("the overlay is over %s (%s)", name, format)
	}
	if !bytes.Equal(w.read(), w.want) {
		w.t.Error("what a guest reads has changed")
	}
	if base.Size() != int64(max(w.base, 12))*cluster {
		w.t.Errorf("the base has %d bytes", base.Size())
	}
	l := base.Parents() // the other layer is the user's, and stays over it
	if len(l) != 2 || l[0].ParentNode() != active && l[1].ParentNode() != active {
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
