package meta

import (
	"fmt"
	"time"

	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

// streamJob is a job beside what it is to do.
type streamJob struct {
	id     string
	job    *jobs.Job
	chain  []*image // from the top to the end of its backing chain
	base   *image   // nil: nothing stays
	manual bool     // finalize
	keep   bool     // dismiss
}

// busy tells whether a job has to do with m. It may be over already.
func (w *world) busy(m *image) bool { return w.jobOn(m) != nil }

func (w *world) jobOn(m *image) *streamJob {
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
	w.count++
	j := &streamJob{id: fmt.Sprintf("j%d", w.count), chain: chain, manual: r.IntN(2) == 0, keep: r.IntN(3) == 0}
	a := &types.BlockStreamArgs{JobID: &j.id, Device: m.name(), AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep)}
	how := ""
	if len(chain) > 1 {
		if k := 1 + r.IntN(len(chain)); k < len(chain) {
			j.base = chain[k]
		}
	}
	if j.base != nil {
		n := w.node(j.base)
		if n == nil {
			return fmt.Errorf("%s has no node", j.base.name())
		}
		switch r.IntN(3) {
		case 0:
			last := w.node(chain[indexOf(chain, j.base)-1])
			a.Bottom, how = rig.Ptr(last.Name()), " bottom "+last.Name()
		default:
			a.BaseNode, how = rig.Ptr(n.Name()), " base "+n.Name()
		}
		if a.Bottom == nil && r.IntN(4) == 0 {
			a.BackingFile = rig.Ptr(w.x.Path(j.base.file()))
		}
	}
	if r.IntN(2) == 0 {
		a.Speed = rig.Ptr(int64(1 + r.IntN(4<<20)))
	}
	if r.IntN(3) == 0 {
		a.FilterNodeName = rig.Ptr("filter-" + j.id)
	}
	fails := ""
	if len(chain) > 2 && j.base != chain[1] {
		// What is copied may not change, nor what that backs on.
		for _, x := range chain[1:] {
			if x.canSet {
				fails = x.name() + " has a guest that may write"
			}
		}
	} else if len(chain) == 2 && j.base == nil && chain[1].canSet {
		fails = chain[1].name() + " has a guest that may write"
	}
	err := w.x.BlockJob.BlockStream(w.ctx, a)
	w.did("stream %s as %s%s, speed %v, manual %v: %s %v", m.name(), j.id, how, a.Speed != nil, j.manual, fails, err)
	if err := expect(err, fails); err != nil || fails != "" {
		return err
	}
	j.job = w.x.Jobs.Get(j.id)
	if j.job == nil && (j.manual || j.keep) {
		return fmt.Errorf("job %s has gone by itself", j.id)
	}
	w.jobs = append(w.jobs, j)
	if j.job == nil {
		return w.ended(j, nil)
	}
	return nil
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
func (w *world) some(m *image) *streamJob {
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
	w.did("cancel %s: %v", j.id, j.job.Cancel(true))
	return w.finishJob(j)
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

// jobsOver settles jobs that end by themselves, at any time: with what they do to m's chain done, or not begun.
func (w *world) jobsOver(m *image) error {
	for j := w.jobOn(m); j != nil && !j.manual; j = w.jobOn(m) {
		if err := w.finishJob(j); err != nil {
			return err
		}
	}
	return nil
}

// finishJob brings a job to its end and takes over what it has done to the chain.
func (w *world) finishJob(j *streamJob) error {
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
		if j.manual {
			_ = j.job.Finalize()
		}
		w.x.Clock.Advance(time.Second)
	}
}

// ended changes the model as the job has changed the graph.
func (w *world) ended(j *streamJob, failure error) error {
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
	if failure != nil && failure.Error() != jobs.ErrCancelled.Error() {
		return failure
	}
	top := j.chain[0]
	if failure == nil {
		top.backing = j.base
		w.prune()
	}
	n := w.node(top)
	switch e := n.Backing(); {
	case top.backing == nil && e != nil:
		return fmt.Errorf("%s still backs on %s", top.name(), e.Node().Name())
	case top.backing != nil && (e == nil || e.Node() != w.node(top.backing)):
		return fmt.Errorf("%s does not back on %s", top.name(), top.backing.name())
	}
	if n.ReadOnly() != top.ro {
		return fmt.Errorf("%s: read-only %v after the job", top.name(), n.ReadOnly())
	}
	return nil
}
