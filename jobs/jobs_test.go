package jobs

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qblockd/events"
	"qblockd/schema/types"
)

// recorder keeps events as short words and lets a test wait for one.
type recorder struct {
	mu   sync.Mutex
	cond *sync.Cond
	log  []string
}

func newRecorder() *recorder {
	r := &recorder{}
	r.cond = sync.NewCond(&r.mu)
	return r
}

func (r *recorder) Emit(e events.Event) {
	var s string
	switch e := e.(type) {
	case types.JobStatusChangeEvent:
		s = e.ID + ":" + string(e.Status)
	case types.BlockJobCompletedEvent:
		s = e.Device + ":COMPLETED"
		if e.Error != nil {
			s += "(" + *e.Error + ")"
		}
	case types.BlockJobCancelledEvent:
		s = e.Device + ":CANCELLED"
	case types.BlockJobPendingEvent:
		s = e.ID + ":PENDING"
	case types.BlockJobReadyEvent:
		s = e.Device + ":READY"
	case types.BlockJobErrorEvent:
		s = fmt.Sprintf("%s:ERROR/%s/%s", e.Device, e.Operation, e.Action)
	default:
		s = e.EventName()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, s)
	r.cond.Broadcast()
}

// wait blocks until want has come and returns everything up to now.
func (r *recorder) wait(want string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for !strings.Contains(" "+strings.Join(r.log, " ")+" ", " "+want+" ") {
		r.cond.Wait()
	}
	return strings.Join(r.log, " ")
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.log, " ")
}

// work is a runner whose body is a function, and which notes its callbacks.
type work struct {
	run     func(ctx context.Context, h *Handle) error
	prepare error
	mu      sync.Mutex
	calls   []string
}

func (w *work) note(s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, s)
}

func (w *work) said() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.calls, " ")
}

func (w *work) Run(ctx context.Context, h *Handle) error {
	if w.run == nil {
		return nil
	}
	return w.run(ctx, h)
}

func (w *work) Prepare(context.Context, *Handle) error { w.note("prepare"); return w.prepare }
func (w *work) Commit(*Handle)                         { w.note("commit") }
func (w *work) Abort(*Handle)                          { w.note("abort") }
func (w *work) Clean(*Handle)                          { w.note("clean") }

// untilCancelled works until it is cancelled.
func untilCancelled(ctx context.Context, h *Handle) error {
	for {
		h.Yield()
		if err := h.Throttle(1); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Millisecond):
		}
	}
}

func start(t *testing.T, m *Manager, s Spec) *Job {
	t.Helper()
	j, err := m.Create(s)
	if err != nil {
		t.Fatal(err)
	}
	m.Start(j)()
	return j
}

func shutdown(t *testing.T, m *Manager) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := m.Shutdown(ctx); err != nil {
		t.Errorf("jobs did not end: %v", err)
	}
}

func TestSuccessOfShortWorkPrecedesTheReply(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	w := &work{}
	j, err := m.Create(Spec{ID: "j", Type: types.JobTypeStream, Runner: w, Block: true})
	if err != nil {
		t.Fatal(err)
	}
	release := m.Start(j)
	const want = "j:created j:running j:waiting j:pending j:COMPLETED j:concluded j:null"
	if got := r.String(); got != want {
		t.Errorf("events %q, want %q", got, want)
	}
	release()
	if w.said() != "prepare commit clean" {
		t.Errorf("calls: %s", w.said())
	}
	if m.Get("j") != nil {
		t.Error("the job is still there")
	}
}

func TestWorkAfterYieldFollowsTheReply(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	j, err := m.Create(Spec{ID: "j", Type: types.JobTypeCreate, ManualDismiss: true,
		Runner: &work{run: func(_ context.Context, h *Handle) error { h.Yield(); return nil }}})
	if err != nil {
		t.Fatal(err)
	}
	release := m.Start(j)
	r.Emit(types.BlockExportDeletedEvent{ID: "reply"})
	release()
	const want = "j:created j:running BLOCK_EXPORT_DELETED j:waiting j:pending j:concluded"
	if got := r.wait("j:concluded"); got != want {
		t.Errorf("events %q, want %q", got, want)
	}
	if err := j.Dismiss(); err != nil || m.Get("j") != nil {
		t.Errorf("dismiss: %v", err)
	}
}

