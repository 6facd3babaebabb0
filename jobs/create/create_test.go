package create

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// log keeps the states that jobs come to.
type log struct {
	mu     sync.Mutex
	states []string
	fails  error
}

func (l *log) Emit(e events.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if change, ok := e.(types.JobStatusChangeEvent); ok {
		l.states = append(l.states, string(change.Status))
	} else {
		l.states = append(l.states, e.EventName())
	}
}

// newGraph is an empty graph, and what is recorded of it.
func newGraph(t *testing.T) (*graph.Graph, *log) {
	g, _ := drivertest.NewGraphSink(t)
	l := &log{}
	g.SetRecorder(func(changes []graph.Change) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.fails != nil {
			return l.fails
		}
		for _, c := range changes {
			l.states = append(l.states, fmt.Sprintf("%s: %v", c.Key, c.Value))
		}
		return nil
	})
	return g, l
}

// A job that cannot be recorded is none.
func TestNotRecorded(t *testing.T) {
	l := &log{}
	m := jobs.NewManager(l, nil)
	g, recorded := newGraph(t)
	recorded.fails = errors.New("no room")
	if _, err := Start(g, m, Job{Type: types.JobTypeCreate, ID: "j"}); !errors.Is(err, recorded.fails) {
		t.Error(err)
	}
	if len(m.Query()) > 0 || l.String() != "created null" {
		t.Errorf("%v, %s", m.Query(), l)
	}
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.states, " ")
}

func TestCreate(t *testing.T) {
	bad := errors.New("Cluster size must be a power of two between 512 and 2048k")
	for name, c := range map[string]struct {
		f             func(ctx context.Context, started func()) error
		before, after string // what has happened when the command is answered, and in the end
		err           error
	}{
		"success": {
			f:      func(_ context.Context, started func()) error { started(); return nil },
			before: "created running", after: "created running waiting pending concluded",
		},
		"refused options": {
			f:      func(context.Context, func()) error { return bad },
			before: "created running aborting concluded", after: "created running aborting concluded", err: bad,
		},
		"failing write": {
			f:      func(_ context.Context, started func()) error { started(); return bad },
			before: "created running", after: "created running aborting concluded", err: bad,
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := &log{}
			m := jobs.NewManager(l, nil)
			g, recorded := newGraph(t)
			args := &types.BlockdevCreateArgs{JobID: "j"}
			release, err := Start(g, m, Job{Type: types.JobTypeCreate, ID: "j", Args: args, Do: c.f})
			if err != nil {
				t.Fatal(err)
			}
			if got := l.String(); got != c.before {
				t.Errorf("before the answer: %q, want %q", got, c.before)
			}
			j := m.Get("j")
			release()
			<-j.Finished()
			if want := fmt.Sprint("job j: ", jobs.State{Args: args}, " job j: <nil>"); recorded.String() != want {
				t.Errorf("recorded %q, want %q", recorded, want)
			}
			if got := l.String(); got != c.after {
				t.Errorf("in the end: %q, want %q", got, c.after)
			}
			q := m.Query()
			if len(q) != 1 || q[0].CurrentProgress != 1 || q[0].TotalProgress != 1 || !errors.Is(j.Err(), c.err) {
				t.Errorf("query: %+v, outcome %v", q, j.Err())
			}
			if m.QueryBlock() == nil || len(m.QueryBlock()) != 0 {
				t.Error("a create job is no block job")
			}
			if err := j.Dismiss(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	l := &log{}
	m := jobs.NewManager(l, nil)
	g, recorded := newGraph(t)
	args := &types.XBlockdevAmendArgs{JobID: "j"}
	do := func(ctx context.Context, started func()) error {
		started()
		<-ctx.Done()
		return ctx.Err()
	}
	release, err := Start(g, m, Job{Type: types.JobTypeAmend, ID: "j", Args: args, Do: do})
	if err != nil {
		t.Fatal(err)
	}
	release()
	j := m.Get("j")
	if err := errors.Join(j.Pause(), j.Resume()); err != nil {
		t.Error(err)
	}
	at := func(s jobs.State) string { return fmt.Sprint("job j: ", s) }
	want := at(jobs.State{Args: args}) + " " + at(jobs.State{Args: args, Paused: true}) + " " + at(jobs.State{Args: args})
	if recorded.String() != want {
		t.Errorf("recorded %q, want %q", recorded, want)
	}
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	<-j.Finished()
	if !errors.Is(j.Err(), jobs.ErrCancelled) {
		t.Errorf("outcome: %v", j.Err())
	}
}

// What a job needs is taken before it starts, and given back when it has ended; when that is
// refused there is no job.
func TestBegin(t *testing.T) {
	l := &log{}
	m := jobs.NewManager(l, nil)
	g, _ := newGraph(t)
	ended := 0
	j := Job{
		Type: types.JobTypeAmend, ID: "j", Args: &types.XBlockdevAmendArgs{JobID: "j"},
		Do:    func(context.Context, func()) error { return nil },
		Begin: func() error { return errors.New("Block node is read-only") },
		End:   func() { ended++ },
	}
	if _, err := Start(g, m, j); err == nil || err.Error() != "Block node is read-only" {
		t.Errorf("%v", err)
	}
	if m.Get("j") != nil || ended != 0 || l.String() != "created null" {
		t.Errorf("a job that was refused: %v, %d times ended, %s", m.Get("j"), ended, l)
	}
	j.Begin = func() error { return nil }
	release, err := Start(g, m, j)
	if err != nil {
		t.Fatal(err)
	}
	release()
	<-m.Get("j").Finished()
	if ended != 1 {
		t.Errorf("ended %d times", ended)
	}
}
