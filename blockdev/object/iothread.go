package object

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"sync"

	"qblockd/schema/types"
	"qblockd/schema/value"
)

// loopProperties and pollProperties are the properties of an iothread, in QEMU's order, with what
// they are unless told otherwise. Only the bound of workers has an effect.
var (
	loopProperties = []string{"thread-pool-min", "aio-max-batch", "thread-pool-max"}
	pollProperties = []string{"poll-max-ns", "poll-grow", "poll-shrink"}
	defaults       = map[string]int64{"thread-pool-max": 64, "poll-max-ns": 32768}
)

// Iothread is a named, bounded group of workers: it bounds how many requests its users have at work
// at the same time. Requests that need no wait are served without it.
type Iothread struct {
	mu sync.Mutex
	// by name
	properties map[string]int64 // +checklocks:mu
	// what thread-pool-max says, at least 1
	max  int64 // +checklocks:mu
	busy int64 // +checklocks:mu
	// of chan struct{}, closed when a worker was given; first come, first served
	waiting *list.List // +checklocks:mu
}

func newIothread(p *types.IothreadProperties) (*Iothread, error) {
	t := &Iothread{properties: maps.Clone(defaults), waiting: list.New()}
	p = cmp.Or(p, &types.IothreadProperties{})
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, o := range []struct {
		name string
		v    *int64
	}{
		{"aio-max-batch", p.AioMaxBatch}, {"thread-pool-min", p.ThreadPoolMin}, {"thread-pool-max", p.ThreadPoolMax},
		{"poll-max-ns", p.PollMaxNs}, {"poll-grow", p.PollGrow}, {"poll-shrink", p.PollShrink},
	} {
		if o.v == nil {
			continue
		}
		if err := inRange(o.name, *o.v); err != nil {
			return nil, err
		}
		t.properties[o.name] = *o.v
	}
	return t, t.bindLocked()
}

func (t *Iothread) typ() string { return "iothread" }

func (t *Iothread) get(property string) (value.Value, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.properties[property], nil
}

func (t *Iothread) set(property string, v value.Value) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("Invalid parameter type for '%s', expected: integer", property)
	}
	if err := inRange(property, n); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.properties[property]
	t.properties[property] = n
	if err := t.bindLocked(); err != nil {
		t.properties[property] = before
		return err
	}
	t.giveLocked()
	return nil
}

func inRange(property string, n int64) error {
	if n < 0 {
		return fmt.Errorf("%s value must be in range [0, 9223372036854775807]", property)
	}
	return nil
}

// bindLocked makes the properties count, or says what is wrong with them.
// +checklocks:t.mu
func (t *Iothread) bindLocked() error {
	least, most := t.properties["thread-pool-min"], t.properties["thread-pool-max"]
	if most == 0 || least > most || most > math.MaxInt32 {
		return errors.New("bad thread-pool-min/thread-pool-max values")
	}
	t.max = most
	return nil
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
