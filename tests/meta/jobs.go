package meta

import (
	"slices"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
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
	done func(j *job, cancelled bool)
}

// underway are the jobs that are not known to be over.
type underway struct{ jobs []*job }

// speedLimit is one for a job, one in so many times.
func (o *op) speedLimit(n int) *int64 {
	if !trial.One(o.r, n) {
		return nil
	}
	return rig.Ptr(int64(1 + o.r.IntN(4<<20)))
}

// newJob makes one, of which the name and how it ends are random.
func (o *op) newJob(chain ...*image) *job {
	return &job{id: o.unique("j"), chain: chain, manual: o.r.IntN(2) == 0, keep: o.r.IntN(3) == 0}
}

// begun takes over a job that was started.
func (w *world) begun(j *job) {
	j.job = w.x.Jobs.Get(j.id)
	if j.job == nil && (j.manual || j.keep || j.pivots) {
		trial.Fail("job %s has gone by itself", j.id)
	}
	w.jobs = append(w.jobs, j)
	if j.job == nil {
		w.ended(j, nil)
	}
}

// steady tells whether m can be the backing file of a new image.
func (l *underway) steady(m *image) bool {
	j := l.jobOn(m)
	return !m.unknown && (j == nil || !slices.Contains(j.touched, m) && !slices.Contains(j.drops, m))
}

// undefined tells whether a job is changing the content of m.
func (l *underway) undefined(m *image) bool {
	j := l.jobOn(m)
	return j != nil && slices.Contains(j.touched, m)
}

// busy tells whether a job has to do with m. It may be over already.
func (l *underway) busy(m *image) bool { return l.jobOn(m) != nil }

// busyFrom is busy for m and the open images that back on it.
func (w *world) busyFrom(m *image) bool {
	return w.busy(m) || slices.ContainsFunc(w.dependents(m, true), w.busyFrom)
}

func (l *underway) jobOn(m *image) *job {
	for _, j := range l.jobs {
		if slices.Contains(j.chain, m) {
			return j
		}
	}
	return nil
}

// stream starts a stream job.
func (o *op) stream(m *image) {
	if m.closed || !m.own || m.format != types.BlockdevDriverQcow2 {
		return
	}
	var chain []*image
	busy := false
	for x := m; x != nil; x = x.backing {
		chain = append(chain, x)
		busy = busy || o.busy(x)
	}
	if busy {
		return
	}
	j := o.newJob(chain...)
	var base *image // nil: nothing stays
	a := &types.BlockStreamArgs{JobID: &j.id, Device: m.name(),
		AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep)}
	how := ""
	if len(chain) > 1 {
		if k := 1 + o.r.IntN(len(chain)); k < len(chain) {
			base = chain[k]
		}
	}
	if base != nil {
		n := o.mustNode(base)
		switch o.r.IntN(3) {
		case 0:
			last := o.node(chain[slices.Index(chain, base)-1])
			a.Bottom, how = rig.Ptr(last.Name()), " bottom "+last.Name()
		default:
			a.BaseNode, how = rig.Ptr(n.Name()), " base "+n.Name()
		}
		if a.Bottom == nil && o.r.IntN(4) == 0 {
			a.BackingFile = rig.Ptr(o.x.Path(base.file()))
		}
	}
	a.Speed = o.speedLimit(2)
	if o.r.IntN(3) == 0 {
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
	err := o.x.BlockJob.BlockStream(o.ctx, a)
	o.did("stream %s as %s%s, speed %v, manual %v: %s %v", m.name(), j.id, how, a.Speed != nil, j.manual, fails, err)
	if expect(err, fails) {
		return
	}
	j.done = func(_ *job, cancelled bool) {
		if !cancelled {
			m.backing = base
			o.prune()
		}
		o.linked(m)
	}
	o.begun(j)
}

// some is one of the jobs there are, those of slot o.Slot first.
func (l *underway) some(m *image) *job {
	if j := l.jobOn(m); j != nil {
		return j
	}
	if len(l.jobs) > 0 {
		return l.jobs[0]
	}
	return nil
}

func (o *op) tick(m *image) {
	d := time.Duration(o.A%2000) * time.Millisecond
	o.did("tick %v", d)
	o.x.Clock.Advance(d)
}

// verb applies one that is refused only if the job is in the wrong state.
func verb(name string, f func(*op, *jobs.Job) error) func(*op, *image) {
	return func(o *op, m *image) {
		if j := o.some(m); j != nil {
			o.did("%s %s: %v", name, j.id, f(o, j.job))
		}
	}
}

var (
	pause  = verb("pause", func(_ *op, j *jobs.Job) error { return j.Pause() })
	resume = verb("resume", func(_ *op, j *jobs.Job) error { return j.Resume() })
	speed  = verb("speed", func(o *op, j *jobs.Job) error { return j.SetSpeed(int64(o.A % (8 << 20))) })
)

// cancel cancels a job, which then has done nothing, or was over.
func (o *op) cancel(m *image) {
	j := o.some(m)
	if j == nil {
		return
	}
	force := true
	if j.pivots && o.B%2 == 0 {
		force = false // without a pivot, once it is ready
		o.joined(j.chain[0])
	}
	err := j.job.Cancel(force)
	o.did("cancel %s, force %v: %v", j.id, force, err)
	o.bring(j, err != nil)
}

func (o *op) finish(m *image) {
	if j := o.some(m); j != nil {
		o.bring(j, true)
	}
}

// settle waits for the end of the job that has to do with m.
func (w *world) settle(m *image) {
	for j := w.jobOn(m); j != nil; j = w.jobOn(m) {
		w.bring(j, true)
	}
}

// jobsOver settles jobs that end by themselves, at any time: with what they do to m's chain done,
// or not begun.
func (w *world) jobsOver(m *image) {
	for j := w.jobOn(m); j != nil && !j.manual; j = w.jobOn(m) {
		w.bring(j, true)
	}
}

// bring brings a job to its end and takes over what it has done to the chain. complete: one that
// pivots is to do so.
func (w *world) bring(j *job, complete bool) {
	if j.pivots {
		w.joined(j.chain[0]) // its guest moves
	}
	w.did("finish %s", j.id)
	for {
		select {
		case <-j.job.Finished():
			w.ended(j, j.job.Err())
			return
		case <-w.ctx.Done():
			trial.Fail("job %s does not end: %w", j.id, w.ctx.Err())
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
func (w *world) ended(j *job, failure error) {
	w.jobs = slices.DeleteFunc(w.jobs, func(x *job) bool { return x == j })
	w.did("%s ended: %v", j.id, failure)
	if j.keep {
		trial.Must(j.job.Dismiss())
	}
	if failed := j.disarm(); failure != nil && failure.Error() != jobs.ErrCancelled.Error() && !failed {
		trial.Must(failure)
	}
	j.done(j, failure != nil)
}

// linked checks the backing link of an open image, and whether it is read-only.
func (w *world) linked(m *image) {
	n := w.node(m)
	switch e := n.Backing(); {
	case m.backing == nil && e != nil:
		trial.Fail("%s still backs on %s", m.name(), e.Node().Name())
	case m.backing != nil && (e == nil || e.Node().SkipFilters() != w.node(m.backing)):
		trial.Fail("%s does not back on %s", m.name(), m.backing.name())
	}
	if n.ReadOnly() != m.ro {
		trial.Fail("%s: read-only %v after the job", m.name(), n.ReadOnly())
	}
}
