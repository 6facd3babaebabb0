package meta

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

// job is a job beside what it is to do.
type job struct {
	id      string
	job     *jobs.Job
	chain   []*image // those it has to do with, the one that guests use first
	touched []*image // of these, those whose content is not known before it ends
	drops   []*image // of these, those that nobody needs afterwards
	manual  bool     // finalize
	keep    bool     // dismiss
	pivots  bool     // it gets ready and has to be completed
	// completed: that was accepted.
	completed bool
	// fault is the file that may have failed; failed is how often it had before.
	fault  *drivertest.Fault
	failed int64
	// done takes over what the job has done, or not done if it was cancelled.
	done func(j *job, cancelled bool) error
}

// newJob makes one, of which the name and how it ends are random.
func (w *world) newJob(r *rand.Rand, chain ...*image) *job {
	w.count++
	return &job{id: fmt.Sprintf("j%d", w.count), chain: chain, manual: r.IntN(2) == 0, keep: r.IntN(3) == 0}
}

// begun takes over a job that was started.
func (w *world) begun(j *job) error {
	j.job = w.x.Jobs.Get(j.id)
	if j.job == nil && (j.manual || j.keep || j.pivots) {
		return fmt.Errorf("job %s has gone by itself", j.id)
	}
	w.jobs = append(w.jobs, j)
	if j.job == nil {
		return w.ended(j, nil)
	}
	return nil
}

// steady tells whether m can be the backing file of a new image.
func (w *world) steady(m *image) bool {
	j := w.jobOn(m)
	return !m.unknown && (j == nil || indexOf(j.touched, m) < 0 && indexOf(j.drops, m) < 0)
}

// undefined tells whether a job is changing the content of m.
func (w *world) undefined(m *image) bool {
	j := w.jobOn(m)
	return j != nil && indexOf(j.touched, m) >= 0
}

// busy tells whether a job has to do with m. It may be over already.
func (w *world) busy(m *image) bool { return w.jobOn(m) != nil }

// busyFrom is busy for m and the open images that back on it.
func (w *world) busyFrom(m *image) bool {
	return w.busy(m) || slices.ContainsFunc(w.dependents(m, true), w.busyFrom)
}

func (w *world) jobOn(m *image) *job {
	for _, j := range w.jobs {
		for _, x := range j.chain {
			if x == m {
				return j
			}
		}
	}
	return nil
}

// stream starts a stream job.
func (w *world) stream(m *image, o Op) error {
	if m.closed || !m.own || m.format != types.BlockdevDriverQcow2 {
		return nil
	}
	r := rnd(o)
	var chain []*image
	busy := false
	for x := m; x != nil; x = x.backing {
		chain = append(chain, x)
		busy = busy || w.busy(x)
	}
	if busy {
		return nil
	}
	j := w.newJob(r, chain...)
	var base *image // nil: nothing stays
	a := &types.BlockStreamArgs{JobID: &j.id, Device: m.name(), AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep)}
	how := ""
	if len(chain) > 1 {
		if k := 1 + r.IntN(len(chain)); k < len(chain) {
			base = chain[k]
		}
	}
	if base != nil {
		n := w.node(base)
		if n == nil {
			return fmt.Errorf("%s has no node", base.name())
		}
		switch r.IntN(3) {
		case 0:
			last := w.node(chain[indexOf(chain, base)-1])
			a.Bottom, how = rig.Ptr(last.Name()), " bottom "+last.Name()
		default:
			a.BaseNode, how = rig.Ptr(n.Name()), " base "+n.Name()
		}
		if a.Bottom == nil && r.IntN(4) == 0 {
			a.BackingFile = rig.Ptr(w.x.Path(base.file()))
		}
	}
	if r.IntN(2) == 0 {
		a.Speed = rig.Ptr(int64(1 + r.IntN(4<<20)))
	}
	if r.IntN(3) == 0 {
		a.FilterNodeName = rig.Ptr("filter-" + j.id)
	}
	fails := ""
	if len(chain) > 2 && base != chain[1] {
		// What is copied may not change, nor what that backs on.
		for _, x := range chain[1:] {
			if x.canSet {
				fails = x.name() + " has a guest that may write"
			}
		}
	} else if len(chain) == 2 && base == nil && chain[1].canSet {
		fails = chain[1].name() + " has a guest that may write"
	}
	err := w.x.BlockJob.BlockStream(w.ctx, a)
	w.did("stream %s as %s%s, speed %v, manual %v: %s %v", m.name(), j.id, how, a.Speed != nil, j.manual, fails, err)
	if err := expect(err, fails); err != nil || fails != "" {
		return err
	}
	j.done = func(_ *job, cancelled bool) error {
		if !cancelled {
			m.backing = base
			w.prune()
		}
		return w.linked(m)
	}
	return w.begun(j)
}

