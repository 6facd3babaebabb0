package meta

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// slots is the number of images that a history can have.
const slots = 8

// Op is one operation.
type Op struct {
	Kind       string
	Slot       int
	A, B, C, D uint32
}

// String is the form in which operations are kept; Parse reads it.
func (o Op) String() string {
	return fmt.Sprintf("%s %d %d %d %d %d", o.Kind, o.Slot, o.A, o.B, o.C, o.D)
}

// Parse reads operations, one a line; lines that begin with # are left out.
func Parse(text string) ([]Op, error) {
	var ops []Op
	for _, l := range strings.Split(text, "\n") {
		if l = strings.TrimSpace(l); l == "" || l[0] == '#' {
			continue
		}
		var o Op
		if _, err := fmt.Sscan(l, &o.Kind, &o.Slot, &o.A, &o.B, &o.C, &o.D); err != nil {
			return nil, fmt.Errorf("operation %q: %w", l, err)
		}
		if _, ok := actions[o.Kind]; !ok || o.Slot < 0 || o.Slot >= slots {
			return nil, fmt.Errorf("operation %q is not known", l)
		}
		ops = append(ops, o)
	}
	return ops, nil
}

// Format is the text of operations.
func Format(ops []Op) string {
	var b strings.Builder
	for _, o := range ops {
		fmt.Fprintln(&b, o)
	}
	return b.String()
}

// weights tell how often each kind comes.
var weights = []struct {
	kind string
	n    int
}{
	{"create", 10}, {"add", 14}, {"del", 6}, {"rm", 2}, {"attach", 14}, {"detach", 4},
	{"write", 60}, {"zero", 16}, {"discard", 16}, {"read", 20}, {"flush", 8}, {"compress", 8}, {"status", 6},
	{"burst", 8}, {"start", 8}, {"join", 4}, {"verify", 4}, {"query", 2},
	{"snapshot", 8}, {"resize", 8},
	{"backup", 10}, {"mirror", 10}, {"commit", 10}, {"bitmap", 16}, {"reopen", 8},
	{"stream", 16}, {"tick", 10}, {"pause", 3}, {"resume", 3}, {"speed", 3}, {"cancel", 3}, {"finish", 6},
}

// Generate makes the n operations of a seed.
func Generate(seed uint64, n int) []Op {
	rnd := rand.New(rand.NewPCG(seed, 0x6d657461))
	total := 0
	for _, w := range weights {
		total += w.n
	}
	ops := make([]Op, 0, n)
	add := func(kind string, slot int) {
		ops = append(ops, Op{kind, slot, rnd.Uint32(), rnd.Uint32(), rnd.Uint32(), rnd.Uint32()})
	}
	// Something to start with.
	for s := range 2 {
		add("create", s)
		add("add", s)
		add("attach", s)
		add("write", s)
	}
	favourite := 0 // operations come in runs on one image, else little happens to each
	for len(ops) < n {
		if rnd.IntN(6) == 0 {
			favourite = rnd.IntN(slots)
		}
		slot := favourite
		if rnd.IntN(3) == 0 {
			slot = rnd.IntN(slots)
		}
		k := rnd.IntN(total)
		for _, w := range weights {
			if k -= w.n; k < 0 {
				add(w.kind, slot)
				break
			}
		}
	}
	return ops[:n]
}

// Reduce leaves out operations as long as fails says that those left still fail, and gives
// what cannot be reduced, or what is left when the tries are used up.
func Reduce(ops []Op, tries int, fails func([]Op) bool) []Op {
	for size := len(ops) / 2; size > 0 && tries > 0; {
		shrunk := false
		for at := 0; at < len(ops) && tries > 0; {
			less := append(append([]Op(nil), ops[:at]...), ops[min(at+size, len(ops)):]...)
			tries--
			if len(less) > 0 && fails(less) {
				ops, shrunk = less, true
				continue
			}
			at += size
		}
		if size > 1 {
			size /= 2
		} else if !shrunk {
			break
		}
	}
	return ops
}
