package mirror

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestPanicGivesBack: the range of a copy that ends in a panic can be taken again; guests do not
// wait for it for ever.
func TestPanicGivesBack(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	j := &Job{copier: copier{driver: &filterDriver{}}} // without a node, which it takes for granted
	s, err := j.ranges.take(ctx, 0, 512)
	if err != nil {
		t.Fatal(err)
	}
	panicking(t, func() { _, _ = j.copyTaken(nil, s, 0, 512) })
	if s, err = j.ranges.take(ctx, 0, 512); err != nil {
		t.Fatalf("somebody still has the range: %v", err)
	}
	j.ranges.give(s)
}

// panicking calls f, which ends in a panic.
func panicking(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	f()
}

// TestPanicLetsGuestsGoOn: guests do not wait for ever where the last copy, for which the source is
// held quiet, ends in a panic.
func TestPanicLetsGuestsGoOn(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	g := drivertest.NewGraph(t)
	n := drivertest.AddNode(t, g, "n", drivertest.NewMemFile(512))
	guest := drivertest.AddRoot(t, g, n, drivertest.Writer)
	j := newJob(plan{source: n}) // without a bitmap, which it takes for granted
	panicking(t, func() { _, _ = j.quieten(ctx, nil, 0) })
	r, err := guest.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	guest.End(r)
}

// TestPanicForgetsNothing: what was to be copied still is where a guest's write to both sides ends
// in a panic.
func TestPanicForgetsNothing(t *testing.T) {
	g := drivertest.NewGraph(t)
	n := drivertest.AddNode(t, g, "n", drivertest.NewMemFile(4096))
	j := newJob(plan{source: n})
	j.bits = bitmap.New(4096, 512)
	j.writes = drivertest.AddRoot(t, g, drivertest.AddNode(t, g, "target", drivertest.NewMemFile(4096)), drivertest.Writer)
	j.life.setMode(types.MirrorCopyModeWriteBlocking)
	j.bits.Set(0, 1024)
	r := &blk.Req{Ctx: t.Context()}
	panicking(t, func() { _ = j.toBoth(r, 0, 1024, func() error { panic("bug") }, nil) })
	if at, k, _ := j.bits.NextDirty(0, 4096); at != 0 || k != 1024 || r.Unrecorded != nil {
		t.Errorf("to be copied: %d from %d on, left out: %v", k, at, r.Unrecorded)
	}
}

// TestTooMuchLetsGuestsGoOn: they do as well where there is too much to copy with the source held
// quiet, or the job is about to end for an error that its clients were told of.
func TestTooMuchLetsGuestsGoOn(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, told := range []error{nil, syscall.ENOSPC} {
		g := drivertest.NewGraph(t)
		n := drivertest.AddNode(t, g, "n", drivertest.NewMemFile(4096))
		guest := drivertest.AddRoot(t, g, n, drivertest.Writer)
		j := newJob(plan{source: n})
		j.bits = bitmap.New(4096, 512)
		j.bits.Set(0, 1024)
		if told != nil {
			j.life.fail(told)
		}
		if undrain, err := j.quieten(ctx, nil, 512); undrain != nil || !errors.Is(err, told) {
			t.Errorf("error: %v, want %v", err, told)
		}
		r, err := guest.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		guest.End(r)
	}
}
