package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/transaction"
	"qblockd/jobs"
	"qblockd/jobs/backup"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// ending is a way for a job to end.
type ending struct {
	name    string
	ignore  bool // of errors at the target
	manual  bool // it waits to be finalized
	arm     func(w *world)
	act     func(w *world, j *jobs.Job)
	outcome error
}

// halfway lets the job fail, or be cancelled, after some clusters.
func halfway(w *world, f *drivertest.Fault, op drivertest.Op, do func()) {
	n := 0
	f.Hook(func(o drivertest.Op, _, _ int64) {
		if o&op != 0 {
			if n++; n == 3 {
				do()
			}
		}
	})
}

func endings() []ending {
	const changes = drivertest.OpWrite | drivertest.OpZero
	failing := func(f func(w *world) *drivertest.Fault, ops drivertest.Op, skip int) func(w *world) {
		return func(w *world) { f(w).Inject(drivertest.Rule{Ops: ops, Skip: skip}) }
	}
	from, to := func(w *world) *drivertest.Fault { return w.fromF }, func(w *world) *drivertest.Fault { return w.toF }
	return []ending{
		{name: "success"},
		{name: "cancelled at once", act: func(w *world, j *jobs.Job) { _ = j.Cancel(true) }, outcome: syscall.ECANCELED},
		{name: "cancelled halfway", arm: func(w *world) {
			halfway(w, w.toF, changes, func() {
				if j := w.m.Get("j"); j != nil {
					go func() { _ = j.Cancel(true) }()
				}
			})
		}},
		{name: "cancelled when done", manual: true, act: func(w *world, j *jobs.Job) {
			w.until(types.JobStatusPending)
			_ = j.Cancel(true)
		}, outcome: syscall.ECANCELED},
		{name: "target fails at once", arm: failing(to, changes, 0), outcome: syscall.EIO},
		{name: "target fails halfway", arm: failing(to, changes, 3), outcome: syscall.EIO},
		{name: "target fails halfway and cannot be flushed", arm: failing(to, changes|drivertest.OpFlush, 3), outcome: syscall.EIO},
		{name: "flush fails", arm: failing(to, drivertest.OpFlush, 0), outcome: syscall.EIO},
		{name: "flush fails once", arm: func(w *world) {
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpFlush, Count: 1})
		}, outcome: syscall.EIO},
		{name: "flush fails and that is ignored", ignore: true, arm: failing(to, drivertest.OpFlush, 0)},
		{name: "source fails", arm: failing(from, drivertest.OpRead, 0), outcome: syscall.EIO},
		{name: "source fails halfway", arm: failing(from, drivertest.OpRead, 3), outcome: syscall.EIO},
	}
}

// However a backup ends, in each mode, a bit is clean only where the target holds what the source
// held, on stable storage; and where the mode says that the backup does not count, the bitmap has
// what it had.
func TestBitsOfUnsafeDataAreKept(t *testing.T) {
	for _, mode := range []types.BitmapSyncMode{
		types.BitmapSyncModeNever, types.BitmapSyncModeOnSuccess, types.BitmapSyncModeAlways,
	} {
		for _, sync := range []types.MirrorSyncMode{types.MirrorSyncModeBitmap, types.MirrorSyncModeFull} {
			if sync == types.MirrorSyncModeFull && mode == types.BitmapSyncModeNever {
				continue
			}
			for _, e := range endings() {
				for _, granularity := range []int64{512, 2 * cluster} {
					t.Run(fmt.Sprintf("%s/%s/%s/%d", mode, sync, e.name, granularity), func(t *testing.T) {
						bitsAreKept(t, mode, sync, e, granularity)
					})
				}
			}
		}
	}
}

