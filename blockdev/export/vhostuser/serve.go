package vhostuser

import (
	"errors"
	"os"

	"qblockd/blockdev/export"
	"qblockd/blockdev/virtio"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// request is one of a ring's. It is its ring's, in flight or free.
type request struct {
	virtio.Request
	r *ring
}

// batch is after how many requests that were served in line the driver is told of them: early
// enough for it to go on while the next ones are served.
const batch = 8

// run serves r until it is to stop, or is broken.
func (r *ring) run() {
	defer close(r.done)
	for {
		err := r.drain()
		if err == nil {
			err = r.wait()
		}
		switch {
		case r.stopping.Load():
			return
		case err != nil:
			r.broken(err)
			return
		}
	}
}

// drain serves what is in the ring.
func (r *ring) drain() error {
	for n := 1; ; n++ {
		u := r.enter()
		if u == nil {
			return nil
		}
		q, err := r.pop()
		if q == nil {
			r.f.s.x.Root.End(u)
			r.publish()
			return err
		}
		if r.inline(u, q) && n%batch == 0 {
			r.publish()
		}
	}
}

// wait waits until there is something in the ring, or it is to stop.
func (r *ring) wait() error {
	r.mu.Lock()
	more, err := r.queue.EnableKicks()
	r.mu.Unlock()
	if more || err != nil {
		return err
	}
	if err = r.kick.wait(); errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.queue.DisableKicks()
}

// enter passes the gate for the next request. While that is closed, or an error has stopped the
// export, requests stay in the ring. nil: r is to stop.
func (r *ring) enter() *blk.Req {
	x := r.f.s.x
	for !r.stopping.Load() {
		if over := x.Errors.Stopped(); over != nil {
			r.publish()
			select {
			case <-over:
			case <-r.ctx.Done():
			}
			continue
		}
		if u := x.Root.TryBegin(); u != nil {
			return u
		}
		r.publish()
		u, err := x.Root.Begin(r.ctx)
		if err != nil {
			return nil // r is to stop, or will be: the export goes
		}
		return u
	}
	return nil
}

// pop takes the next request; nil: there is none.
func (r *ring) pop() (*request, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var q *request
	if n := len(r.free); n > 0 {
		q = r.free[n-1]
	} else {
		q = &request{r: r}
		r.free = append(r.free, q)
	}
	ok, err := q.Pop(r.queue, &r.f.s.limits)
	if !ok || err != nil {
		return nil, err
	}
	r.free = r.free[:len(r.free)-1]
	return q, nil
}

// large is from which length on, in bytes, moving the data of a write is the work. Writes of that
// size that come together are carried out at the same time: the guest has nothing to do meanwhile.
// (With reads it has, and a second processor is better left to it.)
const large = 256 << 10

// inline performs q at once if that takes no waiting; else a worker gets it. It ends u.
func (r *ring) inline(u *blk.Req, q *request) bool {
	s := r.f.s
	if q.Op == virtio.OpWrite && q.N >= large && r.more() {
		s.x.Root.End(u)
		r.f.workers.put(q)
		return false
	}
	u.NoWait = true
	err := s.do(u, &q.Request, r.flags())
	u.NoWait = false
	s.x.Root.End(u)
	if err != nil && (errors.Is(err, blk.ErrWouldBlock) || s.x.Errors.Covers(operation(&q.Request), err)) {
		r.f.workers.put(q)
		return false
	}
	r.finish(q, err, false)
	return true
}

// more tells whether there is another request in the ring.
func (r *ring) more() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	more, err := r.queue.Pending()
	return more && err == nil
}

// flags are those of a write.
func (r *ring) flags() blk.Flags {
	if r.f.s.durable(r.features) {
		return blk.FUA
	}
	return 0
}

// finish ends q; tell: the driver is told at once.
func (r *ring) finish(q *request, err error, tell bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = q.Finish(r.queue, status(&q.Request, err)) // an error is that of the next pop
	r.staged = true
	if tell {
		r.publishLocked()
	}
	r.putBackLocked(q)
}

// forget ends q, of which the driver is not told: it was not performed.
func (r *ring) forget(q *request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	q.Drop(r.queue)
	r.putBackLocked(q)
}

// +checklocks:r.mu
func (r *ring) putBackLocked(q *request) {
	r.free = append(r.free, q)
	if r.queue.InFlight() == 0 {
		r.idle.Broadcast()
	}
}

func (r *ring) publish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publishLocked()
}

// perform performs q, which may wait. Errors of the device are what the export says; where one
// stops it, q is performed again when it goes on.
func (r *ring) perform(q *request) {
	errs := r.f.s.x.Errors
	for {
		if over := errs.Stopped(); over != nil {
			select {
			case <-over:
			case <-r.ctx.Done(): // a ring that is to stop waits for its requests
			}
		}
		resumes := errs.Resumes()
		begun, err := r.attempt(q)
		if !begun {
			r.forget(q)
			return
		}
		action := types.BlockErrorActionReport
		if err != nil {
			action = errs.Decide(operation(&q.Request), err, resumes)
		}
		if action == types.BlockErrorActionStop && !r.stopping.Load() {
			continue
		}
		if action == types.BlockErrorActionIgnore {
			if err = nil; q.Op == virtio.OpRead {
				err = virtio.Guard(func() error { q.Data.Zero(); return nil })
			}
		}
		r.finish(q, err, true)
		return
	}
}

// attempt performs q in one unit of work. It is not begun if the front end has gone.
func (r *ring) attempt(q *request) (begun bool, err error) {
	s := r.f.s
	u, err := export.Begin(r.f.ctx, s.x.Root, s.x.Workers)
	if err != nil {
		return false, err
	}
	defer u.End()
	return true, s.do(u.Req, &q.Request, r.flags())
}

// performSafely is perform; after a panic the request fails, and the front end is dropped.
func (r *ring) performSafely(q *request) {
	defer panics.Catch("a vhost-user request", func(err error) {
		r.f.kill()
		r.finish(q, err, true)
	})
	r.perform(q)
}
