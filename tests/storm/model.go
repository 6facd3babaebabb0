package storm

import (
	"fmt"
	"sync"
	"time"
)

// step is a command, as far as it is about one object.
type step struct {
	what string // see object.apply
	n    int64  // of merge: bits; of size: bytes
	ok   bool   // it was answered; else it may have been done or not
}

// object is the state of one: of a node, an export, a snapshot, a bitmap or a disk's size.
type object struct {
	there bool
	n     int64 // a bitmap's bits, a disk's size
}

// apply tells what a step makes of an object, and whether it can be that it succeeded.
func (o object) apply(s step) (object, bool) {
	switch s.what {
	case "make":
		return object{there: true}, !o.there
	case "drop":
		return object{}, o.there
	case "clear":
		o.n = 0
		return o, o.there
	case "merge":
		o.n |= s.n
		return o, o.there
	case "size":
		o.n = s.n
		return o, true
	case "is there":
		return o, o.there
	case "is not there":
		return o, !o.there
	case "is":
		return o, o.there && o.n == s.n
	}
	panic("storm: step " + s.what)
}

// history is what clients were told.
type history struct {
	start time.Time
	mu    sync.Mutex
	// by object
	ops map[string][]op // +checklocks:mu
}

func newHistory() *history {
	return &history{start: time.Now(), ops: map[string][]op{}}
}

func (h *history) now() int64 { return int64(time.Since(h.start)) }

// add takes down a step that was sent at from and, if it is ok, answered at to.
func (h *history) add(client int, name string, s step, from, to int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops[name] = append(h.ops[name], op{client: client, step: s, from: from, to: to})
}

// check tells what cannot have come about in any order.
func (h *history) check(first map[string]object) (errs []error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, ops := range h.ops {
		if err := decide(first[name], ops); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errs
}