func bitsAreKept(t *testing.T, mode types.BitmapSyncMode, sync types.MirrorSyncMode, e ending, granularity int64) {
	const size = 12 * cluster
	medium, content := drivertest.NewCrashFile(size), bytes.Repeat([]byte{0xaa}, size)
	w := newWorldOf(t, drivertest.MemFileOf(content), medium, content)
	b, err := w.source.Bitmaps().New(graph.DirtyBitmapSpec{Name: "b", Granularity: granularity})
	if err != nil {
		t.Fatal(err)
	}
	for c := int64(0); c < size/cluster; c += 2 {
		b.Bits().Set(c*cluster+512, 512)
	}
	before := b.Bits().Clone()
	w.shape = jobtest.Look(w.g)
	a := w.args()
	one := int64(1)
	a.Sync, a.Bitmap, a.BitmapMode, a.AutoFinalize = sync, new(b.Name()), &mode, new(!e.manual)
	a.XPerf.MaxWorkers, a.XPerf.MaxChunk = &one, new(int64(cluster))
	if e.ignore {
		a.OnTargetError = new(types.BlockdevOnErrorIgnore)
	}
	if e.arm != nil {
		e.arm(w)
	}
	s := w.begin(a)
	if err := jobtest.Write(w.guest, 3*cluster, []byte("guest")); err != nil && !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	} else if err == nil {
		copy(w.want[3*cluster:], "guest")
	}
	j := w.m.Get("j")
	if e.act != nil && !e.manual {
		e.act(w, j)
	}
	s.Release()
	if e.act != nil && e.manual {
		e.act(w, j)
	}
	if mode == types.BitmapSyncModeNever && strings.HasPrefix(e.name, "flush") {
		e.outcome = nil // nobody relies on it
	}
	err = w.end(j)
	fine := err == nil || errors.Is(err, syscall.ECANCELED)
	if e.outcome != nil && !errors.Is(err, e.outcome) || e.outcome == nil && !fine {
		t.Fatalf("outcome: %v", err)
	} else if kept := mode != types.BitmapSyncModeAlways && err != nil || mode == types.BitmapSyncModeNever; kept {
		before.Merge(b.Bits()) // what was written meanwhile
		if before.Count() != b.Bits().Count() {
			t.Errorf("%d bytes are dirty, want %d", b.Bits().Count(), before.Count())
		}
	}
	safe := medium.Durable().Bytes()
	for off := int64(0); off < size; off += 512 {
		dirtyBefore := before.Get(off) || sync == types.MirrorSyncModeFull && mode == types.BitmapSyncModeAlways
		if dirtyBefore && !b.Bits().Get(off) && !bytes.Equal(safe[off:off+512], w.want[off:off+512]) {
			t.Fatalf("at %d the bitmap is clean, and the target has something else", off)
		}
	}
}

// begin is start without letting the job go.
func (w *world) begin(a types.BlockdevBackup) *backup.Step {
	w.t.Helper()
	s := w.step(a)
	if err := transaction.Run(context.Background(), w.g, s); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// until waits for the job to be in a state.
func (w *world) until(s types.JobStatus) {
	w.t.Helper()
	for range w.states {
		if l := w.m.Query(); len(l) == 1 && l[0].Status == s {
			return
		}
	}
}

// As many extents are copied at the same time as max-workers says, and each is as long as max-chunk
// lets it be.
func TestWorkersAndChunks(t *testing.T) {
	for _, n := range []int64{1, 5, 30} {
		w := newWorld(t)
		w.from.Poke(0, bytes.Repeat([]byte{1}, size)) // all data
		w.want = w.from.Bytes()
		var mu sync.Mutex
		inside, most := int64(0), int64(0)
		met := make(chan struct{}) // closed when as many as may have come together
		w.toF.Hook(func(op drivertest.Op, _, k int64) {
			if op != drivertest.OpWrite {
				return
			}
			mu.Lock()
			if inside++; inside > most {
				if most = inside; most == n {
					close(met)
				}
			}
			mu.Unlock()
			<-met
			mu.Lock()
			inside--
			if k > 2*cluster {
				t.Errorf("an extent of %d bytes", k)
			}
			mu.Unlock()
		})
		a := w.args()
		a.XPerf = &types.BackupPerf{MaxWorkers: &n, MaxChunk: new(int64(2*cluster + 5)), UseCopyRange: new(false)}
		if err := w.end(w.start(a)); err != nil || most != n || !bytes.Equal(w.to.Bytes(), w.want) {
			t.Errorf("%v; %d extents at the same time instead of %d", err, most, n)
		}
	}
}
