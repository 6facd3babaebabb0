package vhostuser

import (
	"slices"
	"sync"
	"time"

	"qblockd/events/panics"
)

const (
	// maxWorkers is how many goroutines a front end has for requests that wait.
	maxWorkers = 64
	// maxQueued is how many requests may wait for one; more stay in their rings.
	maxQueued = 64
	// idleTime is after what time without work a worker ends, give or take as much again.
	idleTime = time.Second
)

// workers serve those requests of a front end that have to wait, in goroutines that stay for a
// while when there is nothing to do: new ones would have to grow their stacks each time.
type workers struct {
	timer *time.Timer // calls retire
	all   sync.WaitGroup

	mu   sync.Mutex
	room sync.Cond // queue went down, with mu
	// goroutines
	running int // +checklocks:mu
	// for the goroutines
	queue []*request // +checklocks:mu
	// those without work; the last one has worked last
	idle []*worker // +checklocks:mu
	// how few of them there were since retire was called
	spare int // +checklocks:mu
	// no more requests come
	over bool // +checklocks:mu
}

// worker is a goroutine of workers.
type worker struct {
	wake chan *request // nil: it is to end
}

func (w *workers) init() {
	w.room.L = &w.mu
	w.timer = panics.AfterFunc("the idle workers of a vhost-user disk", idleTime, w.retire)
	w.timer.Stop()
}

// put hands q to a worker; it waits while too many wait for one.
func (w *workers) put(q *request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) >= maxQueued {
		w.room.Wait()
	}
	if n := len(w.idle); n > 0 {
		k := w.idle[n-1]
		w.idle = w.idle[:n-1]
		w.spare = min(w.spare, n-1)
		k.wake <- q // it has room
		return
	}
	w.queue = append(w.queue, q)
	if w.running < maxWorkers {
		if w.running++; w.running == 1 {
			w.timer.Reset(idleTime)
		}
		k := &worker{wake: make(chan *request, 1)}
		w.all.Add(1)
		panics.Go("a vhost-user worker", func() { w.work(k) }, nil)
	}
}

// retire ends the workers that had nothing to do since it was called before.
func (w *workers) retire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range w.idle[:w.spare] {
		k.wake <- nil
	}
	w.running -= w.spare
	w.idle = slices.Delete(w.idle, 0, w.spare)
	w.spare = len(w.idle)
	if w.running > 0 && !w.over {
		w.timer.Reset(idleTime)
	}
}

// wait ends the workers; no request is under way any more.
func (w *workers) wait() {
	w.timer.Stop()
	w.mu.Lock()
	w.over = true
	for _, k := range w.idle {
		k.wake <- nil
	}
	w.idle, w.spare = nil, 0
	w.mu.Unlock()
	w.all.Wait()
}

// next waits for a request for k; for nil the goroutine ends.
func (w *workers) next(k *worker) *request {
	w.mu.Lock()
	if len(w.queue) > 0 {
		q := w.queue[0]
		w.queue = slices.Delete(w.queue, 0, 1)
		w.room.Signal()
		w.mu.Unlock()
		return q
	}
	if w.over {
		w.mu.Unlock()
		return nil
	}
	w.idle = append(w.idle, k)
	w.mu.Unlock()
	return <-k.wake
}

// work serves requests.
func (w *workers) work(k *worker) {
	defer w.all.Done()
	for q := w.next(k); q != nil; q = w.next(k) {
		q.r.performSafely(q)
	}
}
