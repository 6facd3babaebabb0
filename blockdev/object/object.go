// Package object holds the objects that clients make by object-add and see as a tree through the qom- commands.
// So far there is one type: iothread, a named and bounded group of workers.
//
//	/            container
//	/objects     container    what object-add made
//	/chardevs    container    the character devices
package object

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Chardev is a character device as the tree shows it.
type Chardev struct{ Label, Kind string }

// Registry holds all objects. Its methods may be called from any goroutine; none blocks.
type Registry struct {
	chardevs func() []Chardev

	mu     sync.Mutex
	groups []*Group // oldest first
}

// NewRegistry makes an empty registry; chardevs lists the character devices of the tree and may be nil.
func NewRegistry(chardevs func() []Chardev) *Registry {
	if chardevs == nil {
		chardevs = func() []Chardev { return nil }
	}
	return &Registry{chardevs: chardevs}
}

// hintError is an error with a further line for people.
type hintError struct{ text, hint string }

func (e *hintError) Error() string { return e.text }
func (e *hintError) Hint() string  { return e.hint }

var errID = &hintError{"Parameter 'id' expects an identifier",
	"Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."}

// Add makes an object (object-add).
func (r *Registry) Add(o *types.ObjectOptions) error {
	p, _ := o.U.(*types.IothreadProperties)
	g := &Group{id: o.ID, max: defaultMax, waiting: list.New()}
	if p != nil && p.ThreadPoolMax != nil {
		if err := checkMax(*p.ThreadPoolMax); err != nil {
			return err
		}
		g.max = *p.ThreadPoolMax
	}
	if !types.WellFormedID(o.ID) {
		return errID
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.findLocked(o.ID) != nil {
		return fmt.Errorf("attempt to add duplicate property '%s' to object (type 'container')", o.ID)
	}
	r.groups = append(r.groups, g)
	return nil
}

// Del forgets an object (object-del). A group that something still uses goes on working for it.
func (r *Registry) Del(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, g := range r.groups {
		if g.id == id {
			r.groups = slices.Delete(r.groups, i, i+1)
			return nil
		}
	}
	return fmt.Errorf("object '%s' not found", id)
}

// Group finds an iothread object; nil if there is none.
func (r *Registry) Group(id string) *Group {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.findLocked(id)
}

func (r *Registry) findLocked(id string) *Group {
	for _, g := range r.groups {
		if g.id == id {
			return g
		}
	}
	return nil
}

// defaultMax is how many workers a group has unless told otherwise.
const defaultMax = 64

// Group is an iothread: it bounds how many requests its users have at work at the same time.
// Requests that need no wait are served without it.
type Group struct {
	id string

	mu      sync.Mutex
	max     int64      // +checklocks:mu  at least 1
	busy    int64      // +checklocks:mu
	waiting *list.List // +checklocks:mu  of chan struct{}, closed when a worker was given; first come, first served
}

// ID is the object's id.
func (g *Group) ID() string { return g.id }

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
