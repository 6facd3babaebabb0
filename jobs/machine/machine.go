// Package machine is the life of a job, pure: a table of states and transitions, a table of
// states and verbs, and a step function. No lock, no clock, no I/O.
//
//	        +--------------------------------------------------------------+
//	        |                                                              v
//	created --> running <--> paused                                       null
//	   |         |   \                                                     ^
//	   |         |    `--> ready <--> standby                              |
//	   |         v          |                                              |
//	   |      waiting <-----'                                              |
//	   |         |                                                         |
//	   |         v                                                         |
//	   |      pending ------------------------------> concluded -----------+
//	   |         |                                        ^
//	   `--> aborting (from every state that runs or waits) '
package machine

import "fmt"

// Status is the state of a job (QAPI JobStatus).
type Status uint8

const (
	Undefined Status = iota
	Created
	Running
	Paused
	Ready
	Standby
	Waiting
	Pending
	Aborting
	Concluded
	Null
	statuses
)

var statusNames = [statuses]string{"undefined", "created", "running", "paused", "ready", "standby",
	"waiting", "pending", "aborting", "concluded", "null"}

// String is the QAPI name.
func (s Status) String() string { return statusNames[s] }

// Verb is what a client may ask of a job (QAPI JobVerb).
type Verb uint8

const (
	Cancel Verb = iota
	Pause
	Resume
	SetSpeed
	Complete
	Finalize
	Dismiss
	Alter
	verbs
)

var verbNames = [verbs]string{"cancel", "pause", "resume", "set-speed", "complete", "finalize", "dismiss", "change"}

// String is the QAPI name.
func (v Verb) String() string { return verbNames[v] }

func set(states ...Status) (bits uint16) {
	for _, s := range states {
		bits |= 1 << s
	}
	return bits
}

// transitions: row from, bits to.
var transitions = [statuses]uint16{
	Undefined: set(Created),
	Created:   set(Running, Aborting, Null),
	Running:   set(Paused, Ready, Waiting, Aborting),
	Paused:    set(Running),
	Ready:     set(Standby, Waiting, Aborting),
	Standby:   set(Ready),
	Waiting:   set(Pending, Aborting),
	Pending:   set(Aborting, Concluded),
	Aborting:  set(Aborting, Concluded),
	Concluded: set(Null),
	Null:      0,
}

var allowed = [verbs]uint16{
	Cancel:   set(Created, Running, Paused, Ready, Standby, Waiting, Pending),
	Pause:    set(Created, Running, Paused, Ready, Standby),
	Resume:   set(Created, Running, Paused, Ready, Standby),
	SetSpeed: set(Created, Running, Paused, Ready, Standby),
	Complete: set(Ready, Standby),
	Finalize: set(Pending),
	Dismiss:  set(Concluded),
	Alter:    set(Running, Paused, Ready, Standby),
}

// Legal tells whether a job may go from one state to another.
func Legal(from, to Status) bool { return transitions[from]&(1<<to) != 0 }

// Allowed tells whether a job in state s takes verb v.
func Allowed(v Verb, s Status) bool { return allowed[v]&(1<<s) != 0 }

// Completed: the job's work is over, whatever became of it.
func (s Status) Completed() bool { return s >= Waiting }

// IsIdle: the job stands at a pause point.
func (s Status) IsIdle() bool { return s == Paused || s == Standby }

// IsReady: the job waits for the verb complete.
func (s Status) IsReady() bool { return s == Ready || s == Standby }

// State is all that decides what a job may do next.
type State struct {
	Status Status
	// PauseCount counts reasons to pause: the user's (at most one) and internal ones (drains).
	PauseCount int
	// UserPaused: one of PauseCount is the user's, or that of an error policy's stop.
	UserPaused bool
	// Cancelled: the job was asked to end early; Forced: it ends as a failure. Forced implies
	// Cancelled.
	Cancelled, Forced bool
	// Started: the job has begun to run. Ended: its work has returned.
	Started, Ended bool
	// Failed: the outcome is an error.
	Failed bool
	// AutoFinalize, AutoDismiss: the client need not send these verbs.
	AutoFinalize, AutoDismiss bool
}

// ShouldPause: the job must stop at its next pause point.
func (s State) ShouldPause() bool { return s.PauseCount > 0 && !s.Forced }

// Input is something that happens to a job.
type Input uint8

