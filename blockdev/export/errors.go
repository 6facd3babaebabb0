package export

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Errors is what an export does about I/O errors of its node, and whether one has stopped it:
//
//	          error, policy stop              Resume
//	running --------------------> stopped ------------> running
//
// While it is stopped requests wait, outside of the graph: nobody else waits for them. Those that
// have failed are carried out again afterwards. All methods may be called from any goroutine and
// take no lock; nil passes all errors on.
type Errors struct {
	read, write *types.BlockdevOnError // nil: errors are passed on and not told
	// tell tells clients of QMP what was done about an error; it does not wait.
	tell func(op types.IoOperationType, action types.BlockErrorAction, err error)
	// stop is nil while it runs.
	stop atomic.Pointer[stop]
	// resumes counts the calls of Resume.
	resumes atomic.Uint64
}

// stop is the time from an error to Resume.
type stop struct {
	status types.BlockDeviceIoStatus
	over   chan struct{} // closed by Resume
}

// NewErrors makes those of an export with these policies; it is nil if there is neither.
func NewErrors(read, write *types.BlockdevOnError,
	tell func(op types.IoOperationType, action types.BlockErrorAction, err error)) *Errors {
	if read == nil && write == nil {
		return nil
	}
	return &Errors{read: read, write: write, tell: tell}
}

// CoversReads tells whether there is a policy for reads.
func (e *Errors) CoversReads() bool { return e != nil && e.read != nil }

// Covers tells whether there is a policy for such an error. Everything but reading is writing.
func (e *Errors) Covers(op types.IoOperationType, err error) bool {
	return e != nil && e.policy(op) != nil && isFault(err)
}

func (e *Errors) policy(op types.IoOperationType) *types.BlockdevOnError {
	if op == types.IoOperationTypeRead {
		return e.read
	}
	return e.write
}

// Stopped is nil while the export runs, else it is closed by Resume.
func (e *Errors) Stopped() <-chan struct{} {
	if e == nil {
		return nil
	}
	if s := e.stop.Load(); s != nil {
		return s.over
	}
	return nil
}

// Resumes is what Decide wants to know of the time before the request: how often the export was
// resumed.
func (e *Errors) Resumes() uint64 {
	if e == nil {
		return 0
	}
	return e.resumes.Load()
}

// Decide says what to do about an error that a request has ended with, which began after so many
// resumes. For stop the request is to be carried out again when Stopped allows it: an error from
// before the last Resume does not stop the export once more. Clients of QMP hear of errors until
// one stops the export; those of others that were under way then add nothing.
func (e *Errors) Decide(op types.IoOperationType, err error, resumes uint64) types.BlockErrorAction {
	if !e.Covers(op, err) {
		return types.BlockErrorActionReport
	}
	action := e.action(op, err)
	first := e.stop.Load() == nil
	if action == types.BlockErrorActionStop {
		s := &stop{status: types.BlockDeviceIoStatusFailed, over: make(chan struct{})}
		if errors.Is(err, syscall.ENOSPC) {
			s.status = types.BlockDeviceIoStatusNospace
		}
		first = e.stop.CompareAndSwap(nil, s)
		if first && e.resumes.Load() != resumes {
			if first = false; e.stop.CompareAndSwap(s, nil) {
				close(s.over)
			}
		}
	}
	if first {
		e.tell(op, action, err)
	}
	return action
}

// action is what the policy says. "auto" is what it is for QEMU's disks.
func (e *Errors) action(op types.IoOperationType, err error) types.BlockErrorAction {
	onNoSpace := false
	switch *e.policy(op) {
	case types.BlockdevOnErrorStop:
		return types.BlockErrorActionStop
	case types.BlockdevOnErrorIgnore:
		return types.BlockErrorActionIgnore
	case types.BlockdevOnErrorEnospc:
		onNoSpace = true
	case types.BlockdevOnErrorAuto:
		onNoSpace = op == types.IoOperationTypeWrite
	}
	if onNoSpace && errors.Is(err, syscall.ENOSPC) {
		return types.BlockErrorActionStop
	}
	return types.BlockErrorActionReport
}

// isFault tells errors of storage from answers: what cannot be done fast, or no more.
func isFault(err error) bool {
	return !errors.Is(err, blk.ErrNotSupported) && !errors.Is(err, syscall.EOPNOTSUPP) &&
		!errors.Is(err, blk.ErrWouldBlock) && !errors.Is(err, blk.ErrClosed) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}

// Resume lets the requests go on; it is false if the export was not stopped.
func (e *Errors) Resume() bool {
	if e == nil {
		return false
	}
	e.resumes.Add(1)
	s := e.stop.Swap(nil)
	if s != nil {
		close(s.over)
	}
	return s != nil
}

// Status is what query-block-exports shows; nil where there is no policy.
func (e *Errors) Status() *types.BlockDeviceIoStatus {
	if e == nil {
		return nil
	}
	status := types.BlockDeviceIoStatusOk
	if s := e.stop.Load(); s != nil {
		status = s.status
	}
	return &status
}
