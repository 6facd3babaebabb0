package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
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

// end waits for the job and requires that nothing of it is left, and that the guest is at the node of that name.
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

// guests write until stop is called: four of them, each to places of its own in every granule, so that what is to be read in the end is known.
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

// Guests write before, while and after the target takes the place of the source; nothing is lost.
func TestPivotUnderLoad(t *testing.T) {
	for _, mode := range modes {
		for range 5 {
			w := newWorld(t)
			stop := w.guests(w.guest)
			j := w.start(w.args(mode))
			if !w.await(ready) {
				t.Fatal(j.Err())
			}
			if err := j.Complete(context.Background()); err != nil {
				t.Fatal(err)
			}
			if err := w.end(j, "target"); err != nil {
				t.Fatal(err)
			}
			stop()
			if !bytes.Equal(w.to.Bytes(), w.want) {
				t.Fatalf("%s: the target is not what the guests wrote", mode)
			}
		}
	}
}

// A job that is ready and cancelled gently leaves the guests at the source, and a copy of it in the target.
func TestGentleCancel(t *testing.T) {
	for _, mode := range modes {
		w := newWorld(t)
		stop := w.guests(w.guest)
		j := w.start(w.args(mode))
		if !w.await(ready) {
			t.Fatal(j.Err())
		}
		stop()
		if err := j.Cancel(false); err != nil {
			t.Fatal(err)
		}
		if err := w.end(j, "source"); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.from.Bytes(), w.want) || !bytes.Equal(w.to.Bytes(), w.want) {
			t.Fatalf("%s: the disks are not what the guests wrote", mode)
		}
	}
}

// Writes that overlap, and writes past the filter, come in the same order to both sides.
func TestOverlappingWrites(t *testing.T) {
	for _, mode := range modes {
		for range 5 {
			w := newWorld(t)
			j := w.start(w.args(mode))
			past := drivertest.AddRoot(t, w.g, w.source, drivertest.Writer)
			var wg sync.WaitGroup
			for g := range 4 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(g), 11))
					root := w.guest
					if g == 3 {
						root = past
					}
					for i := range 300 {
						n := 512 * (1 + r.Int64N(64))
						if err := w.write(root, 512*r.Int64N(4*granule/512), bytes.Repeat([]byte{byte(i), byte(g)}, int(n/2))); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if !w.await(ready) {
				t.Fatal(j.Err())
			}
			line, _, _ := strings.Cut(w.shape, "\n")
			w.shape = line + "\n" + w.shape // of the other root
			j.Cancel(false)
			if err := w.end(j, "source"); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(w.from.Bytes(), w.to.Bytes()) {
				t.Fatalf("%s: the two sides differ", mode)
			}
		}
	}
}

// A mirror of a guest that never stops writing gets ready in write-blocking mode: each granule is copied once at most after the switch.
func TestWriteBlockingConverges(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	copied := map[int64]int{}
	w.fromF.Hook(func(op drivertest.Op, off, n int64) {
		if op == drivertest.OpRead {
			mu.Lock()
			defer mu.Unlock()
			for g := off / granule; g < (off+n+granule-1)/granule; g++ {
				copied[g]++
			}
		}
	})
	stop := w.guests(w.guest)
	j := w.start(w.args(types.MirrorCopyModeWriteBlocking))
	if !w.await(ready) {
		t.Fatal(j.Err())
	}
	mu.Lock()
	for g, n := range copied {
		if n > 2 { // once for what was there, once for what was written before the switch
			t.Errorf("granule %d was copied %d times", g, n)
		}
	}
	mu.Unlock()
	j.Cancel(true)
	stop()
	if err := w.end(j, "source"); !errors.Is(err, syscall.ECANCELED) {
		t.Error(err)
	}
}

// A job that waits to be finalized does not hold up its guests, and what they write meanwhile is not lost.
func TestWriteWhilePending(t *testing.T) {
	for _, mode := range modes {
		w := newWorld(t)
		a := w.args(mode)
		a.AutoFinalize = new(false)
		j := w.start(a)
		if !w.await(ready) {
			t.Fatal(j.Err())
		}
		if err := j.Complete(context.Background()); err != nil {
			t.Fatal(err)
		}
		w.await(func(e events.Event) bool { _, ok := e.(types.BlockJobPendingEvent); return ok })
		p := bytes.Repeat([]byte("written while pending "), 400000)[:8<<20>>1]
		if err := w.write(w.guest, 0, p[:size]); err != nil {
			t.Fatal(err)
		}
		copy(w.want, p)
		if err := j.Finalize(); err != nil {
			t.Fatal(err)
		}
		if err := w.end(j, "target"); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.to.Bytes(), w.want) {
			t.Errorf("%s: what was written while the job was pending is lost", mode)
		}
	}
}

