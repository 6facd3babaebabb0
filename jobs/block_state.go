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
	lastPass bool // it was told to come to its end: the speed does not count any more
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

// lastPassLocked lets the job come to its end as fast as it can.
func (j *Job) lastPassLocked() {
	if j.block != nil {
		j.block.lastPass = true
	}
	j.kickLocked()
}

// Kick ends a sleep of the job's runner early.
func (j *Job) Kick() {
	j.m.mu.Lock()
	defer j.m.mu.Unlock()
	j.kickLocked()
}

func decide(policy types.BlockdevOnError, err error) ErrorAction {
	onNoSpace := policy == types.BlockdevOnErrorEnospc || policy == types.BlockdevOnErrorAuto
	switch {
	case policy == types.BlockdevOnErrorStop, onNoSpace && errors.Is(err, syscall.ENOSPC):
		return types.BlockErrorActionStop
	case policy == types.BlockdevOnErrorIgnore:
		return types.BlockErrorActionIgnore
	}
	return types.BlockErrorActionReport
}

func (b *blockState) setIOStatus(err error) {
	if b.ioStatus != types.BlockDeviceIoStatusOk {
		return
	}
	b.ioStatus = types.BlockDeviceIoStatusFailed
	if errors.Is(err, syscall.ENOSPC) {
		b.ioStatus = types.BlockDeviceIoStatusNospace
	}
}

func (b *blockState) resetIOStatus() {
	if b != nil {
		b.ioStatus = types.BlockDeviceIoStatusOk
	}
}

// IsBlockJob tells whether the job answers to the block-job- verbs.
func (j *Job) IsBlockJob() bool { return j.block != nil }