func indexOf(l []*image, m *image) int {
	for i, x := range l {
		if x == m {
			return i
		}
	}
	return -1
}

// some is one of the jobs there are, those of slot o.Slot first.
func (w *world) some(m *image) *job {
	if j := w.jobOn(m); j != nil {
		return j
	}
	if len(w.jobs) > 0 {
		return w.jobs[0]
	}
	return nil
}

func (w *world) tick(m *image, o Op) error {
	d := time.Duration(o.A%2000) * time.Millisecond
	w.did("tick %v", d)
	w.x.Clock.Advance(d)
	return nil
}

// verb applies one that is refused only if the job is in the wrong state.
func (w *world) verb(m *image, name string, f func(*jobs.Job) error) error {
	if j := w.some(m); j != nil {
		w.did("%s %s: %v", name, j.id, f(j.job))
	}
	return nil
}

func (w *world) pause(m *image, o Op) error  { return w.verb(m, "pause", (*jobs.Job).Pause) }
func (w *world) resume(m *image, o Op) error { return w.verb(m, "resume", (*jobs.Job).Resume) }

func (w *world) speed(m *image, o Op) error {
	return w.verb(m, "speed", func(j *jobs.Job) error { return j.SetSpeed(int64(o.A % (8 << 20))) })
}

// cancel cancels a job, which then has done nothing, or was over.
func (w *world) cancel(m *image, o Op) error {
	j := w.some(m)
	if j == nil {
		return nil
	}
	force := true
	if j.pivots && o.B%2 == 0 {
		force = false // without a pivot, once it is ready
		if err := w.joined(j.chain[0]); err != nil {
			return err
		}
	}
	err := j.job.Cancel(force)
	w.did("cancel %s, force %v: %v", j.id, force, err)
	return w.bring(j, err != nil)
}

func (w *world) finish(m *image, o Op) error {
	if j := w.some(m); j != nil {
		return w.finishJob(j)
	}
	return nil
}

// settle waits for the end of the job that has to do with m.
func (w *world) settle(m *image) error {
	for j := w.jobOn(m); j != nil; j = w.jobOn(m) {
		if err := w.finishJob(j); err != nil {
			return err
		}
	}
	return nil
}

// jobsOver settles jobs that end by themselves, at any time: with what they do to m's chain done,
// or not begun.
func (w *world) jobsOver(m *image) error {
	for j := w.jobOn(m); j != nil && !j.manual; j = w.jobOn(m) {
		if err := w.finishJob(j); err != nil {
			return err
		}
	}
	return nil
}

// finishJob brings a job to its end and takes over what it has done to the chain.
func (w *world) finishJob(j *job) error { return w.bring(j, true) }

// bring is finishJob; complete: a job that pivots is to do so.
func (w *world) bring(j *job, complete bool) error {
	if j.pivots {
		if err := w.joined(j.chain[0]); err != nil { // its guest moves
			return err
		}
	}
	w.did("finish %s", j.id)
	for {
		select {
		case <-j.job.Finished():
			return w.ended(j, j.job.Err())
		case <-w.ctx.Done():
			return fmt.Errorf("job %s does not end: %w", j.id, w.ctx.Err())
		case <-time.After(time.Millisecond):
		}
		// Each is refused in states where it is not needed.
		_ = j.job.Resume()
		_ = j.job.SetSpeed(0)
		if j.pivots && complete && j.job.Complete(w.ctx) == nil {
			j.completed = true
		}
		if j.manual {
			_ = j.job.Finalize()
		}
		w.x.Clock.Advance(time.Second)
	}
}

// ended changes the model as the job has changed the graph.
func (w *world) ended(j *job, failure error) error {
	for i, x := range w.jobs {
		if x == j {
			w.jobs = append(w.jobs[:i], w.jobs[i+1:]...)
			break
		}
	}
	w.did("%s ended: %v", j.id, failure)
	if j.keep {
		if err := j.job.Dismiss(); err != nil {
			return err
		}
	}
	if failed := j.disarm(); failure != nil && failure.Error() != jobs.ErrCancelled.Error() && !failed {
		return failure
	}
	return j.done(j, failure != nil)
}

// linked checks the backing link of an open image, and whether it is read-only.
func (w *world) linked(m *image) error {
	n := w.node(m)
	switch e := n.Backing(); {
	case m.backing == nil && e != nil:
		return fmt.Errorf("%s still backs on %s", m.name(), e.Node().Name())
	case m.backing != nil && (e == nil || e.Node().SkipFilters() != w.node(m.backing)):
		return fmt.Errorf("%s does not back on %s", m.name(), m.backing.name())
	}
	if n.ReadOnly() != m.ro {
		return fmt.Errorf("%s: read-only %v after the job", m.name(), n.ReadOnly())
	}
	return nil
}
