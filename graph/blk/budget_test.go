package blk

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

// TestBudget: takers are held to the limit, but one that wants more than that gets it when it is
// alone.
func TestBudget(t *testing.T) {
	b := Budget{Limit: 100}
	r := &Req{Ctx: context.Background()}
	var used, most atomic.Int64
	var all sync.WaitGroup
	for i := range 50 {
		n := int64(10 + i)
		if i%10 == 0 {
			n = 500
		}
		all.Go(func() {
			for range 100 {
				if err := b.Take(r, n); err != nil {
					t.Error(err)
					return
				}
				if v := used.Add(n); n < 500 {
					most.Store(max(most.Load(), v))
				} else if v != n {
					t.Errorf("%d bytes are taken beside %d", v-n, n)
				}
				used.Add(-n)
				b.Give(n)
			}
		})
	}
	all.Wait()
	if most.Load() > 100 || b.used != 0 || len(b.queue) != 0 {
		t.Errorf("%d bytes were taken of 100, %d and %d are left", most.Load(), b.used, len(b.queue))
	}
}

func TestBudgetDoesNotWait(t *testing.T) {
	b := Budget{Limit: 10}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	if err := b.Take(&Req{NoWait: true}, 10); err != nil {
		t.Fatal(err)
	}
	if err := b.Take(&Req{NoWait: true}, 1); !errors.Is(err, ErrWouldBlock) {
		t.Error(err)
	}
	waits := make(chan error)
	go func() { waits <- b.Take(&Req{Ctx: ctx}, 5) }()
	cancel(gone)
	if err := <-waits; !errors.Is(err, gone) {
		t.Error(err)
	}
	b.Give(10)
	if err := b.Take(&Req{NoWait: true}, 10); err != nil || len(b.queue) != 0 {
		t.Error(err)
	}
	b.Give(10)
	if n := testing.AllocsPerRun(100, func() {
		_ = b.Take(&Req{}, 10)
		b.Give(10)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