const (
	Create      Input = iota
	Start             // begins to run
	PauseBegin        // a reason to pause appears
	PauseEnd          // and goes
	UserPause         // the user's or an error policy's
	UserResume        //
	EnterPause        // the job reached a pause point and stops there
	LeavePause        // and goes on
	BecomeReady       //
	CancelSoft        //
	CancelForce       //
	WorkEnded         // the job's work returned without error
	WorkFailed        // or with one (also: preparing to finalize failed)
	AllWaiting        // every job of the transaction is waiting
	Finish            // last step: committed or aborted
	Drop              // dismissed, or never really begun
)

// Effect is what the owner of a State has to do after a step, in order.
type Effect uint8

const (
	// EmitStatus: JOB_STATUS_CHANGE with the state given by the Change at the same place.
	EmitStatus Effect = iota
	EmitReady
	EmitPending
	EmitCompleted
	EmitCancelled
	// Wake: the job's goroutine should look at its state.
	Wake
	// Forget: remove the job.
	Forget
)

// Change is one effect; Status is set for EmitStatus.
type Change struct {
	Effect Effect
	Status Status
}

type stepper struct {
	s   State
	out []Change
}

func (p *stepper) to(st Status) {
	if !Legal(p.s.Status, st) {
		panic(fmt.Sprintf("job: illegal transition %v to %v", p.s.Status, st))
	}
	p.s.Status = st
	p.out = append(p.out, Change{EmitStatus, st})
}

func (p *stepper) emit(e Effect) { p.out = append(p.out, Change{Effect: e}) }

// Step takes one input. An input that the state does not allow is a bug of the caller and panics.
func Step(s State, in Input) (State, []Change) {
	p := stepper{s: s}
	switch in {
	case Create:
		p.to(Created)
	case Start:
		p.s.Started = true
		p.to(Running)
	case PauseBegin, PauseEnd, UserPause, UserResume:
		p.pause(in)
	case EnterPause:
		if p.s.Status == Ready {
			p.to(Standby)
		} else {
			p.to(Paused)
		}
	case LeavePause:
		if p.s.Status == Standby {
			p.to(Ready)
		} else {
			p.to(Running)
		}
	case BecomeReady:
		p.to(Ready)
		p.emit(EmitReady)
	case CancelSoft, CancelForce:
		p.cancel(in == CancelForce)
	case WorkEnded, WorkFailed:
		p.ended(in == WorkFailed)
	case AllWaiting:
		p.to(Pending)
		if !p.s.AutoFinalize {
			p.emit(EmitPending)
		}
	case Finish:
		p.finish()
	case Drop:
		p.to(Null)
		p.emit(Forget)
	default:
		panic(fmt.Sprintf("job: unknown input %d", in))
	}
	return p.s, p.out
}

func (p *stepper) pause(in Input) {
	if in == PauseBegin || in == UserPause {
		p.s.PauseCount++
	} else {
		p.s.PauseCount--
	}
	p.s.UserPaused = in == UserPause || p.s.UserPaused && in != UserResume
	if p.s.PauseCount < 0 {
		panic("job: resumed more often than paused")
	}
	p.emit(Wake)
}

// cancel asks the job to end. A soft request to a job whose work is over means nothing.
func (p *stepper) cancel(force bool) {
	if p.s.UserPaused {
		p.pause(UserResume)
	}
	if force || !p.s.Ended {
		p.s.Cancelled = true
		p.s.Forced = p.s.Forced || force
	}
	p.emit(Wake)
}

// ended takes the outcome of the work; a forced cancel makes every outcome a failure. It is also
// how a job that waits or is pending learns that it fails after all.
func (p *stepper) ended(failed bool) {
	p.s.Ended = true
	p.s.Failed = p.s.Failed || failed || p.s.Forced
	switch {
	case p.s.Failed:
		if p.s.Status != Aborting {
			p.to(Aborting)
		}
	case p.s.Status == Running || p.s.Status == Ready:
		p.to(Waiting)
	}
}

func (p *stepper) finish() {
	if p.s.Started {
		if p.s.Forced {
			p.emit(EmitCancelled)
		} else {
			p.emit(EmitCompleted)
		}
	}
	p.to(Concluded)
	if p.s.AutoDismiss || !p.s.Started {
		p.to(Null)
		p.emit(Forget)
	}
}
