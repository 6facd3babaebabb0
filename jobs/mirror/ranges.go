package mirror

import (
	"context"
	"slices"
	"sync"

	"qblockd/graph/blk"
)

// ranges keeps apart what must not overlap in time: the copies of the background and guests' writes
// that go to both sides. Who comes waits for those that came before and overlap, so nobody waits in
// a circle.
type ranges struct {
	mu   sync.Mutex
	all  []*span // oldest first; guarded by mu
	pool sync.Pool
}

// span is a range that somebody has taken.
type span struct {
	off, n int64
	over   chan struct{} // made by the first who waits
}

// take takes [off, off+n) and waits until nobody else has any of it. Error: the cause of the end of
// ctx; nothing is taken then.
func (t *ranges) take(ctx context.Context, off, n int64) (*span, error) {
	s, _ := t.pool.Get().(*span)
	if s == nil {
		s = &span{}
	}
	s.off, s.n = off, n
	t.mu.Lock()
	t.all = append(t.all, s)
	for {
		c := t.all[slices.IndexFunc(t.all, func(c *span) bool { return c == s || blk.Overlap(c.off, c.n, off, n) })]
		if c == s {
			t.mu.Unlock()
			return s, nil
		}
		if c.over == nil {
			c.over = make(chan struct{})
		}
		over := c.over
		t.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			t.give(s)
			return nil, context.Cause(ctx)
		}
		t.mu.Lock()
	}
}

// give gives a range back.
func (t *ranges) give(s *span) {
	t.mu.Lock()
	i := slices.Index(t.all, s)
	t.all = slices.Delete(t.all, i, i+1)
	over := s.over
	s.over = nil
	t.mu.Unlock()
	if over != nil {
		close(over)
	}
	t.pool.Put(s)
}
