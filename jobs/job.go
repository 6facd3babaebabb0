package jobs

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs/machine"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// ErrCancelled is what a forced cancel makes of a job; it is an ECANCELED.
var ErrCancelled = blk.Text("Operation canceled", syscall.ECANCELED)

// Runner is a job's work. Run blocks until the work is done; it calls Handle.Checkpoint before each
// unit of work, returns ErrCancelled when that does, and changes the graph only by transactions of
// its own. ctx is done once the job is cancelled by force; it ends waits, never an I/O in flight.
type Runner interface {
	Run(ctx context.Context, h *Handle) error
}

// What a Runner may do besides; each with its default. None is called with a lock held.
type (
	// Preparer does, once all jobs of the transaction have succeeded, what may still fail.
	Preparer interface {
		Prepare(ctx context.Context, h *Handle) error // default: success
	}
	// Committer makes the success final; it cannot fail.
	Committer interface{ Commit(h *Handle) }
	// Aborter undoes what must not stay after a failure; it cannot fail.
	Aborter interface{ Abort(h *Handle) }
	// Cleaner gives back everything (filters, edges, freezes, permissions); called last in every
	// case.
	Cleaner interface{ Clean(h *Handle) }
	// Canceler is told of a cancel request and decides whether it is one by force.
	Canceler interface {
		Cancel(force bool) (forced bool) // default: always by force
	}
	// Completer is asked to finish a ready job.
	Completer interface {
		Complete(ctx context.Context) error
	} // default: refused
	// Syncer is a mirror, which tells whether both sides are equal and stay so.
	Syncer interface{ ActivelySynced() bool }
)

// Job is one job, from its creation until it is dismissed.
type Job struct {
	m      *Manager
	id     string
	typ    types.JobType
	runner Runner
	block  *blockState // nil: no block job (create, amend)
	txn    *Txn

	// record holds a State. altering is held by whoever changes it, m.mu is taken under it.
	record   *graph.Record
	altering sync.Mutex

	ctx    context.Context
	cancel context.CancelFunc

	st   machine.State // guarded by m.mu
	err  error         // guarded by m.mu; the outcome if it is a failure
	wake *sync.Cond    // on m.mu; state, speed or pause changed
	gone bool          // guarded by m.mu; forgotten by the manager
	// asleep: the runner waits for its speed limit and does nothing else; guarded by m.mu.
	asleep bool

	waiting  atomic.Bool   // not busy: sleeping, paused or over
	paused   atomic.Bool   // the runner waits at a pause point
	ended    chan struct{} // closed when Run has returned
	finished chan struct{} // closed when the job is concluded
	instant  bool          // as in Spec
	seenAs   visible.Job   // as in Spec
	nodes    []*graph.Node // as in Spec

	// answered is closed when the command that asked the job to end was answered; nil: there is
	// none.
	answered chan struct{} // +checklocks:m.mu

	yielded  latch // the starting command may go on
	released latch // the starting command has been answered

	current atomic.Int64
	total   atomic.Int64
	check   atomic.Pointer[types.ImageCheck] // what it has found, if that is what it is for
}

// latch is a channel that is closed once, however many do it.
type latch struct {
	c    chan struct{}
	once sync.Once
}

func (l *latch) open() { l.once.Do(func() { close(l.c) }) }

// await waits for c, but not for long; in real time, as a client waits. It tells whether c came.
func await(c <-chan struct{}, most time.Duration) bool {
	limit := time.NewTimer(most)
	defer limit.Stop()
	select {
	case <-c:
		return true
	case <-limit.C:
		return false
	}
}

// ID is the job's id.
func (j *Job) ID() string { return j.id }

// Type is the job's type.
func (j *Job) Type() types.JobType { return j.typ }

// State is what makes a job again: it is what is recorded of it.
type State struct {
	// Args are the arguments of its command in canonical form, a pointer to a type of the schema.
	// They do not change any more.
	Args any
	// Speed is the limit in bytes per second that it has now; 0: none.
	Speed int64
	// Paused: its user has paused it; that an error policy did so is not recorded.
	Paused bool
	// CopyMode is what a mirror was told since it started; "": nothing.
	CopyMode types.MirrorCopyMode
}

// Record is what is recorded of the job, a State. Whoever starts it lets it be there: of block jobs
// it comes with a root.
func (j *Job) Record() *graph.Record { return j.record }

// Describe names the job as a user of nodes, in permission conflicts (graph.Parent).
func (j *Job) Describe() string { return string(j.typ) + " job '" + j.id + "'" }

