package jobs

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"qblockd/events"
	"qblockd/events/clock"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/jobs/machine"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// Manager holds all jobs.
type Manager struct {
	sink events.Sink
	// what clients are to hear at once; nil: they hear each as it comes
	burst []events.Event // +checklocks:mu
	clock clock.Clock

	running sync.WaitGroup // the jobs' goroutines

	mu       sync.Mutex
	jobs     []*Job // newest first
	byID     map[string]*Job
	quitting bool
}

// NewManager makes a manager that sends its events to sink, and whose speed limits run on c;
// nil: clock.Real.
func NewManager(sink events.Sink, c clock.Clock) *Manager {
	return &Manager{sink: sink, clock: cmp.Or(c, clock.Real), byID: map[string]*Job{}}
}

// Spec describes a new job.
type Spec struct {
	ID     string
	Type   types.JobType
	Runner Runner
	// ManualFinalize, ManualDismiss: the client sends these verbs.
	ManualFinalize, ManualDismiss bool
	// Txn is the transaction that the job joins; nil: one of its own.
	Txn *Txn
	// Block makes it a block job: it has a speed, an io-status and the BLOCK_JOB_ events.
	Block bool
	// Instant: what the job does up to its first wait comes before the answer to its command,
	// unless that takes longer than visible.StartLimit. See visible.StartFirst.
	Instant bool
	// SeenAs is what clients of QEMU take the job for; "": what its type says.
	SeenAs visible.Job
	// Speed is the initial limit in bytes per second; 0: none.
	Speed int64
	// Nodes are those that the job works on.
	Nodes []*graph.Node
	Args  any // as in State
}

