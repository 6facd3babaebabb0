package object

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"qblockd/schema/types"
	"qblockd/schema/value"
)

// defaultMax is how many workers a group has unless told otherwise.
const defaultMax = 64

// Group is an iothread: it bounds how many requests its users have at work at the same time.
// Requests that need no wait are served without it.
type Group struct {
	mu sync.Mutex
	// at least 1
	max  int64 // +checklocks:mu
	busy int64 // +checklocks:mu
	// of chan struct{}, closed when a worker was given; first come, first served
	waiting *list.List // +checklocks:mu
}

func newGroup(p *types.IothreadProperties) (*Group, error) {
	g := &Group{max: defaultMax, waiting: list.New()}
	if p != nil && p.ThreadPoolMax != nil {
		if err := checkMax(*p.ThreadPoolMax); err != nil {
			return nil, err
		}
		g.max = *p.ThreadPoolMax
	}
	return g, nil
}

func (g *Group) typ() string { return "iothread" }

const threadPoolMax = "thread-pool-max"

func (g *Group) get(string) (value.Value, error) { return g.Max(), nil }

func (g *Group) set(property string, v value.Value) error {
	if property == threadPoolMax {
		return g.setMax(v)
	}
	return errReadOnly
}

// retire: a group that something still uses goes on working for it.
func (g *Group) retire() bool { return true }

// Enter waits for a free worker, no longer than ctx. It is called holding no gate pass and no lock.
func (g *Group) Enter(ctx context.Context) error {
	g.mu.Lock()
	if g.busy < g.max {
		g.busy++
		g.mu.Unlock()
		return nil
	}
	given := make(chan struct{})
	place := g.waiting.PushBack(given)
	g.mu.Unlock()
	select {
	case <-given:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-given: // just now
		g.busy--
		g.giveLocked()
	default:
		g.waiting.Remove(place)
	}
	return ctx.Err()
}

// Leave gives the worker back.
func (g *Group) Leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy--
	g.giveLocked()
}

// giveLocked gives free workers to those who wait.
// +checklocks:g.mu
func (g *Group) giveLocked() {
	for g.busy < g.max && g.waiting.Len() > 0 {
		first := g.waiting.Front()
		g.busy++
		close(g.waiting.Remove(first).(chan struct{}))
	}
}

// Max is the bound.
func (g *Group) Max() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.max
}

func checkMax(n int64) error {
	if n < 0 {
		return errors.New("thread-pool-max value must be in range [0, 9223372036854775807]")
	}
	if n == 0 {
		return errors.New("bad thread-pool-min/thread-pool-max values")
	}
	return nil
}

func (g *Group) setMax(v value.Value) error {
	n, ok := v.(int64)
	if !ok {
		return errors.New("Invalid parameter type for 'thread-pool-max', expected: integer")
	}
	if err := checkMax(n); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.max = n
	g.giveLocked()
	return nil
}