func TestFailure(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	w := &work{run: func(context.Context, *Handle) error { return errors.New("Input/output error") }}
	j := start(t, m, Spec{ID: "j", Type: types.JobTypeStream, Runner: w, Block: true, ManualDismiss: true})
	const want = "j:created j:running j:aborting j:COMPLETED(Input/output error) j:concluded"
	if got := r.wait("j:concluded"); got != want {
		t.Errorf("events %q, want %q", got, want)
	}
	if w.said() != "abort clean" {
		t.Errorf("calls: %s", w.said())
	}
	q := m.Query()
	if len(q) != 1 || q[0].Error == nil || *q[0].Error != "Input/output error" {
		t.Errorf("query: %+v", q)
	}
	if err := j.Cancel(true); err == nil || err.Error() != "Job 'j' in state 'concluded' cannot accept command verb 'cancel'" {
		t.Errorf("cancel: %v", err)
	}
}

func TestPauseResumeCancel(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	j := start(t, m, Spec{ID: "j", Type: types.JobTypeStream, Runner: &work{run: untilCancelled}, Block: true})
	if err := j.Resume(); err == nil || err.Error() != "Can't resume a job that was not paused" {
		t.Errorf("resume: %v", err)
	}
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	r.wait("j:paused")
	if err := j.Pause(); err == nil || err.Error() != "Job is already paused" {
		t.Errorf("second pause: %v", err)
	}
	if q := m.QueryBlock(); len(q) != 1 || !q[0].Paused || q[0].Busy {
		t.Errorf("query: %+v", q[0])
	}
	if err := j.SetSpeed(-1); err == nil {
		t.Error("negative speed accepted")
	}
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	got := r.wait("j:null")
	if !strings.HasSuffix(got, "j:aborting j:CANCELLED j:concluded j:null") {
		t.Errorf("events %q", got)
	}
	<-j.Finished()
	if !errors.Is(j.Err(), syscall.ECANCELED) {
		t.Errorf("outcome: %v", j.Err())
	}
}

func TestCancelWhilePaused(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	j := start(t, m, Spec{ID: "j", Type: types.JobTypeStream, Runner: &work{run: untilCancelled}, Block: true})
	_ = j.Pause()
	r.wait("j:paused")
	_ = j.Cancel(true)
	const want = "j:created j:running j:paused j:running j:aborting j:CANCELLED j:concluded j:null"
	if got := r.wait("j:null"); got != want {
		t.Errorf("events %q, want %q", got, want)
	}
}

func TestManualFinalizeAndCancelPending(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	spec := Spec{ID: "a", Type: types.JobTypeStream, Runner: &work{}, Block: true, ManualFinalize: true}
	a := start(t, m, spec)
	r.wait("a:PENDING")
	if err := a.Finalize(); err != nil {
		t.Fatal(err)
	}
	const wantA = "a:created a:running a:waiting a:pending a:PENDING a:COMPLETED a:concluded a:null"
	if got := r.String(); got != wantA {
		t.Errorf("events %q, want %q", got, wantA)
	}
	w := &work{}
	spec.ID, spec.Runner = "b", w
	b := start(t, m, spec)
	r.wait("b:PENDING")
	if err := b.Cancel(true); err != nil {
		t.Fatal(err)
	}
	if got := r.String(); !strings.HasSuffix(got, "b:PENDING b:aborting b:CANCELLED b:concluded b:null") {
		t.Errorf("events %q", got)
	}
	if w.said() != "abort clean" {
		t.Errorf("calls: %s", w.said())
	}
}

func TestErrorPolicyStop(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	j := start(t, m, Spec{ID: "j", Type: types.JobTypeStream, Block: true, Runner: &work{
		run: func(_ context.Context, h *Handle) error {
			h.Yield()
			a := h.OnError(types.IoOperationTypeRead, types.BlockdevOnErrorStop, syscall.ENOSPC)
			if a != types.BlockErrorActionStop {
				return fmt.Errorf("action %s", a)
			}
			return h.Checkpoint()
		}}})
	r.wait("j:paused")
	if q := m.QueryBlock()[0]; q.IoStatus != types.BlockDeviceIoStatusNospace {
		t.Errorf("io-status %s", q.IoStatus)
	}
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	const want = "j:created j:running j:ERROR/read/stop j:paused j:running j:waiting j:pending j:COMPLETED j:concluded j:null"
	if got := r.wait("j:null"); got != want {
		t.Errorf("events %q, want %q", got, want)
	}
}