// Create makes a job and announces it. It fails on an illegal id, one in use, or a negative speed
// (then the job was announced and has gone). The job does nothing until Start; until then Discard
// takes it back.
func (m *Manager) Create(s Spec) (*Job, error) {
	if !types.WellFormedID(s.ID) {
		return nil, fmt.Errorf("Invalid job ID '%s'", s.ID)
	}
	j := &Job{
		m: m, id: s.ID, typ: s.Type, nodes: s.Nodes, runner: s.Runner, txn: s.Txn,
		record:  graph.NewRecord(graph.Key{Kind: graph.StateJob, Name: s.ID}, State{Args: s.Args, Speed: s.Speed}),
		instant: s.Instant, seenAs: cmp.Or(s.SeenAs, visible.Job(s.Type)),
		ended: make(chan struct{}), finished: make(chan struct{}),
		yielded: latch{c: make(chan struct{})}, released: latch{c: make(chan struct{})},
		st: machine.State{AutoFinalize: !s.ManualFinalize, AutoDismiss: !s.ManualDismiss},
	}
	j.ctx, j.cancel = context.WithCancel(context.Background())
	j.wake = sync.NewCond(&m.mu)
	if s.Block {
		j.block = &blockState{speed: max(s.Speed, 0), ioStatus: types.BlockDeviceIoStatusOk}
		j.block.limit.setSpeed(j.block.speed)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.quitting {
		return nil, fmt.Errorf("The daemon is shutting down")
	}
	if m.byID[s.ID] != nil {
		return nil, fmt.Errorf("Job ID '%s' already in use", s.ID)
	}
	if j.txn == nil {
		j.txn = m.NewTxn()
	}
	m.byID[s.ID] = j
	m.jobs = slices.Insert(m.jobs, 0, j)
	j.txn.jobs = append(j.txn.jobs, j)
	j.waiting.Store(true)
	j.stepLocked(machine.Create)
	if s.Speed < 0 {
		j.discardLocked()
		return nil, errNegativeSpeed
	}
	return j, nil
}

// Discard takes back a job that was created but cannot be started; also one that was cancelled
// meanwhile.
func (m *Manager) Discard(j *Job) {
	m.mu.Lock()
	defer m.mu.Unlock()
	j.discardLocked()
}

// Abandon takes back a job that was created and could be started, but not without others that
// failed: it ends as one that fails before it has done anything.
func (m *Manager) Abandon(j *Job) {
	m.mu.Lock()
	defer m.mu.Unlock()
	j.txn.jobs = without(j.txn.jobs, j)
	j.cancel()
	j.failLocked(ErrCancelled)
	j.stepLocked(machine.Finish)
}

func (j *Job) discardLocked() {
	j.txn.jobs = without(j.txn.jobs, j)
	j.cancel()
	j.stepLocked(machine.Drop)
	close(j.finished)
}

// Start lets the job run. It returns when the job has ended or has come to its first wait: what it
// does up to there comes before the answer to the command that started it. The job stays there
// until release is called, which the caller does once that answer is on its way.
func (m *Manager) Start(j *Job) (release func()) {
	m.mu.Lock()
	if j.st.Status != machine.Created {
		// Cancelled between Create and Start.
		m.mu.Unlock()
		return func() {}
	}
	m.running.Add(1)
	j.waiting.Store(false)
	j.stepLocked(machine.Start)
	m.mu.Unlock()
	if j.instant {
		j.released.open()
	}
	panics.Go("job '"+j.id+"'", j.main, nil)
	if j.Settle(); !j.instant {
		<-j.yielded.c
	}
	return j.released.open
}

// forgetLocked removes a job that has become null.
func (m *Manager) forgetLocked(j *Job) {
	j.gone = true
	delete(m.byID, j.id)
	m.jobs = without(m.jobs, j)
}

func without(l []*Job, j *Job) []*Job {
	return slices.DeleteFunc(l, func(o *Job) bool { return o == j })
}

// Get returns the job called id, or nil.
func (m *Manager) Get(id string) *Job {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.byID[id]
}

// Shutdown cancels all jobs by force, newest first, dismisses concluded ones, and waits for their
// goroutines or until ctx ends. New jobs are refused from now on.
func (m *Manager) Shutdown(ctx context.Context) error {
	m.mu.Lock()
	m.quitting = true
	m.mu.Unlock()
	all := m.concerned(visible.DaemonEnds, nil)
	goingOn := m.quiesce(all)
	return panics.Await(ctx, "the end of all jobs", func() {
		for _, j := range all {
			m.mu.Lock()
			for _, e := range goingOn[j] {
				m.emitLocked(e)
			}
			m.mu.Unlock()
			j.released.open()
			m.end(j)
		}
		m.running.Wait()
	})
}

// quiesce is pauseInPassing for the end of the daemon: it returns what clients are to hear of the
// jobs going on, each just before its job is cancelled.
func (m *Manager) quiesce(l []*Job) map[*Job][]events.Event {
	spans, goingOn := spansOf(l), map[*Job][]events.Event{}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushLocked()
	for _, j := range m.pauseLocked(l, spans) {
		m.burst = []events.Event{}
		j.stepLocked(machine.LeavePause)
		goingOn[j], m.burst = m.burst, nil
	}
	return goingOn
}

// end cancels the job and waits until it is concluded and dismissed.
func (m *Manager) end(j *Job) {
	j.userCancel(true)
	<-j.finished
	m.mu.Lock()
	defer m.mu.Unlock()
	if !j.gone && j.st.Status == machine.Concluded {
		j.stepLocked(machine.Drop)
	}
}

// emitLocked sends an event, or keeps it for flushLocked.
// +checklocks:m.mu
func (m *Manager) emitLocked(e events.Event) {
	if m.burst != nil {
		m.burst = append(m.burst, e)
		return
	}
	m.sink.Emit(e)
}

// flushLocked ends a burst.
// +checklocks:m.mu
func (m *Manager) flushLocked() {
	if m.burst == nil {
		return
	}
	l := m.burst
	m.burst = nil
	events.EmitAll(m.sink, l...)
}
