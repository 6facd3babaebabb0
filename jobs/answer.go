package jobs

import (
	"qblockd/events/panics"
	"qblockd/jobs/machine"
	"qblockd/jobs/visible"
)

// Settle waits until an instant job has nothing more to do without waiting, no longer than
// visible.StartLimit. With other jobs it does nothing. A command that has started the job calls it
// before it is answered.
func (j *Job) Settle() {
	if !j.instant {
		return
	}
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	over := false
	limit := panics.AfterFunc("a wait for a job", visible.StartLimit, func() {
		j.m.mu.Lock()
		defer j.m.mu.Unlock()
		over = true
		j.wake.Broadcast()
	})
	defer limit.Stop()
	for !over && !j.asleep && !j.st.Status.IsIdle() && !j.gone && j.st.Status != machine.Concluded &&
		(j.st.Status != machine.Pending || j.st.AutoFinalize) {
		j.wake.Wait()
	}
}

// DeferEnd is called by a command that is about to apply v. If that is answered before what the job
// does then (visible.AnswerFirst), the job is neither ready nor over before answered is called, or
// visible.EndLimit has passed. answered waits as long, at most, for the end of a job that was
// cancelled by force.
func (j *Job) DeferEnd(v machine.Verb) (answered func()) {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	if !visible.AnswerFirst(j.seenAs, v) || j.answered != nil || !j.st.Started || j.st.Ended {
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

// AwaitAnswer lets the command that made the job end or go on be answered first; see Job.DeferEnd.
func (h *Handle) AwaitAnswer() {
	h.j.m.mu.Lock()
	c := h.j.answered
	h.j.m.mu.Unlock()
	if c != nil {
		await(c, visible.EndLimit)
	}
}
