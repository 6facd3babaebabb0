package trace

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"qblockd/events/panics"
)

// keep is how many records wait at most.
const keep = 8192

// recordQueue writes records in the order in which they came, by a goroutine that lives while there
// are any.
type recordQueue struct {
	mu      sync.Mutex
	records []slog.Record // +checklocks:mu
	// dropped since the last one that was kept
	lost int // +checklocks:mu
	// of the goroutine: closed when it ends; nil: there is none
	idle chan struct{} // +checklocks:mu
}

var queue recordQueue

func (q *recordQueue) put(r slog.Record) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.records) >= keep {
		q.lost++
		return
	}
	if q.lost > 0 {
		r.AddAttrs(slog.Int("lost-before", q.lost))
		q.lost = 0
	}
	q.records = append(q.records, r)
	if q.idle == nil {
		q.idle = make(chan struct{})
		panics.Go("the log of trace points", q.write, func(error) { q.ended() })
	}
}

// ended lets those go on who wait for a writer that is there no more.
func (q *recordQueue) ended() {
	q.mu.Lock()
	defer q.mu.Unlock()
	close(q.idle)
	q.idle = nil
}

func (q *recordQueue) write() {
	ctx := context.Background()
	h := slog.Default().Handler()
	for {
		q.mu.Lock()
		batch := q.records
		q.records = nil
		if len(batch) == 0 {
			close(q.idle)
			q.idle = nil
			q.mu.Unlock()
			return
		}
		q.mu.Unlock()
		for _, r := range batch {
			if h.Enabled(ctx, r.Level) {
				// A log that cannot be written is nobody's to report.
				_ = h.Handle(ctx, r)
			}
		}
	}
}

// Flush waits until all records so far are written, at most for the time given.
func Flush(atMost time.Duration) {
	queue.mu.Lock()
	idle := queue.idle
	queue.mu.Unlock()
	if idle == nil {
		return
	}
	select {
	case <-idle:
	case <-time.After(atMost):
	}
}
