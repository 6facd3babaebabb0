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

// Iothread is a named, bounded group of workers: it bounds how many requests its users have at work
// at the same time. Requests that need no wait are served without it.
type Iothread struct {
	mu sync.Mutex
	// at least 1
	max  int64 // +checklocks:mu
	busy int64 // +checklocks:mu
	// of chan struct{}, closed when a worker was given; first come, first served
	waiting *list.List // +checklocks:mu
}

func newIothread(p *types.IothreadProperties) (*Iothread, error) {
	t := &Iothread{max: defaultMax, waiting: list.New()}
	if p != nil && p.ThreadPoolMax != nil {
		if err := checkMax(*p.ThreadPoolMax); err != nil {
			return nil, err
		}
		t.max = *p.ThreadPoolMax
	}
	return t, nil
}

func (t *Iothread) typ() string { return "iothread" }

const threadPoolMax = "thread-pool-max"

func (t *Iothread) get(string) (value.Value, error) { return t.Max(), nil }

func (t *Iothread) set(property string, v value.Value) error {
	if property == threadPoolMax {
		return t.setMax(v)
	}
	return errReadOnly
}

// retire: a group that something still uses goes on working for it.
func (t *Iothread) retire() bool { return true }

// Enter waits for a free worker, no longer than ctx. It is called holding no gate pass and no lock.
func (t *Iothread) Enter(ctx context.Context) error {
	t.mu.Lock()
	if t.busy < t.max {
		t.busy++
		t.mu.Unlock()
		return nil
	}
	given := make(chan struct{})
	place := t.waiting.PushBack(given)
	t.mu.Unlock()
	select {
	case <-given:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-given: // just now
		t.busy--
		t.giveLocked()
	default:
		t.waiting.Remove(place)
	}
	return ctx.Err()
}

// Leave gives the worker back.
func (t *Iothread) Leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.busy--
	t.giveLocked()
}

// giveLocked gives free workers to those who wait.
// +checklocks:t.mu
func (t *Iothread) giveLocked() {
	for t.busy < t.max && t.waiting.Len() > 0 {
		first := t.waiting.Front()
		t.busy++
		close(t.waiting.Remove(first).(chan struct{}))
	}
}

// Max is the bound.
func (t *Iothread) Max() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.max
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

func (t *Iothread) setMax(v value.Value) error {
	n, ok := v.(int64)
	if !ok {
		return errors.New("Invalid parameter type for 'thread-pool-max', expected: integer")
	}
	if err := checkMax(n); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.max = n
	t.giveLocked()
	return nil
}
