package machine

import (
	"strings"
	"testing"
)

// The two tables as recorded from the reference.
const goldenTransitions = `
undefined  created
created    running aborting null
running    paused ready waiting aborting
paused     running
ready      standby waiting aborting
standby    ready
waiting    pending aborting
pending    aborting concluded
aborting   aborting concluded
concluded  null
null
`

const goldenVerbs = `
cancel     created running paused ready standby waiting pending
pause      created running paused ready standby
resume     created running paused ready standby
set-speed  created running paused ready standby
complete   ready standby
finalize   pending
dismiss    concluded
change     running paused ready standby
`

func rows(golden string) map[string]map[string]bool {
	out := map[string]map[string]bool{}
	for _, line := range strings.Split(strings.TrimSpace(golden), "\n") {
		f := strings.Fields(line)
		out[f[0]] = map[string]bool{}
		for _, s := range f[1:] {
			out[f[0]][s] = true
		}
	}
	return out
}

func TestTransitions(t *testing.T) {
	want := rows(goldenTransitions)
	for from := Undefined; from < statuses; from++ {
		for to := Undefined; to < statuses; to++ {
			if Legal(from, to) != want[from.String()][to.String()] {
				t.Errorf("%v to %v: %v", from, to, Legal(from, to))
			}
		}
	}
}

func TestVerbs(t *testing.T) {
	want := rows(goldenVerbs)
	for v := Cancel; v < verbs; v++ {
		for s := Undefined; s < statuses; s++ {
			if Allowed(v, s) != want[v.String()][s.String()] {
				t.Errorf("%v in %v: %v", v, s, Allowed(v, s))
			}
		}
	}
}

func run(s State, inputs ...Input) (State, string) {
	var log []string
	for _, in := range inputs {
		var cs []Change
		s, cs = Step(s, in)
		for _, c := range cs {
			switch c.Effect {
			case EmitStatus:
				log = append(log, c.Status.String())
			case EmitReady:
				log = append(log, "READY")
			case EmitPending:
				log = append(log, "PENDING")
			case EmitCompleted:
				log = append(log, "COMPLETED")
			case EmitCancelled:
				log = append(log, "CANCELLED")
			case Forget:
				log = append(log, "forget")
			}
		}
	}
	return s, strings.Join(log, " ")
}

func TestLives(t *testing.T) {
	auto := State{AutoFinalize: true, AutoDismiss: true}
	for _, c := range []struct {
		name   string
		s      State
		inputs []Input
		want   string
	}{
		{"success", auto, []Input{Create, Start, WorkEnded, AllWaiting, Finish},
			"created running waiting pending COMPLETED concluded null forget"},
		{"manual", State{}, []Input{Create, Start, WorkEnded, AllWaiting, Finish, Drop},
			"created running waiting pending PENDING COMPLETED concluded null forget"},
		{"failure", auto, []Input{Create, Start, WorkFailed, Finish},
			"created running aborting COMPLETED concluded null forget"},
		{"cancel while paused", auto, []Input{Create, Start, UserPause, EnterPause, CancelForce, LeavePause, WorkEnded, Finish},
			"created running paused running aborting CANCELLED concluded null forget"},
		{"soft cancel when ready", auto, []Input{Create, Start, BecomeReady, CancelSoft, WorkEnded, AllWaiting, Finish},
			"created running ready READY waiting pending COMPLETED concluded null forget"},
		{"cancel pending", State{AutoDismiss: true}, []Input{Create, Start, WorkEnded, AllWaiting, CancelForce, WorkEnded, Finish},
			"created running waiting pending PENDING aborting CANCELLED concluded null forget"},
		{"never started", State{}, []Input{Create, CancelForce, WorkEnded, Finish},
			"created aborting concluded null forget"},
		{"early failure", auto, []Input{Create, Drop}, "created null forget"},
		{"standby", auto, []Input{Create, Start, BecomeReady, PauseBegin, EnterPause, PauseEnd, LeavePause},
			"created running ready READY standby ready"},
		{"prepare fails", auto, []Input{Create, Start, WorkEnded, AllWaiting, WorkFailed, WorkEnded, Finish},
			"created running waiting pending aborting COMPLETED concluded null forget"},
	} {
		if _, got := run(c.s, c.inputs...); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestSoftCancelAfterTheEnd(t *testing.T) {
	s, _ := run(State{}, Create, Start, WorkEnded, AllWaiting, CancelSoft)
	if s.Cancelled || s.Forced {
		t.Errorf("a soft cancel of a finished job must mean nothing: %+v", s)
	}
}

func TestIllegalPanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("dismissing a running job must panic")
		}
	}()
	run(State{}, Create, Start, Drop)
}
