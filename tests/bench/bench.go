package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Who is measured. The first is us.
const (
	us      = "qblockd"
	qsd     = "qemu-storage-daemon"
	qsd10   = "qsd10" // one of version 10.0, under another name
	nbdkit  = "nbdkit"
	qemuNBD = "qemu-nbd"
)

// bench is one run of the program.
type bench struct {
	ctx     context.Context
	pairs   int
	secs    float64 // of a load on one server
	budget  float64 // seconds after which a load gets no further round
	size    int64   // of the images, bytes
	quick   bool
	cases   *regexp.Regexp
	json    string // file; "" for none
	qblockd string // program
	disk    string // folders
	shm     string

	procs   []*proc
	clean   []string // folders to be removed
	absent  []string // programs that are not installed
	figures []*figure
	errs    int
	started time.Time
}

// metric is one figure that a load yields.
type metric struct {
	name, unit string
	less       bool // is better
}

// load is put on every side of its group by turns.
type load struct {
	name    string
	metrics []metric
	run     func(side string) ([]float64, error) // one value a metric; NaN is not known
	pairs   int                                  // at most, if not 0
	sides   []string                             // instead of the group's
}

// single is a load with one metric of its own name.
func single(name, unit string, less bool, run func(side string) (float64, error)) load {
	return load{name: name, metrics: []metric{{name, unit, less}}, run: func(side string) ([]float64, error) {
		v, err := run(side)
		return []float64{v}, err
	}}
}

// known is a load of which the value was found when its group was set up.
func known(name, unit string, values map[string]float64) load {
	l := single(name, unit, true, func(side string) (float64, error) { return values[side], nil })
	l.pairs = 1
	return l
}

// most is l in so many pairs at most.
func (l load) most(pairs int) load {
	l.pairs = pairs
	return l
}

// group is loads that share what they run on.
type group struct {
	name  string
	sides []string                // us first
	setUp func(side string) error // starts what the loads run on
	ready func() error            // before the first setUp: images
	down  func()                  // ends and removes all
	loads []load
}

// figure is what was measured of one metric.
type figure struct {
	Name   string               `json:"name"` // group/metric
	Unit   string               `json:"unit"`
	Less   bool                 `json:"less_is_better"`
	Values map[string][]float64 `json:"values"` // by side, in order of the rounds
	Peers  []*comparison        `json:"peers"`
	Limit  *verdict             `json:"limit,omitempty"` // of our own median
	sides  []string
	rounds map[string]map[int]float64
}

// comparison is one peer beside us.
type comparison struct {
	Peer   string   `json:"peer"`
	Median float64  `json:"median"`
	Ours   float64  `json:"ours"`
	Ratio  float64  `json:"ratio"` // median of the rounds' ratios
	Min    float64  `json:"min"`
	Max    float64  `json:"max"`
	Pairs  int      `json:"pairs"`
	Target *verdict `json:"target,omitempty"`
}

type verdict struct {
	Want float64 `json:"want"`
	OK   bool    `json:"ok"`
}

func (v *verdict) String() string {
	if v.OK {
		return "OK"
	}
	return "BELOW"
}

// group runs the wanted loads of g. Its error is that of the context; others are printed and
// counted.
func (b *bench) group(g *group) error {
	g.loads = slices.DeleteFunc(g.loads, func(l load) bool { return !b.cases.MatchString(g.name + "/" + l.name) })
	g.sides = slices.DeleteFunc(g.sides, func(s string) bool { return slices.Contains(b.absent, s) })
	if len(g.loads) == 0 || b.ctx.Err() != nil {
		return b.ctx.Err()
	}
	fmt.Printf("\n%s\n", g.name)
	defer func() {
		if g.down != nil {
			g.down()
		}
		b.stopAll()
	}()
	if g.ready != nil {
		if err := g.ready(); errors.Is(err, errSkip) {
			fmt.Printf("  SKIPPED: %v\n", err)
			return nil
		} else if err != nil {
			b.fail(g.name, err)
			return b.ctx.Err()
		}
	}
	up := g.sides[:0:0]
	for _, s := range g.sides {
		if g.setUp != nil {
			if err := g.setUp(s); err != nil {
				b.fail(g.name+": "+s, err)
				continue
			}
		}
		up = append(up, s)
	}
	for i := range g.loads {
		b.load(g.name, &g.loads[i], up)
		if b.ctx.Err() != nil {
			return b.ctx.Err()
		}
	}
	return nil
}

var errSkip = errors.New("cannot be measured here")

func (b *bench) fail(what string, err error) {
	b.errs++
	fmt.Printf("  ERROR %s: %v\n", what, err)
}

