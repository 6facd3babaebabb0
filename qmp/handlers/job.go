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

// Job executes the job- commands, which take any job.
type Job struct{ Jobs *jobs.Manager }

var _ types.JobHandler = Job{}

func (h Job) find(id string) (*jobs.Job, error) {
	if j := h.Jobs.Get(id); j != nil {
		return j, nil
	}
	return nil, fmt.Errorf("Job not found")
}

// QueryJobs implements types.JobHandler.
func (h Job) QueryJobs(context.Context) ([]*types.JobInfo, error) { return h.Jobs.Query(), nil }

// JobPause implements types.JobHandler.
func (h Job) JobPause(_ context.Context, a *types.JobPauseArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return j.Pause()
}

// JobResume implements types.JobHandler.
func (h Job) JobResume(ctx context.Context, a *types.JobResumeArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return apply(ctx, j, machine.Resume, j.Resume)
}

// JobCancel implements types.JobHandler.
func (h Job) JobCancel(ctx context.Context, a *types.JobCancelArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return apply(ctx, j, machine.Cancel, func() error { return j.Cancel(true) })
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

// JobComplete implements types.JobHandler.
func (h Job) JobComplete(ctx context.Context, a *types.JobCompleteArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return apply(ctx, j, machine.Complete, func() error { return j.Complete(ctx) })
}

// JobFinalize implements types.JobHandler.
func (h Job) JobFinalize(_ context.Context, a *types.JobFinalizeArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return j.Finalize()
}

// JobDismiss implements types.JobHandler.
func (h Job) JobDismiss(_ context.Context, a *types.JobDismissArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return j.Dismiss()
}

// BlockJob executes the block-job- commands, which take only jobs that work on nodes, and those
// that start one.
type BlockJob struct {
	Graph *graph.Graph
	Jobs  *jobs.Manager
	Nodes *blockdev.Manager
}

var _ types.BlockJobHandler = BlockJob{}

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
	j, err := h.find(a.Device)
	if err != nil {
		return err
	}
	return j.SetSpeed(a.Speed)
}

// BlockJobCancel implements types.BlockJobHandler.
func (h BlockJob) BlockJobCancel(ctx context.Context, a *types.BlockJobCancelArgs) error {
	j, err := h.find(a.Device)
	if err != nil {
		return err
	}
	force := a.Force != nil && *a.Force
	if j.UserPaused() && !force {
		return fmt.Errorf("The block job for device '%s' is currently paused", a.Device)
	}
	return apply(ctx, j, machine.Cancel, func() error { return j.Cancel(force) })
}

// BlockJobPause implements types.BlockJobHandler.
func (h BlockJob) BlockJobPause(_ context.Context, a *types.BlockJobPauseArgs) error {
	j, err := h.find(a.Device)
	if err != nil {
		return err
	}
	return j.Pause()
}

// BlockJobResume implements types.BlockJobHandler.
func (h BlockJob) BlockJobResume(ctx context.Context, a *types.BlockJobResumeArgs) error {
	j, err := h.find(a.Device)
	if err != nil {
		return err
	}
	return apply(ctx, j, machine.Resume, j.Resume)
}

// BlockJobComplete implements types.BlockJobHandler.
func (h BlockJob) BlockJobComplete(ctx context.Context, a *types.BlockJobCompleteArgs) error {
	j, err := h.find(a.Device)
	if err != nil {
		return err
	}
	return apply(ctx, j, machine.Complete, func() error { return j.Complete(ctx) })
}

// BlockJobFinalize implements types.BlockJobHandler.
func (h BlockJob) BlockJobFinalize(_ context.Context, a *types.BlockJobFinalizeArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return j.Finalize()
}

// BlockJobDismiss implements types.BlockJobHandler.
func (h BlockJob) BlockJobDismiss(_ context.Context, a *types.BlockJobDismissArgs) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	return j.Dismiss()
}
