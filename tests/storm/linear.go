package storm

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// op is a step as a client saw it: sent at from, answered at to.
type op struct {
	client   int
	step     step
	from, to int64 // nanoseconds from the beginning; to is not used where the step was not answered
}

func (o op) String() string {
	if !o.step.ok {
		return fmt.Sprintf("[%.6f ...] client %d may have done: %s %d", float64(o.from)/1e9, o.client, o.step.what, o.step.n)
	}
	return fmt.Sprintf("[%.6f %.6f] client %d: %s %d", float64(o.from)/1e9, float64(o.to)/1e9, o.client, o.step.what, o.step.n)
}

// decide looks for an order of the steps on one object that explains all answers: each answered
// step takes its place between its sending and its answer, each other one some time after its
// sending or never. It returns an error where there is none, and decides every history.
//
// It goes through the history once and keeps all that can be the case: which object there is, which
// of the steps under way were done already, and how many of the steps that nobody answered were. A
// step is done no sooner than it has to be: when it, or one that needs it, is answered. Of two
// cases that differ only in the steps without an answer, the one that has used fewer of each kind
// can go on in every way that the other can; so only it is kept. The number of cases is bounded by
// the states of an object and the clients at work, not by the length of the history.
func decide(first object, ops []op) error {
	s := &search{may: cases{}, slots: map[int]int{}}
	s.may.add(one{place: place{object: first}})
	for _, e := range eventsOf(ops) {
		o := ops[e.op]
		switch {
		case e.answer:
			before := s.may
			if s.answered(o.step, s.slots[e.op]); len(s.may) == 0 {
				return fmt.Errorf("no order of the steps explains %v; it was %s\n%s", o, before, story(ops, o))
			}
			delete(s.slots, e.op)
		case o.step.ok:
			s.begin(e.op, o.step)
		default:
			s.unanswered(o.step)
		}
	}
	return nil
}

// event is a sending or an answer.
type event struct {
	at     int64
	op     int
	answer bool
}

func eventsOf(ops []op) (l []event) {
	for i, o := range ops {
		l = append(l, event{at: o.from, op: i})
		if o.step.ok {
			l = append(l, event{at: o.to, op: i, answer: true})
		}
	}
	slices.SortStableFunc(l, func(a, b event) int {
		if a.at == b.at && a.answer != b.answer { // a sending comes first
			return map[bool]int{true: 1, false: -1}[a.answer]
		}
		return cmp.Compare(a.at, b.at)
	})
	return l
}

// most is of how many kinds the steps without an answer on one object can be.
const most = 16

// place is the object, and which of the steps under way were done, by slot.
type place struct {
	object
	done uint64
}

// one is one thing that can be the case.
type one struct {
	place
	used [most]uint16 // steps without an answer that were done, by kind
}

// cases are those that do not follow from others.
type cases map[place][][most]uint16

func (c cases) add(n one) bool {
	covers := func(a, b [most]uint16) bool {
		for k := range a {
			if a[k] > b[k] {
				return false
			}
		}
		return true
	}
	l := c[n.place]
	if slices.ContainsFunc(l, func(u [most]uint16) bool { return covers(u, n.used) }) {
		return false
	}
	c[n.place] = append(slices.DeleteFunc(l, func(u [most]uint16) bool { return covers(n.used, u) }), n.used)
	return true
}

func (c cases) String() string {
	var l []string
	for p := range c {
		s := "not there"
		if p.there {
			s = fmt.Sprint("there with ", p.n)
		}
		l = append(l, s)
	}
	slices.Sort(l)
	return strings.Join(slices.Compact(l), " or ")
}

type search struct {
	may   cases
	slots map[int]int // of steps under way
	steps [64]step    // by slot
	kinds []step      // without an answer
	have  [most]uint16
}

func (s *search) begin(i int, st step) {
	used := uint64(0)
	for _, k := range s.slots {
		used |= 1 << k
	}
	for k := range s.steps {
		if used&(1<<k) == 0 {
			s.slots[i], s.steps[k] = k, st
			return
		}
	}
	panic("storm: more clients than a search has room for")
}

func (s *search) unanswered(st step) {
	k := slices.Index(s.kinds, st)
	if k < 0 {
		k = len(s.kinds)
		s.kinds = append(s.kinds, st)
	}
	s.have[k]++
}

// answered leaves those cases in which the step of the slot was done.
func (s *search) answered(st step, slot int) {
	seen, after := cases{}, cases{}
	var unvisited []one
	reach := func(n one) {
		if bit := uint64(1) << slot; n.done&bit != 0 {
			n.done &^= bit
			after.add(n)
		} else if seen.add(n) {
			unvisited = append(unvisited, n)
		}
	}
	for p, l := range s.may {
		for _, u := range l {
			reach(one{place: p, used: u})
		}
	}
	for len(unvisited) > 0 {
		n := unvisited[len(unvisited)-1]
		unvisited = unvisited[:len(unvisited)-1]
		for _, k := range s.slots {
			if next, can := n.apply(s.steps[k]); can && n.done&(1<<k) == 0 {
				m := n
				m.object, m.done = next, n.done|1<<k
				reach(m)
			}
		}
		for k, st := range s.kinds {
			if next, can := n.apply(st); can && next != n.object && n.used[k] < s.have[k] {
				m := n
				m.object = next
				m.used[k]++
				reach(m)
			}
		}
	}
	s.may = after
}

// story is what came before the answer of a step that nothing explains.
func story(ops []op, last op) string {
	var l []op
	for _, o := range ops {
		if o.from <= last.to {
			l = append(l, o)
		}
	}
	slices.SortFunc(l, func(a, b op) int { return cmp.Compare(a.from, b.from) })
	var text strings.Builder
	for _, o := range l[max(0, len(l)-60):] {
		fmt.Fprintf(&text, "\t%v\n", o)
	}
	return text.String()
}
