package storm

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/anishathalye/porcupine"
)

// judge says of a history what porcupine says, which tries the orders one by one.
func judge(first object, ops []op) bool {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{first} },
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
	var l []porcupine.Operation
	for _, o := range ops {
		end := o.to
		if !o.step.ok {
			end = math.MaxInt64
		}
		l = append(l, porcupine.Operation{ClientId: o.client, Input: o.step, Call: o.from, Return: end})
	}
	return porcupine.CheckOperations(m.ToModel(), l)
}

// Short histories of a few clients, of whom some leave: both find the same.
func TestDecideAsPorcupine(t *testing.T) {
	kinds := []step{
		{what: "make"}, {what: "drop"}, {what: "clear"}, {what: "merge", n: 1}, {what: "merge", n: 2}, {what: "is", n: 0}, {what: "is", n: 1}, {what: "is", n: 3},
		{what: "is there"}, {what: "is not there"}, {what: "size", n: 1}, {what: "size", n: 2},
	}
	verdicts := map[bool]int{}
	for seed := range uint64(20000) {
		r := rand.New(rand.NewPCG(seed, 0))
		first := object{there: r.IntN(2) == 0}
		var ops []op
		for c := range 1 + r.IntN(3) {
			at := int64(r.IntN(3))
			for range 1 + r.IntN(3) {
				s := kinds[r.IntN(len(kinds))]
				s.ok = r.IntN(4) > 0
				end := at + 1 + int64(r.IntN(4))
				ops = append(ops, op{client: c, step: s, from: at, to: end})
				at = end + int64(r.IntN(2)) // what is sent at the time of an answer elsewhere counts as sent before
				if !s.ok {
					c += 10
				}
			}
		}
		want, got := judge(first, ops), decide(first, ops)
		verdicts[want]++
		if want != (got == nil) {
			t.Fatalf("seed %d, at first %+v: porcupine finds an order: %v; decide: %v\n%v", seed, first, want, got, ops)
		}
	}
	if verdicts[true] < 2000 || verdicts[false] < 2000 {
		t.Errorf("too few histories of one kind: %v", verdicts)
	}
}

// A history in which many have left, as long as one of a storm, is decided (the cases do not grow
// with its length).
func TestDecideMuch(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var ops []op
	o := object{}
	kinds := []step{{what: "make"}, {what: "drop"}, {what: "clear"}, {what: "merge", n: 1}, {what: "merge", n: 2}, {what: "merge", n: 4}}
	for at := int64(0); len(ops) < 2000; at += 10 {
		s := kinds[r.IntN(len(kinds))]
		switch next, can := o.apply(s); {
		case r.IntN(10) == 0: // a client leaves
			if can && r.IntN(2) == 0 {
				o = next
			}
		case can:
			s.ok, o = true, next
		default:
			s = step{what: map[bool]string{true: "is there", false: "is not there"}[o.there], ok: true}
		}
		ops = append(ops, op{client: int(at/10) % 6, step: s, from: at - int64(r.IntN(30)), to: at + 1 + int64(r.IntN(30))})
		if o.there && r.IntN(3) == 0 {
			ops = append(ops, op{client: 6, step: step{what: "is", n: o.n, ok: true}, from: at + 2, to: at + 5})
		}
	}
	if err := decide(object{}, ops); err != nil {
		t.Error(err)
	}
	// The same with one answer that is wrong.
	end := ops[len(ops)-1].to + 1000
	ops = append(ops, op{client: 6, step: step{what: "is", n: 99, ok: true}, from: end, to: end + 1})
	if err := decide(object{}, ops); err == nil {
		t.Error("a bitmap with bits that nobody has merged was believed")
	}
}
