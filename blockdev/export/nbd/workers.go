package nbd

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"qblockd/blockdev/export"
	"qblockd/blockdev/nbdwire"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// job is a request on its way through a worker.
type job struct {
	q    nbdwire.Request
	buf  *blk.Buffer    // payload of a write
	cost int64          // what it counts against Options.InflightBytes
	ctxs []*metaContext // that a block status is asked in
}

var jobPool = sync.Pool{New: func() any { return new(job) }}

// maxWorkers is how many goroutines a connection has for requests that wait; see the package
// comment.
const maxWorkers = 64

// idleTime is after what time without work a worker ends, give or take as much again.
const idleTime = time.Second

// workers serve those requests of a connection that have to wait, in goroutines that stay for a
// while when there is nothing to do: new ones would have to grow their stacks each time. They bound
// what is under way: a request counts from put until its reply is sent.
type workers struct {
	*conn
	timer *time.Timer // calls retire
	// parked: some worker looks after the client while the export is stopped.
	parked atomic.Bool

	mu   sync.Mutex
	room sync.Cond // inflight or bytes went down, with mu
	// requests put and not answered
	inflight int // +checklocks:mu
	// of their data
	bytes int64 // +checklocks:mu
	// goroutines
	running int // +checklocks:mu
	// for the goroutines
	queue []*job // +checklocks:mu
	// those without work; the last one has worked last
	idle []*worker // +checklocks:mu
	// how few of them there were since retire was called
	spare int // +checklocks:mu
	// no more requests come
	over bool // +checklocks:mu
}

// worker is a goroutine of workers.
type worker struct {
	wake chan *job // nil: it is to end
}

// start prepares for the transmission of w.
func (w *workers) start(c *conn) {
	w.conn = c
	w.room.L = &w.mu
	w.timer = panics.AfterFunc("the idle workers of an NBD connection", idleTime, w.retire)
	w.timer.Stop()
}

// newJob makes one; buf becomes its own.
func newJob(q *nbdwire.Request, buf *blk.Buffer, cost int64) *job {
	j := jobPool.Get().(*job)
	j.q, j.buf, j.cost = *q, buf, cost
	return j
}

// free gives back what j holds, and j.
func (j *job) free() {
	blk.PutBuf(j.buf)
	j.buf, j.ctxs = nil, nil
	jobPool.Put(j)
}

// take is put for who serves j without a worker, by answer.
func (w *workers) take(j *job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inflight++
	w.bytes += j.cost
}

// put hands j to a worker.
func (w *workers) put(j *job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inflight++
	w.bytes += j.cost
	if n := len(w.idle); n > 0 {
		k := w.idle[n-1]
		w.idle = w.idle[:n-1]
		w.spare = min(w.spare, n-1)
		k.wake <- j // it has room
		return
	}
	w.queue = append(w.queue, j)
	if w.running < maxWorkers {
		if w.running++; w.running == 1 {
			w.timer.Reset(idleTime)
		}
		k := &worker{wake: make(chan *job, 1)}
		go w.work(k)
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

// fits tells whether n more bytes may be under way.
func (w *workers) fits(n int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fitsLocked(n)
}

// +checklocks:w.mu
func (w *workers) fitsLocked(n int64) bool {
	return w.inflight == 0 || w.inflight < w.srv.opts.Inflight && w.bytes+n <= w.srv.opts.InflightBytes
}

// none tells whether no request is under way.
func (w *workers) none() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inflight == 0
}

// several tells whether more than one request is under way.
func (w *workers) several() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inflight > 1
}

// waitFor waits until n more bytes may be under way.
func (w *workers) waitFor(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.fitsLocked(n) {
		w.room.Wait()
	}
}

// wait waits until all requests are answered, and ends the workers.
func (w *workers) wait() {
	w.timer.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.inflight > 0 {
		w.room.Wait()
	}
	w.over = true
	for _, k := range w.idle {
		k.wake <- nil
	}
	w.idle, w.spare = nil, 0
}

// answered tells that replies were sent to that many requests with that much data.
func (w *workers) answered(count int, bytes int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inflight -= count
	w.bytes -= bytes
	w.room.Broadcast()
}

