package jobs

import (
	"context"
	"errors"
	"strings"
	"testing"

	"qblockd/schema/types"
)

// preparing is a runner that has something to do while it is finalized, and does it until it is
// cancelled.
type preparing struct {
	*work
	entered chan struct{}
	prepare func(ctx context.Context, h *Handle) error
}

func (p *preparing) Prepare(ctx context.Context, h *Handle) error {
	p.note("prepare")
	close(p.entered)
	return p.prepare(ctx, h)
}

// A job that is being finalized is ended by a cancel, and its transaction with it; one whose
// preparation is through has come first.
func TestCancelWhileFinalizing(t *testing.T) {
	for name, prepare := range map[string]func(ctx context.Context, h *Handle) error{
		"looks at its context": func(ctx context.Context, _ *Handle) error {
			<-ctx.Done()
			return errors.New("the storage went away meanwhile")
		},
		"passes pause points": func(ctx context.Context, h *Handle) error { <-ctx.Done(); return h.Throttle(1 << 30) },
		"does not mind":       func(ctx context.Context, _ *Handle) error { <-ctx.Done(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRecorder()
			m := NewManager(r, nil)
			defer shutdown(t, m)
			p, other := &preparing{work: &work{}, entered: make(chan struct{}), prepare: prepare}, &work{}
			txn := m.NewTxn()
			add := func(id string, runner Runner) *Job {
				j, err := m.Create(Spec{
					ID: id, Type: types.JobTypeMirror, Runner: runner, Block: true, Speed: 1, ManualFinalize: true, Txn: txn,
				})
				if err != nil {
					t.Fatal(err)
				}
				return j
			}
			a, b := add("a", p), add("b", other)
			m.Start(a)()
			m.Start(b)()
			r.wait("a:PENDING")
			r.wait("b:PENDING")
			finalized := make(chan error)
			go func() { finalized <- a.Finalize() }()
			<-p.entered
			if err := b.Cancel(true); err != nil { // of the other one: they end together
				t.Error(err)
			}
			if err := <-finalized; err != nil {
				t.Error(err)
			}
			r.wait("a:null")
			got := r.wait("b:null")
			if name == "does not mind" {
				if !strings.Contains(got, "a:COMPLETED") || !strings.Contains(got, "b:COMPLETED") {
					t.Errorf("events %q", got)
				}
				return
			}
			if !strings.Contains(got, "a:CANCELLED") || !strings.Contains(got, "b:CANCELLED") {
				t.Errorf("events %q", got)
			}
			if a.Err() == nil || !errors.Is(a.Err(), ErrCancelled) {
				t.Errorf("outcome %v", a.Err())
			}
			if !strings.HasSuffix(p.said(), "abort clean") || !strings.HasSuffix(other.said(), "abort clean") {
				t.Errorf("calls: %s; %s", p.said(), other.said())
			}
		})
	}
}

// A cancel that has come first is not overtaken by what finalizes the job: that would take its
// time, and the cancel would be lost.
func TestFinalizeAfterCancel(t *testing.T) {
	r := newRecorder()
	m := NewManager(r, nil)
	defer shutdown(t, m)
	prepare := func(context.Context, *Handle) error { return nil }
	p := &preparing{work: &work{}, entered: make(chan struct{}), prepare: prepare}
	j, err := m.Create(Spec{
		ID: "a", Type: types.JobTypeMirror, Runner: p, Block: true, ManualFinalize: true, ManualDismiss: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	m.Start(j)()
	r.wait("a:PENDING")
	m.mu.Lock()
	j.txn.giveUpLocked() // of a cancel that waits for the turn
	m.mu.Unlock()
	if err := j.Finalize(); err != nil {
		t.Error(err)
	}
	select {
	case <-p.entered:
		t.Error("it was prepared")
	default:
	}
	if err := j.Err(); !errors.Is(err, ErrCancelled) {
		t.Errorf("outcome: %v", err)
	}
}
