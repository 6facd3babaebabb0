package jobs

import (
	"context"
	"time"

	"qblockd/events"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/jobs/machine"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// Handle is the job as its runner sees it. Its methods are for the runner's goroutine and its
// workers.
type Handle struct{ j *Job }

// Job is the job itself, e.g. as the parent of edges.
func (h *Handle) Job() *Job { return h.j }

// Yield tells that from here on the work takes its time: the command that started the job is
// answered now, and the job goes on after that. Only the first call does anything. A runner calls
// it before its first I/O.
func (h *Handle) Yield() {
	select {
	case <-h.j.released.c:
	default:
		h.j.yielded.open()
		<-h.j.released.c
	}
}

// Checkpoint is a pause point: it blocks while the job is paused and returns ErrCancelled once it
// is cancelled by force. It is called holding no gate pass and no conflict lock.
func (h *Handle) Checkpoint() error {
	j := h.j
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	if j.asleep {
		j.asleep = false
		j.wake.Broadcast()
	}
	return h.checkpointLocked()
}

// +checklocks:h.j.m.mu
func (h *Handle) checkpointLocked() error {
	j := h.j
	for j.st.ShouldPause() && !j.st.Ended { // else a Preparer calls: nobody could resume it
		j.yielded.open()
		j.stepLocked(machine.EnterPause)
		j.m.flushLocked()
		j.waiting.Store(true)
		j.paused.Store(true)
		for j.st.ShouldPause() {
			j.wake.Wait()
		}
		j.paused.Store(false)
		j.waiting.Store(false)
		j.stepLocked(machine.LeavePause)
	}
	j.m.flushLocked()
	if j.st.Forced || j.ctx.Err() != nil { // the latter: whose work is over is given up while it prepares
		return ErrCancelled
	}
	return nil
}

// Cancelled tells whether the job was asked to end early, softly or by force.
func (h *Handle) Cancelled() bool {
	h.j.m.mu.Lock()
	defer h.j.m.mu.Unlock()
	return h.j.st.Cancelled
}

// Paused tells whether the runner waits at a pause point. It takes no lock.
func (h *Handle) Paused() bool { return h.j.paused.Load() }

// Ready announces that the job only waits for Complete (or a soft cancel).
func (h *Handle) Ready() {
	h.j.m.mu.Lock()
	defer h.j.m.mu.Unlock()
	h.j.stepLocked(machine.BecomeReady)
}

// Show is Manager.Show.
func (h *Handle) Show(at visible.Moment, nodes ...*graph.Node) { h.j.m.Show(at, nodes...) }

// SetRemaining says how much is still to do, in the unit of Done (bytes).
func (h *Handle) SetRemaining(n int64) { h.j.total.Store(h.j.current.Load() + n) }

// AddRemaining adds to what is still to do.
func (h *Handle) AddRemaining(n int64) { h.j.total.Add(n) }

// Done counts n as done.
func (h *Handle) Done(n int64) { h.j.current.Add(n) }

// SetProgress says how much is done, and of how much, in a unit of the job's own.
func (h *Handle) SetProgress(done, all int64) {
	h.j.current.Store(done)
	h.j.total.Store(all)
}

// SetCheck says what the check of an image has found.
func (h *Handle) SetCheck(c *types.ImageCheck) { h.j.check.Store(c) }

// Throttle counts n bytes against the job's speed and sleeps as long as that demands, at a pause
// point. It returns what Checkpoint does. It is called holding no gate pass and no conflict lock.
func (h *Handle) Throttle(n int64) error {
	for wait := h.toll(n); wait > 0; wait = h.toll(0) {
		h.j.yielded.open()
		if err := h.Sleep(wait); err != nil {
			return err
		}
	}
	return h.Checkpoint()
}

// Linger waits as long as the job's speed demands after what was counted, or until something
// happens to the job; then it is a pause point.
func (h *Handle) Linger() error {
	wait := h.toll(0)
	if wait <= 0 {
		return h.Checkpoint()
	}
	h.j.yielded.open()
	return h.Sleep(wait)
}

// Limited tells whether the job has a speed limit.
func (h *Handle) Limited() bool {
	h.j.m.mu.Lock()
	defer h.j.m.mu.Unlock()
	return h.j.block.speed > 0
}

// Idle waits until the job is cancelled by force, and is paused meanwhile as users ask for it.
func (h *Handle) Idle() error {
	for {
		if err := h.Sleep(time.Hour); err != nil {
			return err
		}
	}
}

// Sleep waits for d or until something happens to the job (a verb, Kick), and then passes a pause
// point: it returns what Checkpoint does.
func (h *Handle) Sleep(d time.Duration) error {
	j := h.j
	j.m.mu.Lock()
	kick := j.block.kick
	if kick == nil {
		kick = make(chan struct{})
		j.block.kick = kick
	}
	j.asleep = !j.st.ShouldPause() && !j.st.Forced
	asleep := j.asleep
	j.wake.Broadcast() // Settle
	j.m.mu.Unlock()
	if asleep {
		j.waiting.Store(true)
		over := make(chan struct{})
		stop := j.m.clock.AfterFunc("a sleep of job '"+j.id+"'", d, func() { close(over) })
		select {
		case <-over:
		case <-kick:
		case <-j.ctx.Done():
		}
		stop.Stop()
		j.waiting.Store(false)
	}
	return h.Checkpoint()
}

// ErrorAction is what an error policy makes of an I/O error.
type ErrorAction = types.BlockErrorAction

// OnError applies an error policy to a failed read or write of a block job: the event is sent, and
// the job is paused at its next pause point where the policy says stop. The runner fails, skips the
// unit, or tries again after Checkpoint.
func (h *Handle) OnError(op types.IoOperationType, policy types.BlockdevOnError, err error) ErrorAction {
	h.j.m.mu.Lock()
	defer h.j.m.mu.Unlock()
	return h.onErrorLocked(op, policy, err)
}

// OnErrorIdle is OnError for a runner that has nothing else in flight: where the policy says stop,
// it is a pause point, so that clients hear of the error and the pause together.
func (h *Handle) OnErrorIdle(op types.IoOperationType, policy types.BlockdevOnError, err error) (ErrorAction, error) {
	h.j.m.mu.Lock()
	defer h.j.m.mu.Unlock()
	h.j.m.burst = []events.Event{}
	action := h.onErrorLocked(op, policy, err)
	if action == types.BlockErrorActionStop {
		return action, h.checkpointLocked()
	}
	h.j.m.flushLocked()
	return action, nil
}

// +checklocks:h.j.m.mu
func (h *Handle) onErrorLocked(op types.IoOperationType, policy types.BlockdevOnError, err error) ErrorAction {
	j := h.j
	action := decide(policy, err)
	if j.st.Ended && action == types.BlockErrorActionStop {
		action = types.BlockErrorActionReport // whose work is over cannot pause
	}
	j.m.emitLocked(types.BlockJobErrorEvent{Device: j.id, Operation: op, Action: action})
	if action == types.BlockErrorActionStop {
		if !j.st.UserPaused {
			j.stepLocked(machine.UserPause)
		}
		j.block.setIOStatus(err)
	}
	return action
}

// Context is done once the job is cancelled by force or over.
func (h *Handle) Context() context.Context { return h.j.ctx }

// MustWait tells whether the next Throttle will wait, for a pause or for the job's speed. A runner
// with work in flight waits for that first.
func (h *Handle) MustWait() bool {
	h.j.m.mu.Lock()
	pause := h.j.st.ShouldPause()
	h.j.m.mu.Unlock()
	return pause || h.toll(0) > 0
}

// Count counts n bytes against the job's speed without waiting; the next Throttle does.
func (h *Handle) Count(n int64) { h.toll(n) }

// toll counts n bytes against the job's speed and returns how long to wait before more may pass. A
// job that was told to come to its end waits for nothing: somebody waits for it.
func (h *Handle) toll(n int64) time.Duration {
	h.j.m.mu.Lock()
	defer h.j.m.mu.Unlock()
	if h.j.block.lastPass || h.j.st.Ended {
		return 0
	}
	return h.j.block.limit.take(h.j.m.clock.Now(), n)
}

// careful calls the runner: a panic of it is an error of the job.
func (h *Handle) careful(f func() error) (err error) {
	defer panics.Into(string(h.j.typ)+" job '"+h.j.id+"'", &err)
	return f()
}

// certain calls what of the runner cannot fail. After a panic the nodes of the job are in doubt.
func (h *Handle) certain(f func(h *Handle)) {
	if err := h.careful(func() error { f(h); return nil }); err != nil {
		for _, n := range h.j.nodes {
			n.Fail(err)
		}
	}
}
