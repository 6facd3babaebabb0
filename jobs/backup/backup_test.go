package backup_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/graph/transaction"
	"qblockd/jobs"
	"qblockd/jobs/backup"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

const (
	cluster = 64 << 10
	size    = 64 * cluster
)

func noise(seed uint64) []byte {
	p := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i < len(p)/cluster; i++ {
		if i%7 != 3 { // some clusters stay zero
			for k := 0; k < cluster; k += 8 {
				binary.LittleEndian.PutUint64(p[i*cluster+k:], r.Uint64())
			}
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
	want           []byte
	shape          string
	stops          chan struct{} // one for each error that stopped a job
	states         chan struct{} // one for each state of a job
}

// stops tells of errors that stop a job, and of states, besides what the sink inside does.
type stops struct {
	events.Sink
	tell, states chan struct{}
}

func (s stops) Emit(e events.Event) {
	s.Sink.Emit(e)
	if x, ok := e.(types.BlockJobErrorEvent); ok && x.Action == types.BlockErrorActionStop {
		s.tell <- struct{}{}
	}
	if _, ok := e.(types.JobStatusChangeEvent); ok {
		s.states <- struct{}{}
	}
}

func newWorld(t testing.TB) *world {
	from, to := noise(1), noise(2)
	return newWorldOf(t, drivertest.MemFileOf(from), drivertest.MemFileOf(to), from)
}

// newWorldOf is newWorld with other files, the first with content.
func newWorldOf(t testing.TB, from *drivertest.MemFile, to graph.Driver, content []byte) *world {
	g, sink := drivertest.NewGraphSink(t)
	w := &world{
		t: t, g: g, want: bytes.Clone(content), from: from,
		stops: make(chan struct{}, 100), states: make(chan struct{}, 1000),
	}
	w.m = jobs.NewManager(stops{sink, w.stops, w.states}, nil)
	w.to, _ = to.(*drivertest.MemFile)
	w.fromF, w.toF = drivertest.NewFault(from), drivertest.NewFault(to)
	w.source, w.target = drivertest.AddNode(t, g, "source", w.fromF), drivertest.AddNode(t, g, "target", w.toF)
	w.guest = drivertest.AddRoot(t, g, w.source, drivertest.Writer)
	w.shape = jobtest.Look(w.g)
	return w
}

func (w *world) args() types.BlockdevBackup {
	return types.BlockdevBackup{
		JobID: new("j"), Device: w.source.Name(), Target: w.target.Name(), Sync: types.MirrorSyncModeFull,
		AutoDismiss: new(false), XPerf: &types.BackupPerf{},
	}
}

func (w *world) step(a types.BlockdevBackup) *backup.Step {
	return backup.FromArgs(blockdev.New(w.g, blockdev.Config{}), w.m, &a)
}

func (w *world) start(a types.BlockdevBackup) *jobs.Job {
	w.t.Helper()
	return w.run(w.step(a))
}

func (w *world) run(s *backup.Step) *jobs.Job {
	w.t.Helper()
	if err := transaction.Run(context.Background(), w.g, s); err != nil {
		w.t.Fatal(err)
	}
	s.Release()
	return w.m.Get("j")
}

// end waits for the job and requires that nothing of it is left.
func (w *world) end(j *jobs.Job) error {
	w.t.Helper()
	err := jobtest.Finish(w.t, j, w.fromF, w.toF)
	if now := jobtest.Look(w.g); now != w.shape {
		w.t.Errorf("the graph is\n%s, it was\n%s", now, w.shape)
	}
	return err
}

// scribble writes anywhere, in several goroutines, until stop is closed.
// first is closed after the first write.
func (w *world) scribble(stop <-chan struct{}) (wg *sync.WaitGroup, first chan struct{}) {
	wg, first = &sync.WaitGroup{}, make(chan struct{})
	var once sync.Once
	for g := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 7))
			p := bytes.Repeat([]byte{byte(0x80 + g)}, 3*cluster)
			for {
				select {
				case <-stop:
					return
				default:
				}
				n := 512 * (1 + r.Int64N(int64(len(p))/512))
				if err := jobtest.Write(w.guest, r.Int64N((size-n)/512)*512, p[:n]); err != nil {
					w.t.Error(err)
					return
				}
				once.Do(func() { close(first) })
			}
		})
	}
	return wg, first
}

// The target shows the source as it was when the job started, whatever guests write meanwhile.
func TestPointInTime(t *testing.T) {
	for i := range 20 {
		w := newWorld(t)
		s := w.step(w.args())
		if err := transaction.Run(context.Background(), w.g, s); err != nil {
			t.Fatal(err)
		}
		j, stop := w.m.Get("j"), make(chan struct{})
		wg, first := w.scribble(stop)
		if i%2 == 0 {
			<-first // guests come before the job
		}
		s.Release()
		if err := w.end(j); err != nil {
			t.Fatal(err)
		}
		close(stop)
		wg.Wait()
		if !bytes.Equal(w.to.Bytes(), w.want) {
			t.Fatal("the target differs")
		}
	}
}

