package copy

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"qblockd/events"
	"qblockd/events/clock"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// gate counts the units of work in flight and the most there were.
type gate struct {
	mu        sync.Mutex
	now, most int
}

func (g *gate) Begin() (*blk.Req, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now++
	g.most = max(g.most, g.now)
	return &blk.Req{Ctx: context.Background()}, nil
}

func (g *gate) End(*blk.Req) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now--
}

// bench is a copy over a range of cells, each with what it needs and how often it still fails.
type bench struct {
	speed int64 // of the job, bytes per second; 0: no limit
	gate
	cell   int64
	needs  []Action
	failed map[int64]int // offset -> failures still to come, of Copy
	looks  map[int64]int // the same of Look
	done   []int         // how often each cell was copied
	during func(off int64)
	guests *atomic.Bool
	piece  int64
	bug    string // "look" and "copy" panic
}

func newBench(needs ...Action) *bench {
	return &bench{cell: 10, needs: needs, failed: map[int64]int{}, looks: map[int64]int{}, done: make([]int, len(needs))}
}

func (b *bench) look(_ *blk.Req, off, n int64) (Extent, error) {
	if b.bug == "look" {
		panic("bug in look")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.looks[off] > 0 {
		b.looks[off]--
		return Extent{}, syscall.EIO
	}
	i := off / b.cell
	e := Extent{Action: b.needs[i]}
	for e.N < n && b.needs[(off+e.N)/b.cell] == e.Action {
		e.N += b.cell
	}
	return e, nil
}

func (b *bench) copy(_ *blk.Req, off int64, e Extent) error {
	if b.bug == "copy" {
		panic("bug in copy")
	}
	if b.during != nil {
		b.during(off)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed[off] > 0 {
		b.failed[off]--
		return syscall.ENOSPC
	}
	for i := off / b.cell; i < (off+e.N)/b.cell; i++ {
		b.done[i]++
		if b.needs[i] != e.Action {
			return errors.New("wrong action")
		}
	}
	return nil
}

type quiet struct {
	mu     sync.Mutex
	cond   *sync.Cond
	events []events.Event
}

func (q *quiet) Emit(e events.Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.events = append(q.events, e)
	q.cond.Broadcast()
}

// status waits until the job has come to a state.
func (q *quiet) status(s types.JobStatus) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for _, e := range q.events {
			if e, ok := e.(types.JobStatusChangeEvent); ok && e.Status == s {
				return
			}
		}
		q.cond.Wait()
	}
}

type runner func(h *jobs.Handle) error

func (r runner) Run(_ context.Context, h *jobs.Handle) error { return r(h) }

// start runs the bench as a job with that policy.
func start(t *testing.T, b *bench, policy types.BlockdevOnError) (*jobs.Manager, *jobs.Job, *quiet) {
	t.Helper()
	q := &quiet{}
	q.cond = sync.NewCond(&q.mu)
	m := jobs.NewManager(q, nil)
	size := int64(len(b.needs)) * b.cell
	j, err := m.Create(jobs.Spec{ID: "j", Type: types.JobTypeStream, Block: true, ManualDismiss: true, Speed: b.speed,
		Runner: runner(func(h *jobs.Handle) error {
			h.SetRemaining(size)
			return Run(h, Task{Gate: b, Size: size, Chunk: 3 * b.cell, Workers: 2,
				Look: b.look, Copy: counted(b.copy), Guests: b.guests, Piece: b.piece,
				Operation: types.IoOperationTypeRead, Policy: policy})
		})})
	if err != nil {
		t.Fatal(err)
	}
	m.Start(j)()
	return m, j, q
}

// ended waits for the job and returns its progress and error.
func ended(m *jobs.Manager, j *jobs.Job) (*types.JobInfo, error) {
	<-j.Finished()
	return m.Query()[0], j.Err()
}

func TestEverythingOnce(t *testing.T) {
	b := newBench(Skip, Data, Data, Data, Data, Zero, Zero, Skip, Skip, Skip, Skip, Data)
	m, j, _ := start(t, b, types.BlockdevOnErrorReport)
	info, err := ended(m, j)
	if err != nil || info.CurrentProgress != 120 || info.TotalProgress != 120 {
		t.Fatalf("%v, progress %d of %d", err, info.CurrentProgress, info.TotalProgress)
	}
	for i, n := range b.done {
		if want := map[bool]int{true: 1}[b.needs[i] != Skip]; n != want {
			t.Errorf("cell %d was copied %d times, want %d", i, n, want)
		}
	}
	if b.now != 0 || b.most > 3 {
		t.Errorf("%d units left, %d at once", b.now, b.most)
	}
}