// next waits for a request for k; for nil the goroutine ends.
func (w *workers) next(k *worker) *job {
	w.mu.Lock()
	if len(w.queue) > 0 {
		j := w.queue[0]
		w.queue = slices.Delete(w.queue, 0, 1)
		w.mu.Unlock()
		return j
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
	defer panics.Catch("an NBD worker", func(error) { w.kill() })
	for j := w.next(k); j != nil; j = w.next(k) {
		w.sender.put(w.answer(j))
	}
}

// answer serves j, which is used up, and makes the reply to be sent.
func (w *workers) answer(j *job) *reply {
	p := w.serveSafely(j)
	// The last reply carries the cost, so that memory counts until it is sent.
	last := p
	for last.next != nil {
		last = last.next
	}
	last.cost = j.cost
	j.free()
	return p
}

// serveSafely is serve; after a panic the request fails, and the connection is dropped.
func (w *workers) serveSafely(j *job) (p *reply) {
	defer panics.Catch("an NBD request", func(err error) {
		w.kill()
		j.buf = nil // the device may still use it
		p = w.failure(&j.q, nbdwire.Errno(err), msgInternal)
	})
	return w.serve(j)
}

// serve performs j and makes its reply. Errors of the device are what the export says; where one
// stops it, j is performed again when it goes on.
func (w *workers) serve(j *job) *reply {
	errs := w.exp.spec.Errors
	for {
		if over := errs.Stopped(); over != nil {
			w.park(over)
		}
		resumes := errs.Resumes()
		p := w.attempt(j)
		if p.fault == nil {
			return p
		}
		switch errs.Decide(operation(&j.q), p.fault, resumes) {
		case types.BlockErrorActionReport:
			return p
		case types.BlockErrorActionIgnore:
			drop(p)
			return w.success(&j.q)
		}
		drop(p)
	}
}

// operation is what q counts as among errors.
func operation(q *nbdwire.Request) types.IoOperationType {
	if q.Cmd == nbdwire.CmdRead {
		return types.IoOperationTypeRead
	}
	return types.IoOperationTypeWrite
}

// goneAfter is how often a stopped connection is looked at.
const goneAfter = 100 * time.Millisecond

// park waits while the export is stopped, with no pass and no worker of a group, until the
// connection ends. It may be that nothing is read from the socket meanwhile, so it looks itself
// whether the client has gone: then nobody waits for replies, and the connection ends.
func (w *workers) park(over <-chan struct{}) {
	var look <-chan time.Time
	if w.parked.CompareAndSwap(false, true) {
		defer w.parked.Store(false)
		t := time.NewTicker(goneAfter)
		defer t.Stop()
		look = t.C
	}
	for {
		select {
		case <-over:
			return
		case <-w.ctx.Done():
			return
		case <-look:
			if w.hungUp() {
				w.srv.log.Info("NBD client gone while an error has its export stopped", "export", w.exp.spec.Name)
				w.kill()
			}
		}
	}
}

// attempt performs j, in one unit of work unless it is about very much.
func (w *workers) attempt(j *job) *reply {
	if j.q.Len > pieceMax(j.q.Cmd) {
		return w.inPieces(j)
	}
	u, err := w.begin()
	if err != nil {
		return w.failure(&j.q, nbdwire.Errno(err), msgUnstarted)
	}
	defer u.End()
	return w.perform(u.Req, j)
}

// pieceMax is how many bytes one unit of work may be about, where the request has no data: a
// device that has to write zeroes may be long about it, and whoever drains it waits for the unit.
func pieceMax(cmd uint16) uint64 {
	switch cmd {
	case nbdwire.CmdTrim, nbdwire.CmdWriteZeroes:
		return 1 << 30
	case nbdwire.CmdCache:
		return nbdwire.MaxPayload
	}
	return math.MaxUint64
}

// inPieces performs j in as many units of work as it takes. What is left of it ends with the
// connection.
func (w *workers) inPieces(j *job) *reply {
	part, end := j.q, j.q.Off+j.q.Len
	for ; part.Off < end; part.Off += part.Len {
		part.Len = min(end-part.Off, pieceMax(part.Cmd))
		u, err := w.begin()
		if err != nil {
			return w.failure(&j.q, nbdwire.Errno(err), msgUnstarted)
		}
		msg, err := w.doControl(u.Req, &part)
		u.End()
		if err != nil {
			return w.fault(&j.q, err, msg)
		}
	}
	return w.done(&j.q)
}

// begin begins a unit of work, unless the client has gone.
func (w *workers) begin() (export.Unit, error) {
	if w.dead.Load() {
		return export.Unit{}, blk.ErrClosed
	}
	return export.Begin(w.ctx, w.dev, w.exp.group)
}
