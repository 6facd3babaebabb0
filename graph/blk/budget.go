package blk

import (
	"slices"
	"sync"
)

// Budget bounds memory that requests take for a time and whose size others decide: an image by the
// size of its clusters, a client by the number of its requests. Who finds it spent waits, and is
// served in the order of coming. The zero value has no room but for one taker at a time.
//
// Nobody may wait for a budget while holding a part of the same one, or a lock that who holds a
// part may need.
type Budget struct {
	Limit int64 // bytes; set before it is used

	mu    sync.Mutex
	used  int64     // +checklocks:mu
	queue []*waiter // +checklocks:mu
}

type waiter struct {
	n     int64
	ready chan struct{} // closed when n is taken for it
}

// Take takes n bytes, which Give gives back. More than there is in all is given to a single taker.
// Errors: ErrWouldBlock, and the cause of the end of the context of r.
func (b *Budget) Take(r *Req, n int64) error {
	b.mu.Lock()
	if len(b.queue) == 0 && b.fitsLocked(n) {
		b.used += n
		b.mu.Unlock()
		return nil
	}
	if r.NoWait {
		b.mu.Unlock()
		return ErrWouldBlock
	}
	w := &waiter{n, make(chan struct{})}
	b.queue = append(b.queue, w)
	b.mu.Unlock()
	err := r.Await(w.ready)
	if err == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.queue, w)
	if i < 0 {
		return nil // it came just now
	}
	b.queue = slices.Delete(b.queue, i, i+1)
	b.nextLocked() // it may have stood in the way of smaller ones
	return err
}

// Give gives back n bytes.
func (b *Budget) Give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used -= n; b.used < 0 {
		panic("blk: more is given back to a budget than was taken")
	}
	b.nextLocked()
}

// +checklocks:b.mu
func (b *Budget) fitsLocked(n int64) bool { return b.used == 0 || b.used+n <= b.Limit }

// +checklocks:b.mu
func (b *Budget) nextLocked() {
	for len(b.queue) > 0 && b.fitsLocked(b.queue[0].n) {
		w := b.queue[0]
		b.queue = b.queue[1:]
		b.used += w.n
		close(w.ready)
	}
}
