package jobs

import (
	"context"
	"errors"
	"fmt"

	"qblockd/events/panics"
	"qblockd/jobs/machine"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

var errNegativeSpeed = errors.New("Parameter 'speed' expects a non-negative value")

// The verbs. Each is refused where the machine's table says so. Those that end a job return when
// its transaction has ended as far as it can at once; none waits for a job's work.

// applyLocked tells why the job does not take a verb in its state.
func (j *Job) applyLocked(v machine.Verb) error {
	if machine.Allowed(v, j.st.Status) {
		return nil
	}
	return fmt.Errorf("Job '%s' in state '%s' cannot accept command verb '%s'", j.id, j.st.Status, v)
}

// alter applies a verb that changes what is recorded of the job: that is told first, and may be
// refused. check tells whether the verb can be applied, also after that has taken its time. Both it
// and apply are called with m.mu held.
func (j *Job) alter(check func() error, change func(s *State), apply func()) error {
	locked := func(f func() error) error {
		j.m.mu.Lock()
		defer j.m.mu.Unlock()
		return f()
	}
	j.altering.Lock()
	defer j.altering.Unlock()
	if err := locked(check); err != nil {
		return err
	}
	was := j.record.Value().(State)
	is := was
	change(&is)
	if err := j.record.Set(is); err != nil {
		return err
	}
	err := locked(func() error {
		err := check()
		if err == nil {
			apply()
		}
		return err
	})
	if err != nil {
		err = errors.Join(err, j.record.Set(was))
	}
	return err
}

// Pause stops the job at its next pause point. A second user pause is refused. Like all that is
// recorded of a job it may block, and fail, with the recorder.
func (j *Job) Pause() error {
	err := j.alter(func() error {
		if err := j.applyLocked(machine.Pause); err != nil {
			return err
		}
		if j.st.UserPaused {
			return errors.New("Job is already paused")
		}
		return nil
	}, func(s *State) { s.Paused = true }, func() { j.stepLocked(machine.UserPause) })
	if err != nil {
		return err
	}
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	for j.asleep && j.st.ShouldPause() {
		// It was woken and stops without doing anything else: what the client is told next is that
		// it is paused.
		j.wake.Wait()
	}
	return nil
}

// Resume ends a user pause or an error policy's stop.
func (j *Job) Resume() error {
	err := j.alter(func() error {
		if !j.st.UserPaused {
			return errors.New("Can't resume a job that was not paused")
		}
		return j.applyLocked(machine.Resume)
	}, func(s *State) { s.Paused = false }, func() {
		j.block.resetIOStatus()
		j.stepLocked(machine.UserResume)
	})
	if err != nil {
		return err
	}
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	j.awaitWakingLocked()
	return nil
}

// awaitWakingLocked waits until a job that is not to be paused any more goes on.
func (j *Job) awaitWakingLocked() {
	for j.st.Status.IsIdle() && !j.st.ShouldPause() {
		j.wake.Wait()
	}
}

// Quiesce pauses the job until Unquiesce, while its nodes are quiesced for its start: clients see
// it pause and go on before its first step.
func (j *Job) Quiesce() {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	j.stepLocked(machine.PauseBegin)
}

// Unquiesce ends that. It returns when the job goes on, unless something else keeps it paused.
func (j *Job) Unquiesce() {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	j.stepLocked(machine.PauseEnd)
	j.awaitWakingLocked()
}

// Count counts n bytes as done: for what is done in place of the job's runner.
func (j *Job) Count(n int64) { j.current.Add(n) }

// Cancel ends the job early; force makes a ready job a failure too. If the job was doing nothing,
// its last events come before Cancel returns.
func (j *Job) Cancel(force bool) error {
	j.m.mu.Lock()
	err := j.applyLocked(machine.Cancel)
	idle := j.asleep || j.st.Status.IsIdle()
	j.m.mu.Unlock()
	if err != nil {
		return err
	}
	j.userCancel(force)
	j.m.mu.Lock()
	if j.answered != nil {
		idle = false
		j.awaitWakingLocked() // that it goes on is told before
	}
	idle = idle && j.st.Forced
	j.m.mu.Unlock()
	if idle {
		j.awaitEnd()
	}
	return nil
}

// awaitEnd waits for the end of the job, the events of its last step included, for visible.EndLimit
// at most.
func (j *Job) awaitEnd() {
	if await(j.finished, visible.EndLimit) {
		j.m.mu.Lock() // the events are out
		defer j.m.mu.Unlock()
	}
}

// userCancel cancels a job in any state. A job whose work is over takes its transaction along at
// once.
func (j *Job) userCancel(force bool) {
	m := j.m
	m.mu.Lock()
	switch {
	case !j.st.Started && !j.gone:
		// Whoever makes it is not done: its runner may not be touched yet. Start finds it
		// cancelled, if it comes to that.
		j.stepLocked(machine.CancelForce)
		j.cancel()
	case !j.st.Ended:
		// The job's goroutine ends it, and may hold the turn of its transaction.
		j.cancelLocked(force)
	}
	over := j.st.Ended
	if over {
		m.running.Add(1)
		j.txn.giveUpLocked()
	}
	m.mu.Unlock()
	if !over {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), visible.OverLimit)
	defer cancel()
	_ = panics.Await(ctx, "the cancel of job '"+j.id+"'", func() { // if it takes longer it goes on
		defer m.running.Done()
		j.cancelOver(force)
	})
}