func TestReport(t *testing.T) {
	b := newBench(Data, Skip, Data, Skip, Data)
	b.failed[20] = 1
	m, j, _ := start(t, b, types.BlockdevOnErrorReport)
	if _, err := ended(m, j); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("outcome: %v", err)
	}
	if b.now != 0 {
		t.Errorf("%d units are left", b.now)
	}
}

func TestIgnore(t *testing.T) {
	b := newBench(Data, Skip, Data, Skip, Data)
	b.failed[20] = 1
	m, j, _ := start(t, b, types.BlockdevOnErrorIgnore)
	info, err := ended(m, j)
	if !errors.Is(err, syscall.ENOSPC) || info.CurrentProgress != 50 {
		t.Errorf("outcome: %v, progress %d", err, info.CurrentProgress)
	}
	if b.done[0] != 1 || b.done[2] != 0 || b.done[4] != 1 {
		t.Errorf("copied: %v", b.done)
	}
}

func TestStopAndResume(t *testing.T) {
	for name, prepare := range map[string]func(*bench){
		"copy": func(b *bench) { b.failed[20] = 1 },
		"look": func(b *bench) { b.looks[20] = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(Data, Skip, Data, Skip, Data)
			prepare(b)
			m, j, q := start(t, b, types.BlockdevOnErrorStop)
			q.status(types.JobStatusPaused)
			if b.now != 0 {
				t.Errorf("%d units in flight in a paused job", b.now)
			}
			if err := j.Resume(); err != nil {
				t.Fatal(err)
			}
			info, err := ended(m, j)
			if err != nil || info.CurrentProgress != 50 || b.done[2] != 1 {
				t.Errorf("outcome: %v, progress %d, copied %v", err, info.CurrentProgress, b.done)
			}
		})
	}
}

func TestPauseWaitsForUnitsInFlight(t *testing.T) {
	b := newBench(Data, Skip, Data, Skip, Data)
	reached, release := make(chan struct{}, 8), make(chan struct{})
	b.during = func(int64) { reached <- struct{}{}; <-release }
	m, j, q := start(t, b, types.BlockdevOnErrorReport)
	<-reached
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	close(release)
	q.status(types.JobStatusPaused)
	b.mu.Lock()
	if b.now != 0 {
		t.Errorf("%d units in flight in a paused job", b.now)
	}
	b.mu.Unlock()
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := ended(m, j); err != nil {
		t.Error(err)
	}
}

func TestCancel(t *testing.T) {
	b := newBench(Data, Skip, Data, Skip, Data)
	reached, release := make(chan struct{}, 8), make(chan struct{})
	b.during = func(int64) { reached <- struct{}{}; <-release }
	m, j, _ := start(t, b, types.BlockdevOnErrorReport)
	<-reached
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	close(release)
	if _, err := ended(m, j); !errors.Is(err, syscall.ECANCELED) {
		t.Errorf("outcome: %v", err)
	}
	if b.now != 0 {
		t.Errorf("%d units are left", b.now)
	}
}

// errorEvents counts the BLOCK_JOB_ERROR events so far.
func (q *quiet) errorEvents() (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range q.events {
		if _, ok := e.(types.BlockJobErrorEvent); ok {
			n++
		}
	}
	return n
}

// Units that fail at the same time are one error to the client when the first of them ends or
// pauses the job.
func TestFailuresAtOnce(t *testing.T) {
	for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorReport, types.BlockdevOnErrorStop} {
		b := newBench(Data, Skip, Data, Skip, Data)
		b.failed[0], b.failed[20] = 1, 1
		var both sync.WaitGroup
		both.Add(2)
		var seen atomic.Int32
		b.during = func(int64) {
			if seen.Add(1) <= 2 {
				both.Done()
				both.Wait()
			}
		}
		m, j, q := start(t, b, policy)
		if policy == types.BlockdevOnErrorStop {
			q.status(types.JobStatusPaused)
			if n := q.errorEvents(); n != 1 {
				t.Errorf("%s: %d errors were told", policy, n)
			}
			if err := j.Resume(); err != nil {
				t.Fatal(err)
			}
			if info, err := ended(m, j); err != nil || info.CurrentProgress != 50 || b.done[0] != 1 || b.done[2] != 1 {
				t.Errorf("outcome: %v, progress %d, copied %v", err, info.CurrentProgress, b.done)
			}
			continue
		}
		if _, err := ended(m, j); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("outcome: %v", err)
		}
		if n := q.errorEvents(); n != 1 {
			t.Errorf("%s: %d errors were told", policy, n)
		}
	}
}

