package mirror_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/jobtest"
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
	*jobtest.Events
}

func ready(e events.Event) bool { _, ok := e.(types.BlockJobReadyEvent); return ok }

func newWorld(t testing.TB) *world {
	g, _ := drivertest.NewGraphSink(t)
	w := &world{t: t, g: g, want: noise(1), Events: jobtest.NewEvents()}
	w.m = jobs.NewManager(w, nil)
	w.from, w.to = drivertest.MemFileOf(bytes.Clone(w.want)), drivertest.MemFileOf(noise(2))
	w.fromF, w.toF = drivertest.NewFault(w.from), drivertest.NewFault(w.to)
	w.source, w.target = drivertest.AddNode(t, g, "source", w.fromF), drivertest.AddNode(t, g, "target", w.toF)
	w.guest = drivertest.AddRoot(t, g, w.source, drivertest.Writer)
	w.shape = jobtest.Look(w.g)
	return w
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
	err := jobtest.Finish(w.t, j, w.fromF, w.toF)
	want := w.shape
	if guestAt == "target" {
		want = strings.Replace(want, "-root-> source", "-root-> target", 1)
	}
	if now := jobtest.Look(w.g); now != want {
		w.t.Errorf("the graph is\n%s, want\n%s", now, want)
	}
	return err
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
					err = jobtest.Zero(root, at, n)
				} else {
					p := bytes.Repeat([]byte{byte(i), byte(g)}, int(n/2))
					copy(w.want[at:], p)
					err = jobtest.Write(root, at, p)
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
