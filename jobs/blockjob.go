package jobs

import (
	"errors"
	"syscall"

	"qblockd/schema/types"
)

// blockState is what block jobs have besides; guarded by Manager.mu.
type blockState struct {
	speed    int64 // bytes per second, 0: no limit
	limit    limiter
	ioStatus types.BlockDeviceIoStatus
	kick     chan struct{} // closed to end a sleep early; nil: nobody sleeps
}

// kickLocked ends a sleep of the job.
func (j *Job) kickLocked() {
	if j.block != nil && j.block.kick != nil {
		close(j.block.kick)
		j.block.kick = nil
	}
	j.wake.Broadcast()
}

// Kick ends a sleep of the job's runner early.
func (j *Job) Kick() {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	j.kickLocked()
}

func decide(policy types.BlockdevOnError, err error) ErrorAction {
	nospace := errors.Is(err, syscall.ENOSPC)
	switch policy {
	case types.BlockdevOnErrorEnospc, types.BlockdevOnErrorAuto:
		if nospace {
			return types.BlockErrorActionStop
		}
		return types.BlockErrorActionReport
	case types.BlockdevOnErrorStop:
		return types.BlockErrorActionStop
	case types.BlockdevOnErrorIgnore:
		return types.BlockErrorActionIgnore
	}
	return types.BlockErrorActionReport
}

func (j *Job) setIOStatusLocked(err error) {
	if j.block.ioStatus != types.BlockDeviceIoStatusOk {
		return
	}
	j.block.ioStatus = types.BlockDeviceIoStatusFailed
	if errors.Is(err, syscall.ENOSPC) {
		j.block.ioStatus = types.BlockDeviceIoStatusNospace
	}
}

func (j *Job) resetIOStatusLocked() {
	if j.block != nil {
		j.block.ioStatus = types.BlockDeviceIoStatusOk
	}
}

// IsBlockJob tells whether the job answers to the block-job- verbs.
func (j *Job) IsBlockJob() bool { return j.block != nil }
