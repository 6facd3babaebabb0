// Package copy is the one copy engine of the jobs: it walks a range, asks what is to be done with
// each extent, and lets a few workers do it, under the job's pause points, speed limit and error
// policies.
//
//	walk: Checkpoint/Throttle -> Look -> skip, or hand over --> workers: gate -> Copy -> gate
//	        ^                                                      |
//	        `------------ failed units, to be tried again <--------'
//
// With one worker the walker copies by itself.
//
// The walker holds no gate pass while it waits, and every unit passes the gate on its own, so a
// drain waits for the units in flight only.
//
// Workers end in any order, but what the job's client sees is as if one did everything, from the
// first byte to the last: a unit counts as done when all before it do (order.go), and of several
// that fail the first one is reported. So progress at a failing byte is the same each time.
package copy

import (
	"cmp"
	"context"
	"errors"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// Action is what an extent needs.
type Action uint8

const (
	Skip Action = iota // nothing
	Zero               // zeroes at the target
	Data               // the source's data at the target
)

// Extent is the first N bytes of what was asked about.
type Extent struct {
	N      int64
	Action Action
}

// Gate is where units of work begin and end; *graph.Root is one.
type Gate interface {
	Begin() (*blk.Req, error)
	End(r *blk.Req)
}

// RootGate is the gate of root for a job whose context is ctx.
func RootGate(ctx context.Context, root *graph.Root) Gate { return rootGate{root, ctx} }

type rootGate struct {
	*graph.Root
	ctx context.Context
}

// Begin implements Gate.
func (g rootGate) Begin() (*blk.Req, error) { return g.Root.Begin(g.ctx) }

// Task describes a copy. Its functions run in several goroutines, each with a unit of work of its
// own.
type Task struct {
	Gate Gate
	// Size is the length of the range in bytes, Chunk the largest extent that is copied at once,
	// Workers how many at the same time.
	Size, Chunk int64
	// LongZeroes: extents of zeroes are handed over as long as Look says, also beyond what it was
	// asked about.
	LongZeroes bool
	Workers    int
	// Guests is set whenever a request of a guest passes; nil: nobody sees them. While there are
	// any, one extent at a time is copied: several workers take the processors from whoever serves
	// guests.
	Guests *atomic.Bool
	// Piece is how many bytes of an extent of data are copied at once while there are guests, who
	// wait for a processor no longer than that takes; 0: all of it. Where Piece is set, Copy must
	// do nothing for what is copied already: after a failure the whole extent is handed over again.
	Piece int64
	// Look tells what [off, off+n) needs, or at least its beginning, or more. n grows while nothing
	// is to do, so that what is empty is passed over in a few steps.
	Look func(r *blk.Req, off, n int64) (Extent, error)
	// Copy does it, and tells how many bytes that counts as, also of what was done before it
	// failed. It takes the conflict lock that keeps guest writes out, as long as it needs.
	Copy func(r *blk.Req, off int64, e Extent) (n int64, err error)
	// Operation and Policy: what a failure counts as, and what becomes of it.
	Operation types.IoOperationType
	Policy    types.BlockdevOnError
	// Side tells them of an error, for tasks where they depend on the side that fails; nil: they
	// are always the same.
	Side func(err error) (types.IoOperationType, types.BlockdevOnError)
	// RetryIgnored: errors that the policy ignores are tried again, and again, until they are gone.
	// What goes on failing is tried ten times a second.
	RetryIgnored bool
	// Uncounted: what is skipped does not count as done.
	Uncounted bool
}

// remoteWorkers is how many extents are copied at the same time over a network: as many as QEMU's
// mirror has under way.
const remoteWorkers = 16

// SetWorkers has as many extents copied at the same time as a copy between nodes needs: few, or,
// where the answer to one takes its way over a network, many, also beside guests: they do little
// but wait.
func (t *Task) SetWorkers(few int, nodes ...*graph.Node) {
	t.Workers = few
	if slices.ContainsFunc(nodes, graph.Now.Remote) {
		t.Workers, t.Guests = max(few, remoteWorkers), nil
	}
}

// Policies are what becomes of errors of reading and of writing.
type Policies struct{ Read, Write types.BlockdevOnError }

// PoliciesOf are those that arguments of a job give.
func PoliciesOf(read, write *types.BlockdevOnError) Policies {
	return Policies{types.Or(read, types.BlockdevOnErrorReport), types.Or(write, types.BlockdevOnErrorReport)}
}

// Side is a Task.Side for errors of graph.Copy.
func (p Policies) Side(err error) (types.IoOperationType, types.BlockdevOnError) {
	var c *graph.CopyError
	if errors.As(err, &c) && c.Write {
		return types.IoOperationTypeWrite, p.Write
	}
	return types.IoOperationTypeRead, p.Read
}

// All is what Task.Copy returns where n bytes are copied as a whole.
func All(n int64, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return n, nil
}

// guestsStay is how long guests are taken to be there after a request of one.
const guestsStay = 20 * time.Millisecond

// What fails again and again although the policy ignores it is tried after firstRetry, then after
// twice as long each time, mostRetry at most: as fast as it fails would take a processor, and
// clients would get nothing but its events.
const (
	firstRetry = time.Millisecond
	mostRetry  = 100 * time.Millisecond
)

// unit is a part of the range that is on its way; one that is to be skipped still has to be looked
// at.
type unit struct {
	off int64
	ext Extent
	err error
	n   int64 // what it counts as
	// over: it is done, and waits for those before it; entered: it is in the order.
	over, entered bool
}

type engine struct {
	Task
	h        *jobs.Handle
	work     chan *unit
	done     chan *unit
	workers  int // started
	inFlight int
	guests   time.Time // when one was last seen
	threaded bool      // the walker has a thread of its own
	order    order
	retry    []*unit // by offset
	ask      int64   // how much is looked at in one step
	failure  error   // the first one that was not tried again
	stop     bool    // and it ends the job
	held     *unit   // the failure that is being dealt with; those behind it are tried again after it
	ignored  int     // failures to be tried again since something was done
}

// Run does the task and returns the first error that a policy reported, or ignored at the end, or
// jobs.ErrCancelled. It blocks until no unit is in flight any more.
func Run(h *jobs.Handle, t Task) error {
	e := &engine{Task: t, h: h, ask: t.Chunk, work: make(chan *unit), done: make(chan *unit, t.Workers)}
	defer close(e.work) // the workers end
	defer e.shareThread()
	err := e.walk()
	e.settle()
	if err != nil {
		return err
	}
	return e.failure
}

func (e *engine) walk() error {
	off := int64(0)
	for !e.stop {
		e.drainDone()
		if off >= e.Size && len(e.retry) == 0 {
			// What is done is done: nothing waits for the speed limit any more.
			if e.settle(); len(e.retry) == 0 {
				return e.h.Checkpoint() // a pause does hold up the end
			}
			continue
		}
		if e.h.MustWait() {
			// Nothing is in flight while the job waits, and its progress is told in full.
			e.settle()
		}
		if err := e.h.Throttle(0); err != nil {
			return err
		}
		switch {
		case e.stop:
		case len(e.retry) > 0:
			u := e.retry[0]
			e.retry = e.retry[1:]
			if u.ext.Action != Skip {
				// Alone: what fails again stops the job where it stood.
				e.hand(u)
				e.settle()
				continue
			}
			// Looking failed; do that again, and what it does not cover is next.
			e.order.leave(u)
			if n := e.look(u.off, u.ext.N); n < u.ext.N {
				e.again(&unit{off: u.off + n, ext: Extent{N: u.ext.N - n}})
			}
		default:
			off += e.look(off, min(e.ask, e.Size-off))
		}
	}
	return nil
}

// look classifies the beginning of [off, off+n), has it done, and returns its length; 0: less is to
// be looked at.
func (e *engine) look(off, n int64) int64 {
	e.h.Yield()
	var ext Extent
	err := e.unit("looking for what to copy", func(r *blk.Req) (err error) {
		if ext, err = e.Look(r, off, n); err == nil && ext.N <= 0 {
			err = blk.ErrOutOfRange // it would be asked for ever
		}
		return err
	})
	if err != nil {
		if e.ask = e.Chunk; n > e.Chunk {
			return 0 // what is said to have failed, and may be passed over, is not more than a copy
		}
		e.failed(&unit{off: off, ext: Extent{N: n}, err: err})
		return n
	}
	if ext.Action == Skip {
		if e.ask = e.Chunk; ext.N >= n {
			e.ask = lookFurther(n, e.Size)
		}
		if !e.Uncounted {
			e.order.skipped(e.h, off, ext.N)
		}
		return ext.N
	}
	if e.ask = e.Chunk; ext.Action == Data || !e.LongZeroes {
		ext.N = min(ext.N, e.Chunk)
	}
	e.hand(&unit{off: off, ext: ext})
	return ext.N
}

// lookFurther is how much to look at after nothing was to do in n.
func lookFurther(n, size int64) int64 {
	const factor = 64
	if n > size/factor {
		return size
	}
	return n * factor
}

// hand gives a unit to a worker, waiting for one to be free, or does it itself where one at a time
// is copied.
func (e *engine) hand(u *unit) {
	e.order.enter(u)
	limit := e.Workers
	if e.guestsNear() {
		limit = 1
	}
	for e.inFlight >= limit {
		e.collect(<-e.done)
	}
	if e.stop {
		return
	}
	// Counted before it is done: what is in flight has passed the speed limit.
	e.h.Count(u.ext.N)
	e.inFlight++
	if limit == 1 {
		e.ownThread()
		e.doAlone(u)
		e.collect(u)
		return
	}
	e.shareThread()
	if e.workers < e.inFlight {
		e.workers++
		panics.Go("a worker of a copy", e.worker, nil)
	}
	e.work <- u
}

// ownThread gives the walker a thread of its own. On a thread that has just answered a guest its
// copies would hold that guest up: the kernel lets whom it wakes wait on that processor until the
// call that copies is over.
func (e *engine) ownThread() {
	if !e.threaded {
		e.threaded = true
		runtime.LockOSThread()
	}
}

func (e *engine) shareThread() {
	if e.threaded {
		e.threaded = false
		runtime.UnlockOSThread()
	}
}

// guestsNear tells whether a request of a guest has passed lately.
func (e *engine) guestsNear() bool {
	if e.Guests == nil {
		return false
	}
	now := time.Now()
	if e.Guests.Load() {
		e.Guests.Store(false)
		e.guests = now
	}
	return now.Sub(e.guests) < guestsStay
}

// unit calls f in a unit of work. A panic is an error of it.
func (e *engine) unit(what string, f func(r *blk.Req) error) (err error) {
	r, err := e.Gate.Begin()
	if err != nil {
		return err
	}
	defer panics.Into(what, &err)
	defer e.Gate.End(r)
	return f(r)
}

func (e *engine) worker() {
	for u := range e.work {
		e.do(u)
		e.done <- u
	}
}

// do copies u.
func (e *engine) do(u *unit) {
	u.err = e.unit("copying", func(r *blk.Req) (err error) {
		n, err := e.Copy(r, u.off, u.ext)
		u.n += n
		return err
	})
}

// doAlone copies u with nobody beside the walker but guests.
func (e *engine) doAlone(u *unit) {
	if e.Guests == nil {
		e.do(u)
		return
	}
	piece := u.ext.N
	if e.Piece > 0 && u.ext.Action == Data {
		piece = e.Piece
	}
	for off := int64(0); off < u.ext.N && u.err == nil; off += piece {
		part := &unit{off: u.off + off, ext: Extent{N: min(piece, u.ext.N-off), Action: u.ext.Action}}
		e.do(part)
		u.n, u.err = u.n+part.n, part.err
		// Whoever waits for this processor is a guest, mostly, and would wait until the kernel's
		// next tick.
		_, _, _ = syscall.Syscall(syscall.SYS_SCHED_YIELD, 0, 0, 0)
	}
}

func (e *engine) drainDone() {
	for e.inFlight > 0 {
		select {
		case u := <-e.done:
			e.collect(u)
		default:
			return
		}
	}
}

// settle waits for the units in flight: a paused job does nothing.
func (e *engine) settle() {
	for e.inFlight > 0 {
		e.collect(<-e.done)
	}
}

func (e *engine) collect(u *unit) {
	e.inFlight--
	if u.err != nil {
		e.failed(u)
		return
	}
	e.ignored = 0
	e.order.done(e.h, u)
}

// again lets a unit be tried again, those that come first before others.
func (e *engine) again(u *unit) {
	e.order.enter(u)
	u.err = nil
	at, _ := slices.BinarySearchFunc(e.retry, u.off, func(v *unit, off int64) int { return cmp.Compare(v.off, off) })
	e.retry = slices.Insert(e.retry, at, u)
}

// failed applies the error policy. Of several units that fail at the same time the first one of the
// range is reported when that ends or pauses the job: to its client it does one thing after the
// other.
func (e *engine) failed(u *unit) {
	var internal *panics.Error
	switch {
	case e.stop:
		return
	case e.h.Context().Err() != nil:
		e.stop, e.failure = true, jobs.ErrCancelled // which is no error of the storage
		return
	case errors.As(u.err, &internal):
		e.stop, e.failure = true, u.err // whatever the policy: it would happen again
		return
	case e.held != nil:
		if u.off < e.held.off {
			u, e.held = e.held, u
		}
		e.again(u)
		return
	}
	e.order.enter(u)
	// What else is in flight comes first: when the client hears of the error, the job is about to
	// do what the policy says.
	e.held = u
	e.settle()
	u, e.held = e.held, nil
	if e.stop {
		return
	}
	op, policy := e.Operation, e.Policy
	if e.Side != nil {
		op, policy = e.Side(u.err)
	}
	action, err := e.h.OnErrorIdle(op, policy, u.err)
	if err != nil {
		e.stop, e.failure = true, err
		return
	}
	switch action {
	case types.BlockErrorActionStop:
		e.again(u)
		return
	case types.BlockErrorActionIgnore:
		if e.RetryIgnored {
			e.again(u)
			e.pace()
			return
		}
		u.n = u.ext.N
		e.order.done(e.h, u)
	case types.BlockErrorActionReport:
		e.stop = true
	}
	if e.failure == nil {
		e.failure = u.err
	}
}

// pace waits before what has failed more than once is tried again. Nothing is in flight.
func (e *engine) pace() {
	if e.ignored++; e.ignored == 1 {
		return
	}
	d := min(firstRetry<<min(e.ignored-2, 16), mostRetry)
	if err := e.h.Sleep(d); err != nil {
		e.stop, e.failure = true, err
	}
}
