package geometry

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// tick is how often somebody looks whether a sample gets on. Ticks that nobody was there to take do
// not count: a machine that stands still is no fault of the job.
const tick = 100 * time.Millisecond

const (
	// quietAfter is how many polls of a job pass before nobody pauses it, limits its speed or lets
	// I/Os fail any more.
	quietAfter = 500
	// mostMoves is how much may happen afterwards until it has ended, however fast guests write.
	mostMoves = 300_000
)

var errIdle = errors.New("nothing happens any more")

// moves is how much has happened so far: requests to files, units of work of the model.
func (w *world) moves() int64 {
	n := w.units.Load()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.opened {
		n += f.Calls()
	}
	return n
}

// watch returns when done is closed, or when nothing has happened for a time of limit: it then ends
// the sample's context, and gives it the same time again.
func (w *world) watch(done <-chan struct{}, limit time.Duration, cancel context.CancelCauseFunc) error {
	t := time.NewTicker(tick)
	defer t.Stop()
	most := max(1, int(limit/tick))
	last, idle := int64(-1), 0
	for {
		select {
		case <-done:
			return nil
		case <-t.C:
		}
		if n := w.moves(); n != last {
			last, idle = n, 0
			continue
		}
		switch idle++; idle {
		case most:
			cancel(errIdle)
		case 2 * most:
			return fmt.Errorf("hangs: %w", errIdle)
		}
	}
}