// A limited job does not have more in flight than its speed lets pass, and shows all it did while
// it waits.
func TestSpeedCountsWhatIsInFlight(t *testing.T) {
	b := newBench(Skip, Data, Skip, Data, Skip, Data)
	b.speed = 1
	m, j, _ := start(t, b, types.BlockdevOnErrorReport)
	for m.QueryBlock()[0].Busy {
		runtime.Gosched()
	}
	if info := m.Query()[0]; info.CurrentProgress != 20 || b.done[3] != 0 {
		t.Errorf("progress %d, copied %v", info.CurrentProgress, b.done)
	}
	if err := j.SetSpeed(0); err != nil {
		t.Fatal(err)
	}
	if info, err := ended(m, j); err != nil || info.CurrentProgress != 60 {
		t.Errorf("outcome: %v, progress %d", err, info.CurrentProgress)
	}
}

// A look that makes no way is an error, not an endless loop.
func TestLookWithoutAnswer(t *testing.T) {
	q := &quiet{}
	q.cond = sync.NewCond(&q.mu)
	m := jobs.NewManager(q, nil)
	b := newBench(Data)
	j, err := m.Create(jobs.Spec{ID: "j", Type: types.JobTypeStream, Block: true, ManualDismiss: true,
		Runner: runner(func(h *jobs.Handle) error {
			return Run(h, Task{Gate: b, Size: 10, Chunk: 10, Workers: 1, Copy: counted(b.copy),
				Look: func(*blk.Req, int64, int64) (Extent, error) { return Extent{}, nil }})
		})})
	if err != nil {
		t.Fatal(err)
	}
	m.Start(j)()
	if _, err := ended(m, j); !errors.Is(err, blk.ErrOutOfRange) {
		t.Errorf("outcome: %v", err)
	}
}

// A panic of a worker, or of who looks for what to do, is an error of the job, which no policy
// tries again; the gate is left.
func TestCopyPanics(t *testing.T) {
	defer panics.Contain()()
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for _, bug := range []string{"look", "copy"} {
		b := newBench(Data, Data, Data)
		b.bug = bug
		_, j, _ := start(t, b, types.BlockdevOnErrorIgnore)
		<-j.Finished()
		var p *panics.Error
		if err := j.Err(); !errors.As(err, &p) || b.now != 0 {
			t.Errorf("%s: %v, %d inside", bug, err, b.now)
		}
	}
}

// stopped is a clock that fires each timer at once and notes for how long it was set.
type stopped struct {
	mu    sync.Mutex
	waits []time.Duration
}

func (c *stopped) Now() time.Time { return time.Unix(1, 0) }

func (c *stopped) AfterFunc(_ string, d time.Duration, f func()) clock.Timer {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waits = append(c.waits, d)
	return time.AfterFunc(0, f)
}

// What fails again and again is not tried as fast as it fails: clients would get nothing but its
// events.
func TestIgnoredFailuresArePaced(t *testing.T) {
	now := &stopped{}
	q := &quiet{}
	q.cond = sync.NewCond(&q.mu)
	m := jobs.NewManager(q, now)
	b := newBench(Data, Skip, Data)
	b.failed[0], b.failed[20] = 1, 12
	r := runner(func(h *jobs.Handle) error {
		return Run(h, Task{Gate: b, Size: 30, Chunk: b.cell, Workers: 1,
			Look: b.look, Copy: counted(b.copy), RetryIgnored: true,
			Operation: types.IoOperationTypeWrite, Policy: types.BlockdevOnErrorIgnore})
	})
	j, err := m.Create(jobs.Spec{ID: "j", Type: types.JobTypeBackup, Block: true, ManualDismiss: true, Runner: r})
	if err != nil {
		t.Fatal(err)
	}
	m.Start(j)()
	if _, err := ended(m, j); err != nil || b.done[0] != 1 || b.done[2] != 1 {
		t.Errorf("outcome: %v, copied %v", err, b.done)
	}
	if n := q.errorEvents(); n != 13 {
		t.Errorf("%d events", n)
	}
	var want []time.Duration
	for _, ms := range []int{1, 2, 4, 8, 16, 32, 64, 100, 100, 100, 100} {
		want = append(want, time.Duration(ms)*time.Millisecond)
	}
	if !slices.Equal(now.waits, want) {
		t.Errorf("waited %v, want %v", now.waits, want)
	}
}
