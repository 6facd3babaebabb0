package jobs

import (
	"slices"

	"qblockd/jobs/machine"
)

// Txn is a set of jobs that succeed or fail together. A single job is a transaction of one.
type Txn struct {
	m        *Manager
	turn     chan struct{} // holds one token; see the package comment
	jobs     []*Job        // guarded by m.mu; those not concluded
	aborting bool          // guarded by m.mu

	// givenUp: somebody is about to cancel one of the jobs, whose work is over. They are all given
	// up then, also while they prepare, unless they are through.
	preparing, givenUp bool // guarded by m.mu
}

// NewTxn makes a transaction for Spec.Txn.
func (m *Manager) NewTxn() *Txn {
	t := &Txn{m: m, turn: make(chan struct{}, 1)}
	t.turn <- struct{}{}
	return t
}

func (t *Txn) lock()   { <-t.turn }
func (t *Txn) unlock() { t.turn <- struct{}{} }

// jobEnded takes the outcome of j's work and ends the transaction if that decides it. It blocks
// until that is done.
func (t *Txn) jobEnded(j *Job, err error) {
	t.lock()
	defer t.unlock()
	m := t.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.aborting || j.st.Status.Completed() {
		// Another job failed and has ended this one as well.
		return
	}
	j.st.Ended = true
	if err != nil && !(j.st.Forced && isCancel(err)) && j.err == nil {
		j.err = err
	}
	if j.st.Forced && j.err == nil {
		j.err = ErrCancelled
	}
	if j.err != nil {
		j.stepLocked(machine.WorkFailed)
		t.abortLocked(j)
		return
	}
	j.stepLocked(machine.WorkEnded)
	for _, o := range t.jobs {
		if !o.st.Status.Completed() {
			return
		}
	}
	manual := false
	for _, o := range t.jobs {
		o.stepLocked(machine.AllWaiting)
		manual = manual || !o.st.AutoFinalize
	}
	if !manual {
		t.finalizeLocked()
	}
}

// finalizeLocked prepares every job and then commits them all, or aborts them all. The caller has
// the turn.
func (t *Txn) finalizeLocked() {
	if j, err := t.prepareLocked(); err != nil {
		if t.givenUp {
			j.cancelLocked(true)
			j.updateLocked()
		} else {
			j.failLocked(err)
		}
		t.abortLocked(j)
		return
	}
	for len(t.jobs) > 0 {
		t.jobs[0].finishLocked()
	}
}

// prepareLocked prepares every job, or returns the one that cannot be.
func (t *Txn) prepareLocked() (*Job, error) {
	if t.givenUp { // who cancels waits for the turn
		return t.jobs[0], ErrCancelled
	}
	t.preparing = true
	defer func() { t.preparing = false }()
	for _, j := range slices.Clone(t.jobs) {
		if err := j.prepareLocked(); err != nil {
			return j, err
		}
	}
	return nil, nil
}

// giveUpLocked ends what the jobs do, or are about to do, to prepare for their end. Whoever calls
// it cancels one of them next, when the turn is free.
func (t *Txn) giveUpLocked() {
	t.givenUp = true
	if !t.preparing {
		return
	}
	for _, j := range t.jobs {
		j.cancel()
	}
}

// abortLocked ends all jobs of the transaction as failures; j is the one that failed. The caller
// has the turn.
// +checklocksignore: m.mu is held, which is not seen through other jobs and transactions.
func (t *Txn) abortLocked(j *Job) {
	t.aborting = true
	for _, o := range slices.Clone(t.jobs) {
		if o != j {
			o.cancelLocked(true)
		}
	}
	for len(t.jobs) > 0 {
		o := t.jobs[0]
		if o.st.Started && !o.st.Ended {
			o.released.open()
			t.m.mu.Unlock()
			<-o.ended
			t.m.mu.Lock()
			o.st.Ended = true
		}
		o.finishLocked()
	}
}

// prepareLocked releases m.mu around the runner's call.
// +checklocksignore: m.mu is held, which is not seen through other jobs and transactions.
func (j *Job) prepareLocked() error {
	p, ok := j.runner.(Preparer)
	if !ok {
		return nil
	}
	j.m.mu.Unlock()
	defer j.m.mu.Lock()
	h := &Handle{j}
	return h.careful(func() error { return p.Prepare(j.ctx, h) })
}

// finishLocked is a job's last step: its runner commits or aborts and cleans up, the events are
// sent, the job leaves its transaction. It releases m.mu around the runner's calls.
// +checklocksignore: m.mu is held, which is not seen through other jobs and transactions.
func (j *Job) finishLocked() {
	j.updateLocked()
	failed, h := j.st.Failed, &Handle{j}
	j.m.mu.Unlock()
	if a, ok := j.runner.(Aborter); failed && ok {
		h.certain(a.Abort)
	}
	if c, ok := j.runner.(Committer); !failed && ok {
		h.certain(c.Commit)
	}
	if c, ok := j.runner.(Cleaner); ok {
		h.certain(c.Clean)
	}
	j.m.mu.Lock()
	j.txn.jobs = without(j.txn.jobs, j)
	j.stepLocked(machine.Finish)
	j.cancel()
}
