package meta

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"qblockd/tests/trial"
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
	for l := range strings.Lines(text) {
		if l = strings.TrimSpace(l); l == "" || l[0] == '#' {
			continue
		}
		var o Op
		if _, err := fmt.Sscan(l, &o.Kind, &o.Slot, &o.A, &o.B, &o.C, &o.D); err != nil {
			return nil, fmt.Errorf("operation %q: %w", l, err)
		}
		if kindOf(o.Kind).do == nil || o.Slot < 0 || o.Slot >= slots {
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

// What an operation needs of its image.
const (
	settled = iota // its content is defined
	nodes          // and the nodes of its chain stay as they are: jobs that close some at their end are over
	nothing
	noImage // the slot is empty
)

// kind is a kind of operation.
type kind struct {
	name   string
	weight int // how often it comes
	do     func(*op, *image)
	needs  int
}

var kinds = []kind{
	{"create", 10, (*op).create, noImage}, {"add", 14, (*op).add, nodes}, {"del", 6, (*op).del, nodes},
	{"rm", 2, (*op).rm, nodes}, {"attach", 14, (*op).attach, nodes}, {"detach", 4, (*op).detach, settled},
	{"write", 60, (*op).write, settled}, {"zero", 16, (*op).zero, settled}, {"discard", 16, (*op).discard, settled},
	{"read", 20, (*op).read, settled}, {"flush", 8, (*op).flush, settled}, {"compress", 8, (*op).compress, settled},
	{"status", 6, (*op).status, settled}, {"burst", 8, (*op).burst, settled}, {"start", 8, (*op).start, settled},
	{"join", 4, (*op).joined, settled}, {"verify", 4, (*op).verify, nodes}, {"query", 2, (*op).query, nothing},
	{"snapshot", 8, (*op).snapshot, nodes}, {"resize", 8, (*op).resize, nodes}, {"backup", 10, (*op).backup, nodes},
	{"mirror", 10, (*op).mirror, nodes}, {"commit", 10, (*op).commit, nodes}, {"bitmap", 16, (*op).bitmap, nodes},
	{"reopen", 8, (*op).reopen, nodes}, {"stream", 16, (*op).stream, nodes}, {"tick", 10, (*op).tick, nothing},
	{"pause", 3, pause, nothing}, {"resume", 3, resume, nothing}, {"speed", 3, speed, nothing},
	{"cancel", 3, (*op).cancel, nothing}, {"finish", 6, (*op).finish, nothing},
}

// kindOf is the kind of that name; one that is not known has nothing to do.
func kindOf(name string) (k kind) {
	if i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name }); i >= 0 {
		k = kinds[i]
	}
	return k
}

// Generate makes the n operations of a seed.
func Generate(seed uint64, n int) []Op {
	rnd := rand.New(rand.NewPCG(seed, 0x6d657461))
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
		add(trial.Weighted(rnd, kinds, func(k kind) int { return k.weight }).name, slot)
	}
	return ops[:n]
}

// Reduce leaves out operations as long as fails says that those left still fail, and gives
// what cannot be reduced, or what is left when the tries are used up.
func Reduce(ops []Op, tries int, fails func([]Op) bool) []Op {
	for size := len(ops) / 2; size > 0 && tries > 0; {
		shrunk := false
		for at := 0; at < len(ops) && tries > 0; {
			less := slices.Concat(ops[:at], ops[min(at+size, len(ops)):])
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
