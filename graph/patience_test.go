package graph

import (
	"context"
	"sync/atomic"
	"testing"
	"time"
)

// slowDriver needs the time takes to close, unless end is closed before, and shows what show says
// meanwhile.
type slowDriver struct {
	memDriver
	takes time.Duration
	end   chan struct{}
	show  func(since time.Duration) (int64, bool)
	begun atomic.Pointer[time.Time]
	done  atomic.Bool
}

func (d *slowDriver) Close() error {
	now := time.Now()
	d.begun.Store(&now)
	select {
	case <-time.After(d.takes):
		d.done.Store(true)
	case <-d.end:
	}
	return d.memDriver.Close()
}

func (d *slowDriver) Lag() (int64, bool) {
	t := d.begun.Load()
	if t == nil || d.done.Load() {
		return 0, false
	}
	return d.show(time.Since(*t))
}

// TestPatientClose: the end waits for storage that moves, however slow it is, and longer for one
// that nothing could cut short; not for others.
func TestPatientClose(t *testing.T) {
	const patience = 200 * time.Millisecond
	for _, c := range []struct {
		name   string
		takes  time.Duration
		show   func(time.Duration) (int64, bool)
		closed bool
	}{
		{"moves", 6 * patience, func(d time.Duration) (int64, bool) { return int64(6*patience - d), false }, true},
		{"bound", 4 * patience, func(time.Duration) (int64, bool) { return 7, true }, true},
		{"still", 20 * patience, func(time.Duration) (int64, bool) { return 7, false }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := New(nullSink{})
			d := &slowDriver{takes: c.takes, end: make(chan struct{}), show: c.show}
			defer close(d.end)
			add(t, g, Options{Name: "n", Kind: Filter}, func(*Node) Driver { return d })
			ctx, cancel := g.Patient(context.Background(), patience)
			defer cancel()
			err := g.Close(ctx)
			if (err == nil) != c.closed || d.done.Load() != c.closed {
				t.Errorf("Close: %v; closed %v", err, d.done.Load())
			}
		})
	}
}
