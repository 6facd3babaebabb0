// Package trial is what tests that do random things have in common: they end with the first thing
// that is wrong, choose by chance, and compare bytes with what a model has.
//
// What is not as it should be ends a trial from wherever it is found, as FailNow ends a test: what
// comes after a call of Must, Get or Fail can rely on all that came before. Each goroutine has a
// Run of its own.
package trial

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
)

// ended carries why a trial is over to its Run.
type ended struct{ error }

// Run calls f and returns what Must, Get or Fail ended it with. A panic is an error, too.
func Run(f func()) (err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case ended:
			err = p.error
		default:
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	f()
	return nil
}

// In is f in this trial; what ends it is told to be about what.
func In(what string, f func()) {
	if err := Run(f); err != nil {
		Fail("%s: %w", what, err)
	}
}

// Must ends the trial unless err is nil.
func Must(err error) {
	if err != nil {
		panic(ended{err})
	}
}

// Get is v, unless err ends the trial.
func Get[T any](v T, err error) T {
	Must(err)
	return v
}

// Fail ends the trial.
func Fail(format string, args ...any) { Must(fmt.Errorf(format, args...)) }

// Pick is one of l.
func Pick[T any](r *rand.Rand, l ...T) T { return l[r.IntN(len(l))] }

// One is true once in n times.
func One(r *rand.Rand, n int) bool { return r.IntN(n) == 0 }

// Weighted is one of l, each as often as its weight tells.
func Weighted[T any](r *rand.Rand, l []T, weight func(T) int) T {
	sum := 0
	for _, x := range l {
		sum += weight(x)
	}
	k := r.IntN(sum)
	return l[slices.IndexFunc(l, func(x T) bool { k -= weight(x); return k < 0 })]
}

// Same compares bytes at off with those that should be there.
func Same(got, want []byte, off int) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes instead of %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return nil
	}
	bad, first := 0, -1
	for i := range want {
		if got[i] != want[i] {
			if bad++; first < 0 {
				first = i
			}
		}
	}
	return fmt.Errorf("%d of %d bytes at %d differ, the first at %d: %#x instead of %#x",
		bad, len(want), off, off+first, got[first], want[first])
}

// Resized is a copy of p with another length.
func Resized(p []byte, n int) []byte {
	q := make([]byte, n)
	copy(q, p)
	return q
}