// Copies fail now and then while guests write: a guest's write may fail, but none goes through
// before what it overwrites is safe.
func TestFailingCopiesUnderLoad(t *testing.T) {
	for range 10 {
		w := newWorld(t)
		w.toF.Hook(func(drivertest.Op, int64, int64) { runtime.Gosched() })
		for i := range 40 {
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify, Skip: 3 * i % 7, Count: 1})
		}
		a := w.args()
		a.OnTargetError = new(types.BlockdevOnErrorIgnore) // that is: again
		s := w.step(a)
		if err := transaction.Run(context.Background(), w.g, s); err != nil {
			t.Fatal(err)
		}
		j := w.m.Get("j")
		var guests sync.WaitGroup
		stop := make(chan struct{})
		for g := range 4 {
			guests.Go(func() {
				r := rand.New(rand.NewPCG(uint64(g), 9))
				p := bytes.Repeat([]byte{0xee}, 4096)
				for {
					select {
					case <-stop:
						return
					default:
					}
					if err := jobtest.Write(w.guest, r.Int64N(size/4096)*4096, p); err != nil && !errors.Is(err, syscall.EIO) {
						t.Error(err)
						return
					}
				}
			})
		}
		s.Release()
		err := w.end(j)
		close(stop)
		guests.Wait()
		if err != nil || !bytes.Equal(w.to.Bytes(), w.want) {
			t.Fatalf("%v, or the target differs", err)
		}
	}
}

// Two disks are cut at the same point: a guest that writes the next number to one after the other
// is found between two numbers.
func TestConsistentCut(t *testing.T) {
	for range 20 {
		a, b := newWorld(t), (*world)(nil)
		b = &world{t: t, g: a.g, m: a.m, from: drivertest.NewMemFile(size), to: drivertest.NewMemFile(size)}
		b.source, b.target = drivertest.AddNode(t, a.g, "source2", b.from), drivertest.AddNode(t, a.g, "target2", b.to)
		b.guest = drivertest.AddRoot(t, a.g, b.source, drivertest.Writer)
		a.shape = jobtest.Look(a.g)
		var wg sync.WaitGroup
		stop, running := make(chan struct{}), make(chan struct{})
		wg.Go(func() {
			var n [8]byte
			for i := uint64(0); ; i++ {
				binary.LittleEndian.PutUint64(n[:], i)
				for _, w := range []*world{a, b} {
					if err := jobtest.Write(w.guest, 5*cluster+512, n[:]); err != nil {
						t.Error(err)
						return
					}
				}
				if i == 20 {
					close(running)
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		<-running
		argsA, argsB := a.args(), b.args()
		argsB.JobID = new("k")
		sa, sb := a.step(argsA), a.step(argsB)
		if err := transaction.Run(context.Background(), a.g, sa, sb); err != nil {
			t.Fatal(err)
		}
		sa.Release()
		sb.Release()
		k := a.m.Get("k")
		<-k.Finished()
		if err := errors.Join(k.Err(), k.Dismiss(), a.end(a.m.Get("j"))); err != nil {
			t.Fatal(err)
		}
		close(stop)
		wg.Wait()
		at := func(w *world) uint64 { return binary.LittleEndian.Uint64(w.to.Bytes()[5*cluster+512:]) }
		if d := at(a) - at(b); d > 1 {
			t.Fatalf("%d on one disk, %d on the other", at(a), at(b))
		}
	}
}

// A target that is closed with the job is flushed first, by the policy: nobody else can.
func TestClosedTargetIsFlushed(t *testing.T) {
	for _, c := range []struct {
		closes bool
		policy types.BlockdevOnError
		err    error
	}{
		{true, types.BlockdevOnErrorReport, syscall.EIO},
		{true, types.BlockdevOnErrorIgnore, nil},
		{false, types.BlockdevOnErrorReport, nil},
	} {
		w := newWorld(t)
		w.toF.Inject(drivertest.Rule{Ops: drivertest.OpFlush})
		a := w.args()
		a.OnTargetError = &c.policy
		s := w.step(a)
		if c.closes {
			s.ClosesTarget()
		}
		if err := w.end(w.run(s)); !errors.Is(err, c.err) {
			t.Errorf("closes %v, policy %s: outcome: %v", c.closes, c.policy, err)
		}
	}
}

// However the job ends, nothing of it is left, the guest's data are untouched, and the bitmap holds
// what the next backup needs.
func TestEnds(t *testing.T) {
	dirty := func(w *world) int64 { return w.source.Bitmaps().Find("b").Bits().Count() }
	for _, c := range []struct {
		name  string
		mode  types.BitmapSyncMode
		end   func(w *world, j *jobs.Job)
		err   error
		dirty int64 // clusters at the end, of 4 at the start and 1 written meanwhile
	}{
		{"success", types.BitmapSyncModeOnSuccess, func(w *world, j *jobs.Job) {}, nil, 1},
		{"success, never", types.BitmapSyncModeNever, func(w *world, j *jobs.Job) {}, nil, 5},
		{"source fails", types.BitmapSyncModeOnSuccess, func(w *world, j *jobs.Job) {
			w.fromF.Inject(drivertest.Rule{Ops: drivertest.OpRead})
		}, syscall.EIO, 5},
		{"target fails", types.BitmapSyncModeOnSuccess, func(w *world, j *jobs.Job) {
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify})
		}, syscall.EIO, 5},
		{"target fails, always", types.BitmapSyncModeAlways, func(w *world, j *jobs.Job) {
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify})
		}, syscall.EIO, 5},
		{"flush fails", types.BitmapSyncModeOnSuccess, func(w *world, j *jobs.Job) {
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpFlush})
		}, syscall.EIO, 5},
		{"cancelled", types.BitmapSyncModeOnSuccess, func(w *world, j *jobs.Job) { j.Cancel(true) }, syscall.ECANCELED, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			b, err := w.source.Bitmaps().New(graph.DirtyBitmapSpec{Name: "b", Granularity: cluster})
			if err != nil {
				t.Fatal(err)
			}
			b.Bits().Set(8*cluster, 4*cluster)
			w.shape = jobtest.Look(w.g)
			a := w.args()
			a.Sync, a.Bitmap, a.BitmapMode = types.MirrorSyncModeBitmap, new(b.Name()), &c.mode
			s := w.step(a)
			if err := transaction.Run(context.Background(), w.g, s); err != nil {
				t.Fatal(err)
			}
			if err := b.Check(graph.BitmapRead); err == nil {
				t.Error("the bitmap of a running job can be used")
			}
			if err := jobtest.Write(w.guest, 30*cluster, []byte("guest")); err != nil {
				t.Fatal(err)
			}
			copy(w.want[30*cluster:], "guest")
			j := w.m.Get("j")
			c.end(w, j)
			s.Release()
			if err := w.end(j); !errors.Is(err, c.err) {
				t.Errorf("outcome: %v", err)
			}
			if dirty(w) != c.dirty*cluster {
				t.Errorf("%d clusters are dirty, want %d", dirty(w)/cluster, c.dirty)
			}
			if !bytes.Equal(w.from.Bytes(), w.want) {
				t.Error("the source has changed")
			}
			if c.err == nil && !bytes.Equal(w.to.Bytes()[8*cluster:12*cluster], w.want[8*cluster:12*cluster]) {
				t.Error("the target does not hold what was dirty")
			}
		})
	}
}

