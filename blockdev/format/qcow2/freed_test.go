package qcow2

import (
	"math"
	"testing"
)

// TestFreedAtTheEnd: the table of a snapshot may be said to lie where offsets end; what it touches
// is still a cluster, and not all there are.
func TestFreedAtTheEnd(t *testing.T) {
	const cb = 12
	last := int64(math.MaxInt64) >> cb
	for _, c := range []struct{ off, n, first, behind int64 }{
		{0, 1, 0, 1},
		{0, 4096, 0, 1},
		{4095, 2, 0, 2},
		{last << cb, 16, last, last + 1},
		{last << cb, 4095, last, last + 1},
	} {
		if first, behind := (freed{off: c.off, n: c.n}).clusters(cb); first != c.first || behind != c.behind {
			t.Errorf("%d bytes at %d: %d to %d, want %d to %d", c.n, c.off, first, behind, c.first, c.behind)
		}
	}
}
