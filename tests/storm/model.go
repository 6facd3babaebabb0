package storm

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
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
	ops   map[string][]porcupine.Operation // +checklocks:mu  by object
}

func newHistory() *history {
	return &history{start: time.Now(), ops: map[string][]porcupine.Operation{}}
}

func (h *history) now() int64 { return int64(time.Since(h.start)) }

// forever is when a command ends that nobody knows of.
const forever = math.MaxInt64

func (h *history) add(client int, name string, s step, from, to int64) {
	if !s.ok {
		to = forever
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops[name] = append(h.ops[name], porcupine.Operation{ClientId: client, Input: s, Call: from, Output: nil, Return: to})
}

// check tells what cannot have come about in any order.
func (h *history) check(first map[string]object) (errs []error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, ops := range h.ops {
		m := porcupine.NondeterministicModel{
			Init: func() []any { return []any{first[name]} },
			Step: func(state, input, _ any) []any {
				o, s := state.(object), input.(step)
				next, can := o.apply(s)
				switch {
				case can && s.ok:
					return []any{next}
				case can:
					return []any{next, o}
				case !s.ok:
					return []any{o}
				}
				return nil
			},
			Equal: func(a, b any) bool { return a == b },
		}
		// One that it cannot decide in time has no fault that is easily seen.
		if r := porcupine.CheckOperationsTimeout(m.ToModel(), ops, time.Minute); r == porcupine.Illegal {
			slices.SortFunc(ops, func(a, b porcupine.Operation) int { return int(min(max(a.Call-b.Call, -1), 1)) })
			text := fmt.Sprintf("%s: no order of these steps (%s):", name, r)
			for _, o := range ops[max(0, len(ops)-60):] {
				text += fmt.Sprintf("\n\t[%.6f %.6f] client %d %+v", float64(o.Call)/1e9, float64(o.Return)/1e9, o.ClientId, o.Input)
			}
			errs = append(errs, fmt.Errorf("%s", text))
		}
	}
	return errs
}
