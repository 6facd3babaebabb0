package trial

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// TestRun: a trial ends where something is wrong, and Run tells why.
func TestRun(t *testing.T) {
	why := errors.New("why")
	for name, f := range map[string]func(){
		"Must": func() { Must(why) }, "Get": func() { Get(1, why) }, "Fail": func() { Fail("%w", why) },
	} {
		after := false
		if err := Run(func() { f(); after = true }); !errors.Is(err, why) || after {
			t.Errorf("%s: %v, went on: %v", name, err, after)
		}
	}
	if err := Run(func() { Must(nil); _ = Get(1, nil) }); err != nil {
		t.Error(err)
	}
	if err := Run(func() { panic("oops") }); err == nil || !strings.Contains(err.Error(), "oops\n") ||
		!strings.Contains(err.Error(), "TestRun") {
		t.Errorf("a panic is %v", err)
	}
	if err := Run(func() { In("here", func() { Must(why) }) }); !errors.Is(err, why) || err.Error() != "here: why" {
		t.Errorf("in a part: %v", err)
	}
	inner := error(nil)
	if err := Run(func() { inner = Run(func() { Must(why) }) }); err != nil || inner != why {
		t.Errorf("a trial in a trial: %v, %v", err, inner)
	}
}

// TestWeighted: each comes as often as its weight says, one of no weight never.
func TestWeighted(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	n := map[int]int{}
	for range 6000 {
		n[Weighted(r, []int{0, 1, 2, 3}, func(w int) int { return w })]++
	}
	for w := range 4 {
		if n[w] < 900*w || n[w] > 1100*w {
			t.Errorf("weight %d came %d times of 6000", w, n[w])
		}
	}
}

func TestSame(t *testing.T) {
	if err := Same([]byte("abc"), []byte("abc"), 0); err != nil {
		t.Error(err)
	}
	for got, says := range map[string]string{"axcy": "2 of 4 bytes at 10 differ, the first at 11: 0x78 instead of 0x62", "abc": "3 bytes instead of 4"} {
		if err := Same([]byte(got), []byte("abcd"), 10); err == nil || err.Error() != says {
			t.Errorf("%s: %v", got, err)
		}
	}
	if p := []byte("abc"); !slices.Equal(Resized(p, 2), []byte("ab")) || !slices.Equal(Resized(p, 4), []byte("abc\x00")) {
		t.Error("Resized changes what it keeps")
	}
}
