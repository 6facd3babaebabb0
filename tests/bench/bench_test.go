package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestTurn(t *testing.T) {
	sides := []string{"a", "b", "c"}
	var got []string
	for r := range 7 {
		got = append(got, strings.Join(turn(sides, r), ""))
	}
	if want := []string{"abc", "cba", "bca", "acb", "cab", "bac", "abc"}; !slices.Equal(got, want) {
		t.Errorf("rounds go %v, not %v", got, want)
	}
	if turn(nil, 3) != nil {
		t.Error("nobody has a turn")
	}
}

// Ratios are of values of one round, and tell how many times better we are in either unit.
func TestFinish(t *testing.T) {
	for _, less := range []bool{false, true} {
		f := &figure{Name: "qmp/10k pipelined", Less: less, sides: []string{us, qsd},
			Values: map[string][]float64{}, rounds: map[string]map[int]float64{}}
		x, y := 60.0, 3.0
		if less {
			x, y = y, x
		}
		f.add(qsd, 0, y)
		f.add(us, 0, x)
		f.add(us, 1, 10*x) // its neighbour failed
		f.add(us, 2, 3*x)
		f.add(qsd, 2, 3*y)
		f.add(us, 3, nan)
		f.finish()
		c := f.Peers[0]
		if c.Ratio != 20 || c.Min != 20 || c.Max != 20 || c.Pairs != 2 || c.Target == nil || !c.Target.OK {
			t.Errorf("%+v %v", c, c.Target)
		}
	}
}

// Every target is about some figure, and each figure with qemu-storage-daemon beside it is known by
// name.
func TestTargets(t *testing.T) {
	var figures []string
	for _, g := range (&bench{}).groups() {
		for _, l := range g.loads {
			for _, m := range l.metrics {
				figures = append(figures, g.name+"/"+m.name)
			}
		}
	}
	for _, x := range slices.Concat(targets, limits) {
		re := regexp.MustCompile("^(?:" + x.figure + ")$")
		if !slices.ContainsFunc(figures, re.MatchString) {
			t.Errorf("no figure is called %s", x.figure)
		}
	}
}

func TestMarks(t *testing.T) {
	b := pattern(3 * markPage)
	mark(b, 5*markPage)
	if err := marked(b, 5*markPage); err != nil {
		t.Error(err)
	}
	b[2*markPage+7]++
	if marked(b, 5*markPage) == nil || marked(b[:2*markPage], 4*markPage) == nil {
		t.Error("wrong data pass")
	}
}
