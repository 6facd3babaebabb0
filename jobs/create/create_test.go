package create

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"qblockd/events"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// log keeps the states that jobs come to.
type log struct {
	mu     sync.Mutex
	states []string
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

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.states, " ")
}

func TestCreate(t *testing.T) {
	bad := errors.New("Cluster size must be a power of two between 512 and 2048k")
	for name, c := range map[string]struct {
		f             Func
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
			release, err := Start(m, types.JobTypeCreate, "j", c.f)
			if err != nil {
				t.Fatal(err)
			}
			if got := l.String(); got != c.before {
				t.Errorf("before the answer: %q, want %q", got, c.before)
			}
			j := m.Get("j")
			release()
			<-j.Finished()
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
	release, err := Start(m, types.JobTypeCreate, "j", func(ctx context.Context, started func()) error {
		started()
		<-ctx.Done()
		return ctx.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	release()
	j := m.Get("j")
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	<-j.Finished()
	if !errors.Is(j.Err(), jobs.ErrCancelled) {
		t.Errorf("outcome: %v", j.Err())
	}
}