// resume lets the job go on whenever an error has stopped it, until it is finished.
func (w *world) resume(j *jobs.Job) {
	for {
		select {
		case <-w.stops:
			if err := j.Resume(); err != nil {
				w.t.Error(err)
			}
		case <-j.Finished():
			return
		}
	}
}

// The i-th I/O of the job fails: it ends with that error, or, told to ignore or to stop, goes on.
func TestFaults(t *testing.T) {
	for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorReport, types.BlockdevOnErrorStop} {
		for _, side := range []func(w *world) *drivertest.Fault{
			func(w *world) *drivertest.Fault { return w.fromF }, func(w *world) *drivertest.Fault { return w.toF },
		} {
			for i := 0; ; i++ {
				w := newWorld(t)
				f := side(w)
				f.FailAt(i, syscall.EIO)
				a := w.args()
				a.OnSourceError, a.OnTargetError = &policy, &policy
				j := w.start(a)
				if policy == types.BlockdevOnErrorStop {
					w.resume(j)
				}
				err := w.end(j)
				failed := f.Failed() > 0
				reported := policy == types.BlockdevOnErrorReport && failed
				if reported && !errors.Is(err, syscall.EIO) || (!failed || policy == types.BlockdevOnErrorStop) && err != nil {
					t.Fatalf("I/O %d fails: %v", i, err)
				}
				if err == nil && !bytes.Equal(w.to.Bytes(), w.want) {
					t.Fatalf("I/O %d fails: the target differs", i)
				}
				if !failed {
					break
				}
			}
		}
	}
}

// canceller is a step of a transaction that cancels a job.
type canceller struct {
	transaction.Noop
	m *jobs.Manager
}

func (c canceller) Commit() { _ = c.m.Get("j").Cancel(true) }

// A job that is cancelled before it has started ends while its command is still at it, and does not
// wait for that.
func TestCancelledBeforeTheStart(t *testing.T) {
	w := newWorld(t)
	s := w.step(w.args())
	if err := transaction.Run(context.Background(), w.g, canceller{m: w.m}, s); err != nil {
		t.Fatal(err)
	}
	j := w.m.Get("j")
	s.Release()
	if err := w.end(j); !errors.Is(err, jobs.ErrCancelled) {
		t.Error(err)
	}
}
