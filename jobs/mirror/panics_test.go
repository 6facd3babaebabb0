package mirror

import (
	"context"
	"testing"
	"time"
)

// TestPanicGivesBack: the range of a copy that ends in a panic can be taken again; guests do not wait for it for ever.
func TestPanicGivesBack(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	j := &job{driver: &filterDriver{}} // without a node, which it takes for granted
	s, err := j.ranges.take(ctx, 0, 512)
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		_, _ = j.copyTaken(nil, s, 0, 512)
	}()
	if s, err = j.ranges.take(ctx, 0, 512); err != nil {
		t.Fatalf("somebody still has the range: %v", err)
	}
	j.ranges.give(s)
}
