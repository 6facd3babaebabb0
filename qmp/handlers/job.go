package handlers

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/machine"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// finder finds a job by its id.
type finder func(id string) (*jobs.Job, error)

// do applies a verb to the job called id.
func (find finder) do(id string, verb func(*jobs.Job) error) error {
	j, err := find(id)
	if err != nil {
		return err
	}
	return verb(j)
}

func (find finder) resume(ctx context.Context, id string) error {
	return find.do(id, func(j *jobs.Job) error { return apply(ctx, j, machine.Resume, j.Resume) })
}

func (find finder) complete(ctx context.Context, id string) error {
	return find.do(id, func(j *jobs.Job) error {
		return apply(ctx, j, machine.Complete, func() error { return j.Complete(ctx) })
	})
}

func cancel(ctx context.Context, j *jobs.Job, force bool) error {
	return apply(ctx, j, machine.Cancel, func() error { return j.Cancel(force) })
}

// apply applies v by f. What the job does then comes before the answer or after it, as clients know
// it.
func apply(ctx context.Context, j *jobs.Job, v machine.Verb, f func() error) error {
	answered := j.DeferEnd(v)
	if err := f(); err != nil {
		answered()
		return err
	}
	qmp.AfterReply(ctx, answered)
	return nil
}

// Job executes the job- commands, which take any job.
type Job struct{ Jobs *jobs.Manager }

func (h Job) find(id string) (*jobs.Job, error) {
	if j := h.Jobs.Get(id); j != nil {
		return j, nil
	}
	return nil, errors.New("Job not found")
}

// QueryJobs implements types.JobHandler.
func (h Job) QueryJobs(context.Context) ([]*types.JobInfo, error) { return h.Jobs.Query(), nil }

// JobPause implements types.JobHandler.
func (h Job) JobPause(_ context.Context, a *types.JobPauseArgs) error {
	return finder(h.find).do(a.ID, (*jobs.Job).Pause)
}

// JobResume implements types.JobHandler.
func (h Job) JobResume(ctx context.Context, a *types.JobResumeArgs) error {
	return finder(h.find).resume(ctx, a.ID)
}

// JobCancel implements types.JobHandler.
func (h Job) JobCancel(ctx context.Context, a *types.JobCancelArgs) error {
	return finder(h.find).do(a.ID, func(j *jobs.Job) error { return cancel(ctx, j, true) })
}

// JobComplete implements types.JobHandler.
func (h Job) JobComplete(ctx context.Context, a *types.JobCompleteArgs) error {
	return finder(h.find).complete(ctx, a.ID)
}

// JobFinalize implements types.JobHandler.
func (h Job) JobFinalize(_ context.Context, a *types.JobFinalizeArgs) error {
	return finder(h.find).do(a.ID, (*jobs.Job).Finalize)
}

// JobDismiss implements types.JobHandler.
func (h Job) JobDismiss(_ context.Context, a *types.JobDismissArgs) error {
	return finder(h.find).do(a.ID, (*jobs.Job).Dismiss)
}

// BlockJob executes the block-job- commands, which take only jobs that work on nodes, and those
// that start one.
type BlockJob struct {
	Graph *graph.Graph
	Jobs  *jobs.Manager
	Nodes *blockdev.Manager
}

func (h BlockJob) find(id string) (*jobs.Job, error) {
	if j := h.Jobs.Get(id); j != nil && j.IsBlockJob() {
		return j, nil
	}
	return nil, blk.WithClass(errors.New("Block job '"+id+"' not found"), qmp.DeviceNotActive)
}

// QueryBlockJobs implements types.BlockJobHandler.
func (h BlockJob) QueryBlockJobs(context.Context) ([]*types.BlockJobInfo, error) {
	return h.Jobs.QueryBlock(), nil
}

// BlockJobSetSpeed implements types.BlockJobHandler.
func (h BlockJob) BlockJobSetSpeed(_ context.Context, a *types.BlockJobSetSpeedArgs) error {
	return finder(h.find).do(a.Device, func(j *jobs.Job) error { return j.SetSpeed(a.Speed) })
}

// BlockJobCancel implements types.BlockJobHandler.
func (h BlockJob) BlockJobCancel(ctx context.Context, a *types.BlockJobCancelArgs) error {
	return finder(h.find).do(a.Device, func(j *jobs.Job) error {
		force := types.Or(a.Force, false)
		if j.UserPaused() && !force {
			return fmt.Errorf("The block job for device '%s' is currently paused", a.Device)
		}
		return cancel(ctx, j, force)
	})
}

// BlockJobPause implements types.BlockJobHandler.
func (h BlockJob) BlockJobPause(_ context.Context, a *types.BlockJobPauseArgs) error {
	return finder(h.find).do(a.Device, (*jobs.Job).Pause)
}

// BlockJobResume implements types.BlockJobHandler.
func (h BlockJob) BlockJobResume(ctx context.Context, a *types.BlockJobResumeArgs) error {
	return finder(h.find).resume(ctx, a.Device)
}

// BlockJobComplete implements types.BlockJobHandler.
func (h BlockJob) BlockJobComplete(ctx context.Context, a *types.BlockJobCompleteArgs) error {
	return finder(h.find).complete(ctx, a.Device)
}

// BlockJobFinalize implements types.BlockJobHandler.
func (h BlockJob) BlockJobFinalize(_ context.Context, a *types.BlockJobFinalizeArgs) error {
	return finder(h.find).do(a.ID, (*jobs.Job).Finalize)
}

// BlockJobDismiss implements types.BlockJobHandler.
func (h BlockJob) BlockJobDismiss(_ context.Context, a *types.BlockJobDismissArgs) error {
	return finder(h.find).do(a.ID, (*jobs.Job).Dismiss)
}
