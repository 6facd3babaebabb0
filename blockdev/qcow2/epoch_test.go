package qcow2

import (
	"testing"

	"pgregory.net/rapid"
)

// TestBatch: batches together touch each cluster as often as the ranges do, in their order, and none touches more than it may.
func TestBatch(t *testing.T) {
	const cb = 9
	rapid.Check(t, func(t *rapid.T) {
		var l []freed
		var want, got []int64
		add := func(to *[]int64, f freed) {
			for c := f.off >> cb; c<<cb < f.off+f.n; c++ {
				*to = append(*to, c)
			}
		}
		for range rapid.IntRange(1, 8).Draw(t, "ranges") {
			f := freed{off: rapid.Int64Range(0, 1<<30).Draw(t, "off"), n: rapid.Int64Range(1, 3*maxBatch<<cb).Draw(t, "n")}
			if rapid.Bool().Draw(t, "aligned") {
				f.off &^= 1<<cb - 1
			}
			l = append(l, f)
			add(&want, f)
		}
		for len(l) > 0 {
			var now []freed
			before := len(got)
			now, l = batch(l, cb)
			for _, f := range now {
				add(&got, f)
			}
			if n := len(got) - before; n > maxBatch || n < maxBatch && len(l) > 0 {
				t.Fatalf("a batch of %d clusters, and more to come: %v", n, len(l) > 0)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("%d clusters, want %d", len(got), len(want))
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("cluster %d is %d, want %d", i, got[i], want[i])
			}
		}
	})
}
