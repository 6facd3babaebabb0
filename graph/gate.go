package graph

import (
	"context"

	"qblockd/graph/blk"
)

// gateClosed is the bit of Root.gate that refuses new units; the bits below count those in flight.
const gateClosed = int64(1) << 62

// Begin starts a unit of work: it waits while the root is drained. Errors: the context's,
// blk.ErrClosed when the root has gone. End must follow. Not for use inside a unit of work.
func (r *Root) Begin(ctx context.Context) (*blk.Req, error) {
	for {
		if q := r.TryBegin(); q != nil {
			return q, nil
		}
		open, err := r.waitOpen()
		if err != nil {
			return nil, err
		}
		if err := await(ctx, open); err != nil {
			return nil, err
		}
	}
}

// TryBegin is Begin for those who must not wait: nil when the gate is closed.
func (r *Root) TryBegin() *blk.Req {
	if r.gate.Add(1)&gateClosed != 0 {
		r.leave()
		return nil
	}
	q, _ := r.pool.Get().(*blk.Req)
	if q == nil {
		q = &blk.Req{Pass: r}
	}
	q.Ctx, q.Job, q.NoWait = r.spec.Ctx, r.spec.Job, false
	return q
}

// Beside begins another unit of work of the root that r belongs to, for what may outlast r. It is
// nil while the gate is closed, as a drain waits for the units there are, and for requests of no
// root.
func Beside(r *blk.Req) (q *blk.Req, end func()) {
	root, ok := r.Pass.(*Root)
	if !ok {
		return nil, nil
	}
	if q = root.TryBegin(); q == nil {
		return nil, nil
	}
	return q, func() { root.End(q) }
}

// End ends the unit of work; q must not be used any more.
func (r *Root) End(q *blk.Req) {
	if q.Pass != r {
		panic("graph: Root.End: request of another root")
	}
	q.Ctx = nil
	r.pool.Put(q)
	r.leave()
}

// InFlight is the number of units of work under way.
func (r *Root) InFlight() int64 { return r.gate.Load() &^ gateClosed }

// leave takes one from the gate's count and tells a drain when it was the last.
func (r *Root) leave() {
	if r.gate.Add(-1) != gateClosed {
		return
	}
	r.wait.Lock()
	if r.gate.Load() == gateClosed {
		r.idle.send()
	}
	r.wait.Unlock()
}

// waitOpen is closed when the gate opens or the root goes.
func (r *Root) waitOpen() (<-chan struct{}, error) {
	r.wait.Lock()
	defer r.wait.Unlock()
	if r.gone {
		return nil, blk.ErrClosed
	}
	if r.gate.Load()&gateClosed == 0 {
		return closedCh, nil
	}
	return r.open.wait(), nil
}

// waitIdle is closed when no unit is in flight or the gate opens; nil if one is so already.
// The gate of a root that is being waited for opens when another transaction moves it away
// from what is drained; its units were over then, and later ones go elsewhere.
func (r *Root) waitIdle() <-chan struct{} {
	r.wait.Lock()
	defer r.wait.Unlock()
	if s := r.gate.Load(); s == gateClosed || s&gateClosed == 0 {
		return nil
	}
	return r.idle.wait()
}

// closeGate refuses new units. It does not wait for those in flight.
func (r *Root) closeGate() { r.gate.Or(gateClosed) }

// openGate admits units again, unless the root has gone.
func (r *Root) openGate() {
	r.wait.Lock()
	if !r.gone {
		r.gate.And(^gateClosed)
		r.idle.send()
	}
	r.open.send()
	r.wait.Unlock()
}

// shut closes the gate for good.
func (r *Root) shut() {
	r.wait.Lock()
	r.gone = true
	r.gate.Or(gateClosed)
	r.open.send()
	r.wait.Unlock()
}

var closedCh = func() chan struct{} { c := make(chan struct{}); close(c); return c }()