// However the job ends, in whatever phase, nothing of it is left and the guest's data are what it wrote.
func TestEnds(t *testing.T) {
	type phase struct {
		name string
		hold func(w *world, a *types.BlockdevMirrorArgs)
		wait func(w *world, j *jobs.Job)
	}
	until := func(s types.JobStatus) func(e events.Event) bool {
		return func(e events.Event) bool { x, ok := e.(types.JobStatusChangeEvent); return ok && x.Status == s }
	}
	phases := []phase{
		{"running", func(w *world, a *types.BlockdevMirrorArgs) { a.Speed = new(int64(1)) }, func(w *world, j *jobs.Job) {}},
		{"paused", func(w *world, a *types.BlockdevMirrorArgs) { a.Speed = new(int64(1)) }, func(w *world, j *jobs.Job) {
			if err := j.Pause(); err != nil {
				w.t.Error(err)
			}
			w.await(until(types.JobStatusPaused))
		}},
		{"ready", func(*world, *types.BlockdevMirrorArgs) {}, func(w *world, j *jobs.Job) { w.await(ready) }},
		{"standby", func(*world, *types.BlockdevMirrorArgs) {}, func(w *world, j *jobs.Job) {
			w.await(ready)
			if err := j.Pause(); err != nil {
				w.t.Error(err)
			}
			w.await(until(types.JobStatusStandby))
		}},
		{"pending", func(_ *world, a *types.BlockdevMirrorArgs) { a.AutoFinalize = new(false) }, func(w *world, j *jobs.Job) {
			w.await(ready)
			if err := j.Complete(context.Background()); err != nil {
				w.t.Error(err)
			}
			w.await(until(types.JobStatusPending))
		}},
	}
	ends := []struct {
		name string
		do   func(w *world, j *jobs.Job)
		err  error
	}{
		{"cancel", func(w *world, j *jobs.Job) { j.Cancel(true) }, syscall.ECANCELED},
		{"source fails", func(w *world, j *jobs.Job) {
			w.fromF.Inject(drivertest.Rule{Ops: drivertest.OpRead})
			w.again(j)
		}, syscall.EIO},
		{"target fails", func(w *world, j *jobs.Job) {
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify})
			w.again(j)
		}, syscall.EIO},
		{"flush fails", func(w *world, j *jobs.Job) {
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpFlush})
			w.again(j)
		}, syscall.EIO},
		{"quit", func(w *world, j *jobs.Job) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := w.m.Shutdown(ctx); err != nil {
				w.t.Error(err)
			}
		}, syscall.ECANCELED},
	}
	for _, mode := range modes {
		for _, p := range phases {
			for _, e := range ends {
				if e.name == "source fails" && mode == types.MirrorCopyModeWriteBlocking && p.name != "running" && p.name != "paused" {
					continue // nothing is read any more
				}
				t.Run(fmt.Sprintf("%s/%s/%s", mode, p.name, e.name), func(t *testing.T) {
					w := newWorld(t)
					a := w.args(mode)
					p.hold(w, &a)
					j := w.start(a)
					p.wait(w, j)
					e.do(w, j)
					if e.name == "quit" {
						<-j.Finished()
						if err := j.Err(); !errors.Is(err, e.err) {
							t.Errorf("outcome: %v", err)
						}
						if now := w.look(); now != w.shape {
							t.Errorf("the graph is\n%s, want\n%s", now, w.shape)
						}
					} else if err := w.end(j, "source"); !errors.Is(err, e.err) {
						t.Errorf("outcome: %v", err)
					}
					if !bytes.Equal(w.from.Bytes(), w.want) {
						t.Error("the source is not what the guest wrote")
					}
				})
			}
		}
	}
}

// again lets the job do all it has to do, with something written first: it fails on its way.
func (w *world) again(j *jobs.Job) {
	p := bytes.Repeat([]byte("again"), 2000)
	if err := w.write(w.guest, 5*granule, p); err != nil {
		w.t.Error(err)
	}
	copy(w.want[5*granule:], p)
	j.SetSpeed(0)
	if j.UserPaused() {
		if err := j.Resume(); err != nil {
			w.t.Error(err)
		}
	}
	j.Complete(context.Background())
	j.Finalize()
}