// cancelOver cancels a job whose work is over, and with it its transaction.
func (j *Job) cancelOver(force bool) {
	m := j.m
	j.txn.lock()
	defer j.txn.unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if j.st.Status >= machine.Concluded {
		return
	}
	j.cancelLocked(force)
	if j.st.Forced && !j.txn.aborting && j.st.Status < machine.Concluded {
		j.updateLocked()
		j.txn.abortLocked(j)
	}
}

// Complete asks a ready job to finish.
func (j *Job) Complete(ctx context.Context) error {
	j.m.mu.Lock()
	err := j.applyLocked(machine.Complete)
	c, ok := j.runner.(Completer)
	if err == nil && (j.st.Cancelled || !ok) {
		err = fmt.Errorf("The active block job '%s' cannot be completed", j.id)
	}
	j.m.mu.Unlock()
	if err != nil {
		return err
	}
	if err := c.Complete(ctx); err != nil {
		return err
	}
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	j.lastPassLocked()
	return nil
}

// ChangeCopyMode changes when a mirror copies what is written (block-job-change).
func (j *Job) ChangeCopyMode(to types.MirrorCopyMode) error {
	c, ok := j.runner.(interface {
		ChangeCopyMode(to types.MirrorCopyMode) // does not block
	})
	return j.alter(func() error {
		if err := j.applyLocked(machine.Alter); err != nil || ok {
			return err
		}
		return errors.New("Job type does not support change")
	}, func(s *State) { s.CopyMode = to }, func() {
		c.ChangeCopyMode(to)
		j.kickLocked()
	})
}

// Finalize ends the transaction of a pending job.
func (j *Job) Finalize() error {
	j.txn.lock()
	defer j.txn.unlock()
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	if err := j.applyLocked(machine.Finalize); err != nil {
		return err
	}
	j.txn.finalizeLocked()
	return nil
}

// Dismiss removes a concluded job.
func (j *Job) Dismiss() error {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	if err := j.applyLocked(machine.Dismiss); err != nil {
		return err
	}
	j.stepLocked(machine.Drop)
	return nil
}

// SetSpeed limits a block job to bps bytes per second; 0: no limit.
func (j *Job) SetSpeed(bps int64) error {
	return j.alter(func() error {
		if err := j.applyLocked(machine.SetSpeed); err != nil || bps >= 0 {
			return err
		}
		return errNegativeSpeed
	}, func(s *State) { s.Speed = bps }, func() {
		j.block.speed = bps
		j.block.limit.setSpeed(bps)
		j.kickLocked()
	})
}

// UserPaused tells whether the user, or an error policy, has paused the job.
func (j *Job) UserPaused() bool {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	return j.st.UserPaused
}
