// Package create is the job behind blockdev-create, which makes an image on a protocol node or a
// host file, and behind x-blockdev-amend, which changes one.
package create

import (
	"context"

	"qblockd/jobs"
	"qblockd/schema/types"
)

// Func makes or changes an image. It calls started once its options are checked and before its
// first I/O on the image; all it refuses before that is known when the command returns.
type Func func(ctx context.Context, started func()) error

// Start starts the job, of type create or amend; see jobs.Manager.Start for release. The job stays
// until it is dismissed. Whatever f reports is the job's error, not the command's.
func Start(m *jobs.Manager, typ types.JobType, id string, f Func) (release func(), err error) {
	j, err := m.Create(jobs.Spec{ID: id, Type: typ, Runner: runner(f), ManualDismiss: true})
	if err != nil {
		return nil, err
	}
	return m.Start(j), nil
}

type runner Func

// Run implements jobs.Runner. The work is one step, done when f returns, whatever came of it.
func (f runner) Run(ctx context.Context, h *jobs.Handle) error {
	h.SetRemaining(1)
	defer h.Done(1)
	return f(ctx, h.Yield)
}