// load runs the rounds of l and prints its figures.
func (b *bench) load(group string, l *load, sides []string) {
	sides = slices.Clone(sides)
	if l.sides != nil {
		sides = slices.DeleteFunc(sides, func(s string) bool { return !slices.Contains(l.sides, s) })
	}
	fs := make([]*figure, len(l.metrics))
	for i, m := range l.metrics {
		fs[i] = &figure{Name: group + "/" + m.name, Unit: m.unit, Less: m.less, sides: slices.Clone(sides),
			Values: map[string][]float64{}, rounds: map[string]map[int]float64{}}
	}
	rounds := b.pairs
	if l.pairs > 0 {
		rounds = min(rounds, l.pairs)
	}
	begin := time.Now()
	for r := 0; r < rounds && b.ctx.Err() == nil; r++ {
		if r > 0 && time.Since(begin).Seconds() > b.budget {
			break
		}
		for _, s := range turn(sides, r) {
			vs, err := l.run(s)
			if err != nil {
				if b.ctx.Err() == nil {
					b.fail(fmt.Sprintf("%s/%s: %s", group, l.name, s), err)
				}
				sides = slices.DeleteFunc(sides, func(x string) bool { return x == s })
				continue
			}
			for i, v := range vs {
				fs[i].add(s, r, v)
			}
		}
	}
	for _, f := range fs {
		f.finish()
		f.print()
		b.figures = append(b.figures, f)
	}
}

// turn is the order of round r: rotated by one every second round, and every other one backwards.
func turn(sides []string, r int) []string {
	if len(sides) == 0 {
		return nil
	}
	k := (r / 2) % len(sides)
	t := slices.Concat(sides[k:], sides[:k])
	if r%2 == 1 {
		slices.Reverse(t)
	}
	return t
}

func (f *figure) add(side string, round int, v float64) {
	if v != v {
		return
	}
	f.Values[side] = append(f.Values[side], v)
	if f.rounds[side] == nil {
		f.rounds[side] = map[int]float64{}
	}
	f.rounds[side][round] = v
}

// finish makes the comparisons.
func (f *figure) finish() {
	ours := median(f.Values[us])
	if w := limitOf(f.Name); w > 0 && len(f.Values[us]) > 0 {
		f.Limit = &verdict{w, ours <= w}
	}
	for _, p := range f.sides {
		if p == us {
			continue
		}
		c := &comparison{Peer: p, Median: median(f.Values[p]), Ours: ours}
		var rs []float64
		for r, v := range f.rounds[p] {
			o, ok := f.rounds[us][r]
			if !ok || o <= 0 || v <= 0 {
				continue
			}
			if f.Less {
				o, v = v, o
			}
			rs = append(rs, o/v)
		}
		if len(rs) == 0 {
			continue
		}
		c.Pairs, c.Ratio, c.Min, c.Max = len(rs), median(rs), slices.Min(rs), slices.Max(rs)
		if w := targetOf(f.Name, p); w > 0 {
			c.Target = &verdict{w, c.Ratio >= w}
		}
		f.Peers = append(f.Peers, c)
	}
}

func (f *figure) print() {
	_, name, _ := strings.Cut(f.Name, "/")
	fmt.Printf("  %-40s %12s %-6s", name, number(median(f.Values[us])), f.Unit)
	if f.Limit != nil {
		fmt.Printf("   at most %v %v", f.Limit.Want, f.Limit)
	}
	fmt.Println()
	for _, c := range f.Peers {
		fmt.Printf("  %40s %12s %-6s   x%-6.3g (%.3g..%.3g, %d)", c.Peer, number(c.Median), f.Unit, c.Ratio, c.Min, c.Max, c.Pairs)
		if c.Target != nil {
			fmt.Printf("   target x%v %v", c.Target.Want, c.Target)
		}
		fmt.Println()
	}
}

// number prints v with three digits that count.
func number(v float64) string {
	switch {
	case v != v:
		return "-"
	case v >= 1e6:
		return fmt.Sprintf("%.2fM", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%.0fk", v/1e3)
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return nan
	}
	s := slices.Clone(v)
	slices.Sort(s)
	if n := len(s) / 2; len(s)%2 == 0 {
		return (s[n-1] + s[n]) / 2
	}
	return s[len(s)/2]
}

// summary lists what is below its target and writes the JSON file.
func (b *bench) summary() error {
	ok := 0
	var below []string
	for _, f := range b.figures {
		if f.Limit != nil {
			if f.Limit.OK {
				ok++
			} else {
				below = append(below, fmt.Sprintf("%s: %s, not %v %s", f.Name, number(median(f.Values[us])), f.Limit.Want, f.Unit))
			}
		}
		for _, c := range f.Peers {
			switch {
			case c.Target == nil:
			case c.Target.OK:
				ok++
			default:
				below = append(below, fmt.Sprintf("%s: x%.3g (%.3g..%.3g) of %s, not x%v", f.Name, c.Ratio, c.Min, c.Max, c.Peer, c.Target.Want))
			}
		}
	}
	fmt.Printf("\n%d targets OK, %d BELOW, %d errors, %.0f s\n", ok, len(below), b.errs, time.Since(b.started).Seconds())
	for _, s := range below {
		fmt.Println("  BELOW", s)
	}
	for _, s := range b.absent {
		fmt.Printf("  SKIPPED %s: not installed\n", s)
	}
	if b.json != "" {
		j, err := json.MarshalIndent(b.figures, "", "\t")
		if err != nil {
			return err
		}
		if err := os.WriteFile(b.json, append(j, '\n'), 0o666); err != nil {
			return err
		}
	}
	if b.errs > 0 {
		return fmt.Errorf("%d loads failed", b.errs)
	}
	return nil
}