func TestIDs(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	for id, want := range map[string]string{"": "Invalid job ID ''", "9": "Invalid job ID '9'", "a b": "Invalid job ID 'a b'"} {
		if _, err := m.Create(Spec{ID: id, Runner: &work{}}); err == nil || err.Error() != want {
			t.Errorf("%q: %v", id, err)
		}
	}
	if r.String() != "" {
		t.Errorf("events of refused jobs: %s", r)
	}
	if _, err := m.Create(Spec{ID: "s", Block: true, Speed: -1, Runner: &work{}}); err == nil {
		t.Error("negative speed accepted")
	}
	if r.String() != "s:created s:null" {
		t.Errorf("events: %s", r)
	}
	j, _ := m.Create(Spec{ID: "j", Runner: &work{}})
	if _, err := m.Create(Spec{ID: "j", Runner: &work{}}); err == nil || err.Error() != "Job ID 'j' already in use" {
		t.Errorf("duplicate: %v", err)
	}
	m.Discard(j)
}

func TestShutdownEndsEverything(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	start(t, m, Spec{ID: "run", Type: types.JobTypeStream, Block: true, Runner: &work{run: untilCancelled}})
	p := start(t, m, Spec{ID: "paused", Type: types.JobTypeStream, Block: true, Runner: &work{run: untilCancelled}})
	_ = p.Pause()
	start(t, m, Spec{ID: "over", Type: types.JobTypeCreate, ManualDismiss: true, Runner: &work{}})
	start(t, m, Spec{
		ID: "pend", Type: types.JobTypeStream, Block: true, ManualFinalize: true, ManualDismiss: true, Runner: &work{},
	})
	r.wait("pend:PENDING")
	shutdown(t, m)
	got := r.String()
	for _, want := range []string{"run:null", "paused:null", "over:null", "pend:CANCELLED", "pend:null"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in %q", want, got)
		}
	}
	if n := len(m.Query()); n != 0 {
		t.Errorf("%d jobs are left", n)
	}
}

func TestLimiter(t *testing.T) {
	now := time.Unix(1000, 0)
	var l limiter
	if d := l.take(now, 1<<30); d != 0 {
		t.Errorf("no limit, but wait %v", d)
	}
	l.setSpeed(1000) // 100 bytes a slice
	if d := l.take(now, 50); d != 0 {
		t.Errorf("half a slice: wait %v", d)
	}
	if d := l.take(now, 150); d != 2*slice {
		t.Errorf("two slices' worth: wait %v, want %v", d, 2*slice)
	}
	now = now.Add(2 * slice)
	if d := l.take(now, 0); d != 0 {
		t.Errorf("after the wait: %v", d)
	}
}

// A job can be cancelled by others while whoever makes it is still at it; its runner is not touched
// before Start.
func TestCancelBeforeStart(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	w := &work{run: untilCancelled}
	j, err := m.Create(Spec{ID: "j", Type: types.JobTypeStream, Block: true, Runner: w})
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	if w.said() != "" || r.String() != "j:created" {
		t.Errorf("calls %q, events %s", w.said(), r)
	}
	m.Start(j)()
	<-j.Finished()
	if got := r.wait("j:null"); got != "j:created j:running j:aborting j:CANCELLED j:concluded j:null" || w.said() != "abort clean" {
		t.Errorf("calls %q, events %s", w.said(), got)
	}
}

// The daemon ends while a job is being made: what it relies on could not be had, and it is taken
// back.
func TestShutdownWhileAJobIsMade(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	w := &work{}
	j, err := m.Create(Spec{ID: "j", Type: types.JobTypeStream, Block: true, Runner: w})
	if err != nil {
		t.Fatal(err)
	}
	var ends sync.WaitGroup
	ends.Go(func() { shutdown(t, m) })
	for !quitting(m) {
		runtime.Gosched()
	}
	m.Discard(j)
	ends.Wait()
	if w.said() != "" || r.String() != "j:created j:null" {
		t.Errorf("calls %q, events %s", w.said(), r)
	}
}

// What a verb makes of a job that sleeps or is paused is told before the verb returns.
func TestVerbsOnAnIdleJob(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	asleep := func(s string, j *Job) {
		for m.QueryBlock()[0].Busy {
			runtime.Gosched()
		}
		if got := r.String(); got != s {
			t.Fatalf("events: %s, want %s", got, s)
		}
	}
	j := start(t, m, Spec{ID: "j", Type: types.JobTypeStream, Block: true, Speed: 1, Runner: &work{run: untilCancelled}})
	said := "j:created j:running"
	asleep(said, j)
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	said += " j:paused"
	asleep(said, j)
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	said += " j:running"
	asleep(said, j)
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	if got, want := r.String(), said+" j:aborting j:CANCELLED j:concluded j:null"; got != want {
		t.Errorf("events: %s, want %s", got, want)
	}
}

func quitting(m *Manager) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.quitting
}
