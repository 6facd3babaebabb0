package jobs

import (
	"time"

	"qblockd/events/panics"
	"qblockd/jobs/machine"
)

// instantLimit is how long a command waits at most for a job on nodes that answer at once. It bounds what a client waits and so is real time.
const instantLimit = 200 * time.Millisecond

// Settle waits until a job on nodes that answer at once has nothing more to do without waiting, no longer than instantLimit. With other jobs it does
// nothing. A command that has started the job calls it before it is answered.
func (j *Job) Settle() {
	if !j.instant {
		return
	}
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	over := false
	limit := panics.AfterFunc("a wait for a job", instantLimit, func() {
		j.m.mu.Lock()
		defer j.m.mu.Unlock()
		over = true
		j.wake.Broadcast()
	})
	defer limit.Stop()
	for !over && !j.settledLocked() {
		j.wake.Wait()
	}
}

func (j *Job) settledLocked() bool {
	return j.asleep || j.idleLocked() || j.gone || j.st.Status == machine.Concluded || j.st.Status == machine.Pending && !j.st.AutoFinalize
}

// DeferEnd is called by a command that is about to ask the job to end or to go on. If the job is of the kind whose end comes after the command's answer,
// it is neither ready nor over before answered is called, or cancelGrace has passed. answered waits, for cancelGrace at most, for the end of a job that was cancelled by
// force, so that the client's next command finds it over.
func (j *Job) DeferEnd() (answered func()) {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	if !j.lateEnd || j.answered != nil || !j.st.Started || j.st.Ended {
		return func() {}
	}
	c := make(chan struct{})
	j.answered = c
	return func() {
		j.m.mu.Lock()
		j.answered = nil
		close(c)
		forced := j.st.Forced
		j.m.mu.Unlock()
		if forced {
			j.awaitEnd()
		}
	}
}

// awaitAnswer holds the job up for DeferEnd.
func (j *Job) awaitAnswer() {
	j.m.mu.Lock()
	c := j.answered
	j.m.mu.Unlock()
	if c == nil {
		return
	}
	limit := time.NewTimer(cancelGrace)
	defer limit.Stop()
	select {
	case <-c:
	case <-limit.C:
	}
}
