package mirror_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"qblockd/blockdev"
	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/mirror"
	"qblockd/schema/types"
)

const (
	granule = 64 << 10
	size    = 64 * granule
)

var modes = []types.MirrorCopyMode{types.MirrorCopyModeBackground, types.MirrorCopyModeWriteBlocking}

func noise(seed uint64) []byte {
	p := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range p {
		if i/granule%7 != 3 { // some granules stay zero
			p[i] = byte(r.Uint32())
		}
	}
	return p
}

// world is a source with a guest and a target.
type world struct {
	t              testing.TB
	g              *graph.Graph
	m              *jobs.Manager
	source, target *graph.Node
	from, to       *drivertest.MemFile
	fromF, toF     *drivertest.Fault
	guest          *graph.Root
	want           []byte // what the guest must read
	shape          string

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

// await waits for an event that satisfies is, or for the end of the job; it tells which.
func (w *world) await(is func(e events.Event) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := 0; ; i++ {
		for i >= len(w.events) {
			w.more.Wait()
		}
		if is(w.events[i]) {
			return true
		}
		if e, ok := w.events[i].(types.JobStatusChangeEvent); ok && e.Status == types.JobStatusConcluded {
			return false
		}
	}
}

func ready(e events.Event) bool { _, ok := e.(types.BlockJobReadyEvent); return ok }

func newWorld(t testing.TB) *world {
	g, _ := drivertest.NewGraphSink(t)
	w := &world{t: t, g: g, want: noise(1)}
	w.more = sync.NewCond(&w.mu)
	w.m = jobs.NewManager(w, nil)
	w.from, w.to = drivertest.MemFileOf(bytes.Clone(w.want)), drivertest.MemFileOf(noise(2))
	w.fromF, w.toF = drivertest.NewFault(w.from), drivertest.NewFault(w.to)
	w.source, w.target = drivertest.AddNode(t, g, "source", w.fromF), drivertest.AddNode(t, g, "target", w.toF)
	w.guest = drivertest.AddRoot(t, g, w.source, drivertest.Writer)
	w.shape = w.look()
	return w
}

// look is the graph as a text: edges, claims, bitmaps, blocked operations.
func (w *world) look() string {
	s := ""
	topology := w.g.Topology()
	for _, e := range topology.Edges {
		s += fmt.Sprintf("%s -%s-> %s %v frozen %v\n", e.Edge.Parent().Describe(), e.Edge.ChildName(), e.Node.Name(), e.Claim, e.Edge.Frozen())
	}
	for _, n := range topology.Nodes {
		s += fmt.Sprintf("%s ro %v bitmaps %d", n.Name(), n.ReadOnly(), len(n.DirtyBitmaps()))
		for op := graph.OpBackupSource; op <= graph.OpReplace; op++ {
			if err := n.Blocked(op); err != nil {
				s += " " + err.Error()
			}
		}
		s += "\n"
	}
	return s
}

func (w *world) args(mode types.MirrorCopyMode) types.BlockdevMirrorArgs {
	return types.BlockdevMirrorArgs{
		JobID: new("j"), Device: w.source.Name(), Target: w.target.Name(), Sync: types.MirrorSyncModeFull,
		CopyMode: &mode, AutoDismiss: new(false),
	}
}

func (w *world) begin(a types.BlockdevMirrorArgs) (release func(), err error) {
	j := mirror.FromArgs(blockdev.New(w.g, blockdev.Config{}), &a)
	return blockjob.Start(context.Background(), w.g, w.m, j)
}

func (w *world) start(a types.BlockdevMirrorArgs) *jobs.Job {
	w.t.Helper()
	release, err := w.begin(a)
	if err != nil {
		w.t.Fatal(err)
	}
	release()
	return w.m.Get("j")
}

// end waits for the job and requires that nothing of it is left, and that the guest is at the node
// of that name.
func (w *world) end(j *jobs.Job, guestAt string) error {
	w.t.Helper()
	select {
	case <-j.Finished():
	case <-time.After(time.Minute):
		w.t.Fatal("the job hangs")
	}
	w.fromF.Clear()
	w.toF.Clear()
	err := j.Err()
	if e := j.Dismiss(); e != nil {
		w.t.Error(e)
	}
	want := w.shape
	if guestAt == "target" {
		want = strings.Replace(want, "-root-> source", "-root-> target", 1)
	}
	if now := w.look(); now != want {
		w.t.Errorf("the graph is\n%s, want\n%s", now, want)
	}
	return err
}

func (w *world) write(root *graph.Root, off int64, p []byte) error {
	r, err := root.Begin(context.Background())
	if err != nil {
		return err
	}
	defer root.End(r)
	return root.WriteAt(r, blk.Buf(p), off, 0)
}

// guests write until stop is called: four of them, each to places of its own in every granule, so
// that what is to be read in the end is known.
func (w *world) guests(root *graph.Root) (stop func()) {
	const block = 4096
	var wg sync.WaitGroup
	over := make(chan struct{})
	for g := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 7))
			for i := 0; ; i++ {
				select {
				case <-over:
					return
				default:
				}
				at := r.Int64N(size/(4*block))*4*block + int64(g)*block
				n := 512 * (1 + r.Int64N(block/512))
				at += 512 * r.Int64N((block-n)/512+1)
				var err error
				if i%5 == 0 {
					clear(w.want[at : at+n])
					err = w.zero(root, at, n)
				} else {
					p := bytes.Repeat([]byte{byte(i), byte(g)}, int(n/2))
					copy(w.want[at:], p)
					err = w.write(root, at, p)
				}
				if err != nil {
					w.t.Errorf("a guest's write fails: %v", err)
					return
				}
			}
		})
	}
	return func() { close(over); wg.Wait() }
}

func (w *world) zero(root *graph.Root, off, n int64) error {
	r, err := root.Begin(context.Background())
	if err != nil {
		return err
	}
	defer root.End(r)
	return root.Zero(r, off, n, 0)
}