// Finished is closed when the job is concluded.
func (j *Job) Finished() <-chan struct{} { return j.finished }

// Err is the error of a job that failed, else nil.
func (j *Job) Err() error {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	if j.st.Failed {
		return j.err
	}
	return nil
}

// stepLocked feeds the machine and does what it says.
// +checklocksignore: m.mu is held, which is not seen through other jobs and transactions.
func (j *Job) stepLocked(in machine.Input) {
	defer panics.Fatal("the state of a job")
	var changes []machine.Change
	j.st, changes = machine.Step(j.st, in)
	for _, c := range changes {
		switch c.Effect {
		case machine.EmitStatus:
			if p := &trace.JobTransition; p.On() {
				p.Log(slog.String("job", j.id), slog.String("to", c.Status.String()))
			}
			j.m.emitLocked(types.JobStatusChangeEvent{ID: j.id, Status: types.JobStatus(c.Status.String())})
			j.wake.Broadcast()
			if c.Status == machine.Concluded {
				close(j.finished)
			}
		case machine.Wake:
			j.kickLocked()
		case machine.Forget:
			j.m.forgetLocked(j)
		default:
			j.emitBlockLocked(c.Effect)
		}
	}
}

// emitBlockLocked sends the BLOCK_JOB_ events, which only block jobs have.
// +checklocks:j.m.mu
func (j *Job) emitBlockLocked(e machine.Effect) {
	if j.block == nil {
		return
	}
	offset, length, speed := j.current.Load(), j.total.Load(), j.block.speed
	switch e {
	case machine.EmitReady:
		j.m.emitLocked(types.BlockJobReadyEvent{Type: j.typ, Device: j.id, Len: length, Offset: offset, Speed: speed})
	case machine.EmitPending:
		j.m.emitLocked(types.BlockJobPendingEvent{Type: j.typ, ID: j.id})
	case machine.EmitCancelled:
		j.m.emitLocked(types.BlockJobCancelledEvent{Type: j.typ, Device: j.id, Len: length, Offset: offset, Speed: speed})
	case machine.EmitCompleted:
		j.m.emitLocked(types.BlockJobCompletedEvent{
			Type: j.typ, Device: j.id, Len: length, Offset: offset, Speed: speed, Error: j.errorTextLocked(),
		})
	}
}

// failLocked records the first error as the outcome and moves the job to aborting.
func (j *Job) failLocked(err error) {
	if j.err == nil {
		j.err = err
	}
	j.stepLocked(machine.WorkFailed)
}

// updateLocked makes a failure of a job that was cancelled by force, or has failed already.
func (j *Job) updateLocked() {
	if j.st.Forced && j.err == nil {
		j.err = ErrCancelled
	}
	if j.st.Forced || j.st.Failed {
		j.stepLocked(machine.WorkFailed)
	}
}

// cancelLocked asks the job to end. The caller lets the transaction end if the job's work is over.
// It releases m.mu around the runner's say.
// +checklocksignore: m.mu is held, which is not seen through other jobs and transactions.
func (j *Job) cancelLocked(force bool) {
	if c, ok := j.runner.(Canceler); ok {
		over := j.st.Status >= machine.Waiting // what is over is not ready any more
		j.m.mu.Unlock()
		if err := (&Handle{j}).careful(func() error { force = c.Cancel(force || over); return nil }); err != nil {
			force = true
		}
		j.m.mu.Lock()
	} else {
		force = true
	}
	if j.st.Status >= machine.Concluded {
		return
	}
	if j.st.UserPaused {
		j.block.resetIOStatus()
	}
	in := machine.CancelSoft
	if force {
		in = machine.CancelForce
	}
	j.stepLocked(in)
	if j.st.Forced {
		j.cancel()
	} else {
		j.lastPassLocked() // a ready job comes to its end
	}
}

// main is the job's goroutine.
func (j *Job) main() {
	h := &Handle{j}
	err := h.Checkpoint()
	if err == nil {
		err = h.careful(func() error { return j.runner.Run(j.ctx, h) })
	}
	h.AwaitAnswer()
	j.waiting.Store(true)
	close(j.ended)
	j.txn.jobEnded(j, err)
	j.yielded.open()
	j.m.running.Done()
}

// isCancel tells whether err is nothing but the cancel that the job was asked for.
func isCancel(err error) bool {
	return errors.Is(err, ErrCancelled) || errors.Is(err, context.Canceled)
}