// The i-th I/O of the job fails: it ends with that error, or, told to stop, goes on when it is resumed.
func TestFaults(t *testing.T) {
	for _, mode := range modes {
		for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorReport, types.BlockdevOnErrorStop} {
			for _, side := range []func(w *world) *drivertest.Fault{
				func(w *world) *drivertest.Fault { return w.fromF }, func(w *world) *drivertest.Fault { return w.toF },
			} {
				for i := 0; ; i++ {
					if !faultAt(t, mode, policy, side, i) {
						break
					}
				}
			}
		}
	}
}

// faultAt tells whether there was an i-th I/O.
func faultAt(t *testing.T, mode types.MirrorCopyMode, policy types.BlockdevOnError, side func(w *world) *drivertest.Fault, i int) bool {
	w := newWorld(t)
	f := side(w)
	f.FailAt(i, syscall.EIO)
	a := w.args(mode)
	a.OnSourceError, a.OnTargetError = &policy, &policy
	j := w.start(a)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			seen := 0
			if !w.await(func(e events.Event) bool {
				x, ok := e.(types.JobStatusChangeEvent)
				if ok && x.Status == types.JobStatusPaused || ok && x.Status == types.JobStatusStandby {
					seen++
				}
				return seen > n
			}) {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			h, err := w.g.HoldNodes(ctx, w.source, w.target)
			if err != nil {
				t.Errorf("a job that waits for users keeps them from its nodes: %v", err)
			}
			h.Release()
			cancel()
			j.Resume()
		}
	}()
	at := "source"
	if w.await(ready) {
		p := bytes.Repeat([]byte("late"), 4096)
		err := w.write(w.guest, 10*granule+512, p)
		if err == nil {
			copy(w.want[10*granule+512:], p)
		} else if side(w) == w.toF {
			t.Errorf("a guest's write fails with the target: %v", err)
		}
		j.Complete(context.Background())
	}
	<-j.Finished()
	failed := f.Failed() > 0
	if j.Err() == nil {
		at = "target"
	}
	err := w.end(j, at)
	<-done
	if err != nil && (policy == types.BlockdevOnErrorStop || !failed || !errors.Is(err, syscall.EIO)) {
		t.Fatalf("%s, %s: I/O %d fails: %v", mode, policy, i, err)
	}
	if err == nil && !bytes.Equal(w.to.Bytes(), w.want) && !bytes.Equal(w.to.Bytes(), w.from.Bytes()) {
		t.Fatalf("%s, %s: I/O %d fails: the target differs", mode, policy, i)
	}
	return failed
}

// A job that is paused when it is told to complete does so when it is resumed.
func TestCompleteInStandby(t *testing.T) {
	w := newWorld(t)
	j := w.start(w.args(types.MirrorCopyModeBackground))
	if !w.await(ready) {
		t.Fatal(j.Err())
	}
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	w.await(func(e events.Event) bool {
		x, ok := e.(types.JobStatusChangeEvent)
		return ok && x.Status == types.JobStatusStandby
	})
	if err := j.Complete(context.Background()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-j.Finished():
		t.Error("a job ends while it is paused")
	default:
	}
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := w.end(j, "target"); err != nil {
		t.Error(err)
	}
}

// Of two that start at the same time on the same source one is refused, and nothing of it is left.
func TestTwoAtOnce(t *testing.T) {
	for range 20 {
		w := newWorld(t)
		targets := []*graph.Node{w.target, drivertest.AddNode(t, w.g, "other", drivertest.MemFileOf(noise(3)))}
		w.shape = w.look()
		var wg sync.WaitGroup
		var errs [2]error
		for i := range errs {
			wg.Go(func() {
				a := w.args(types.MirrorCopyModeBackground)
				a.JobID, a.Target = new(fmt.Sprint("j", i)), targets[i].Name()
				release, err := w.begin(a)
				if errs[i] = err; err == nil {
					release()
				}
			})
		}
		wg.Wait()
		if (errs[0] == nil) == (errs[1] == nil) {
			t.Fatalf("%v, %v", errs[0], errs[1])
		}
		j := w.m.Get("j0")
		if errs[0] != nil {
			j = w.m.Get("j1")
		}
		_ = j.Cancel(true)
		if err := w.end(j, "source"); err != nil && !errors.Is(err, syscall.ECANCELED) {
			t.Fatal(err)
		}
	}
}
