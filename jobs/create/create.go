// Package create is the job behind blockdev-create, which makes an image on a protocol node or a
// host file, behind x-blockdev-amend, which changes one, and behind x-qblockd-check, which looks
// one over and repairs it.
package create

import (
	"context"

	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// Job is a job that is about to start, of type create, amend or x-qblockd-check.
type Job struct {
	Type types.JobType
	ID   string
	Args any // as in jobs.State
	// Do makes or changes an image. It calls started once its options are checked and before its
	// first I/O on the image; all it refuses before that is known when the command returns.
	Do func(ctx context.Context, started func()) error
	// Check, instead of Do, tells how far it is, and what it has found.
	Check func(ctx context.Context, started func(), told func(done, all int64)) (*types.ImageCheck, error)
	// Begin, if set, comes before the job starts; its errors are the command's. End follows when
	// the work is over, or has not begun after all.
	Begin func() error
	End   func()
}

// Start starts the job; see jobs.Manager.Start for release. The job stays until it is dismissed; it
// is recorded until its work is over. Whatever Do reports is the job's error, not the command's.
func Start(g *graph.Graph, m *jobs.Manager, j Job) (release func(), err error) {
	mj, err := m.Create(jobs.Spec{ID: j.ID, Type: j.Type, Runner: runner{j, g}, Args: j.Args, ManualDismiss: true})
	if err != nil {
		return nil, err
	}
	if j.Begin != nil {
		if err := j.Begin(); err != nil {
			m.Discard(mj)
			return nil, err
		}
	}
	if err := g.Enter(mj.Record()); err != nil {
		j.end()
		m.Discard(mj)
		return nil, err
	}
	return m.Start(mj), nil
}

type runner struct {
	Job
	g *graph.Graph
}

// Run implements jobs.Runner. The work of Do is one step, done when Do returns, whatever came of
// it.
func (r runner) Run(ctx context.Context, h *jobs.Handle) error {
	if r.Check != nil {
		found, err := r.Check(ctx, h.Yield, h.SetProgress)
		h.SetCheck(found)
		return err
	}
	h.SetRemaining(1)
	defer h.Done(1)
	return r.Do(ctx, h.Yield)
}

// Clean implements jobs.Cleaner.
func (r runner) Clean(h *jobs.Handle) {
	r.end()
	r.g.Leave(h.Job().Record())
}

func (j *Job) end() {
	if j.End != nil {
		j.End()
	}
}
