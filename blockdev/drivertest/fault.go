package drivertest

import (
	"context"
	"sync"
	"sync/atomic"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// Op is a set of driver calls.
type Op uint16

// The calls that can fail.
const (
	OpRead Op = 1 << iota
	OpWrite
	OpZero
	OpDiscard
	OpFlush
	OpStatus
	OpMap
	OpCopy
	OpResize

	// OpAny are all that touch the medium: not status and map.
	OpAny = OpRead | OpWrite | OpZero | OpDiscard | OpFlush | OpCopy | OpResize
	// OpModify are those that change it or make it durable.
	OpModify = OpAny &^ OpRead
)

// Rule makes calls fail.
type Rule struct {
	// Ops that the rule looks at; 0 means OpAny.
	Ops Op
	// Off, N: only calls that overlap [Off, Off+N); N 0: all.
	Off, N int64
	// Skip lets so many matching calls pass first.
	Skip int
	// Count is how many fail then; 0: all.
	Count int
	// Err is the error; nil means EIO.
	Err error
	// AfterEffect: the call takes effect and reports failure all the same.
	AfterEffect bool
}

// Fault is a driver that passes everything on to another one, save what its rules let fail.
type Fault struct {
	inner graph.Driver

	calls, failed atomic.Int64
	armed         atomic.Bool // there are rules

	mu    sync.Mutex
	rules []*Rule
	gate  func(op Op, off, n int64)
}

// NewFault wraps d.
func NewFault(d graph.Driver) *Fault { return &Fault{inner: d} }

// Inject adds a rule; the first rule that matches a call decides.
func (f *Fault) Inject(r Rule) {
	if r.Ops == 0 {
		r.Ops = OpAny
	}
	if r.Err == nil {
		r.Err = syscall.EIO
	}
	f.mu.Lock()
	f.rules = append(f.rules, &r)
	f.mu.Unlock()
	f.armed.Store(true)
}

// FailAt lets the i-th call from now (0: the next) among OpAny fail with err, once.
func (f *Fault) FailAt(i int, err error) { f.Inject(Rule{Skip: i, Count: 1, Err: err}) }

// Clear removes all rules.
func (f *Fault) Clear() {
	f.mu.Lock()
	f.rules, f.gate = nil, nil
	f.mu.Unlock()
	f.armed.Store(false)
}

// Hook sets a function that each call enters first, with no lock held; it may block, to hold a
// request in flight.
func (f *Fault) Hook(h func(op Op, off, n int64)) {
	f.mu.Lock()
	f.gate = h
	f.mu.Unlock()
	f.armed.Store(true)
}

// Calls is the number of calls among OpAny so far; Failed how many calls failed by a rule.
func (f *Fault) Calls() int64  { return f.calls.Load() }
func (f *Fault) Failed() int64 { return f.failed.Load() }

// verdict is what becomes of a call: an error to return, before or after the effect.
func (f *Fault) verdict(op Op, off, n int64) (before, after error) {
	if op&OpAny != 0 {
		f.calls.Add(1)
	}
	if !f.armed.Load() {
		return nil, nil
	}
	f.mu.Lock()
	h := f.gate
	f.mu.Unlock()
	if h != nil {
		h(op, off, n)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.rules {
		if r.Ops&op == 0 || r.N > 0 && n > 0 && !blk.Overlap(r.Off, r.N, off, n) {
			continue
		}
		if r.Skip > 0 {
			r.Skip--
			continue
		}
		if r.Count < 0 {
			continue
		}
		if r.Count > 0 {
			if r.Count--; r.Count == 0 {
				r.Count = -1 // used up
			}
		}
		f.failed.Add(1)
		if r.AfterEffect {
			return nil, r.Err
		}
		return r.Err, nil
	}
	return nil, nil
}

// do runs one call.
func (f *Fault) do(op Op, off, n int64, call func() error) error {
	before, after := f.verdict(op, off, n)
	if before != nil {
		return before
	}
	if err := call(); err != nil {
		return err
	}
	return after
}

// Caps implements graph.Driver.
func (f *Fault) Caps() graph.Caps { return f.inner.Caps() }

// Size implements graph.Driver.
func (f *Fault) Size() int64 { return f.inner.Size() }

// Close implements graph.Driver.
func (f *Fault) Close() error { return f.inner.Close() }

// ReadAt implements graph.Driver.
func (f *Fault) ReadAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	return f.do(OpRead, off, v.Len(), func() error { return f.inner.ReadAt(r, v, off, fl) })
}

// WriteAt implements graph.Writer.
func (f *Fault) WriteAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	w, ok := f.inner.(graph.Writer)
	if !ok {
		return blk.ErrReadOnly
	}
	return f.do(OpWrite, off, v.Len(), func() error { return w.WriteAt(r, v, off, fl) })
}

// Zero implements graph.Zeroer.
func (f *Fault) Zero(r *blk.Req, off, n int64, fl blk.Flags) error {
	z, ok := f.inner.(graph.Zeroer)
	if !ok {
		return blk.ErrNotSupported
	}
	return f.do(OpZero, off, n, func() error { return z.Zero(r, off, n, fl) })
}

// Flush implements graph.Flusher.
func (f *Fault) Flush(r *blk.Req) error {
	return f.do(OpFlush, 0, 0, func() error {
		if fl, ok := f.inner.(graph.Flusher); ok {
			return fl.Flush(r)
		}
		return nil
	})
}

// Discard implements graph.Discarder.
func (f *Fault) Discard(r *blk.Req, off, n int64) error {
	d, ok := f.inner.(graph.Discarder)
	if !ok {
		return nil
	}
	return f.do(OpDiscard, off, n, func() error { return d.Discard(r, off, n) })
}

// Status implements graph.BlockStatuser.
func (f *Fault) Status(r *blk.Req, off, n int64) (x blk.Extent, err error) {
	err = f.do(OpStatus, off, n, func() (err error) {
		x = blk.Extent{N: n, Data: true, OffValid: true, MapOff: off}
		if s, ok := f.inner.(graph.BlockStatuser); ok {
			x, err = s.Status(r, off, n)
		}
		return err
	})
	return x, err
}

// Map implements graph.Mapper.
func (f *Fault) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	p, ok := f.inner.(graph.Mapper)
	if !ok {
		return nil
	}
	return f.do(OpMap, off, n, func() error { return p.Map(r, off, n, m) })
}

// CopyFrom implements graph.CopyRanger.
func (f *Fault) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, fl blk.Flags) error {
	c, ok := f.inner.(graph.CopyRanger)
	if !ok {
		return blk.ErrNotSupported
	}
	return f.do(OpCopy, off, blk.Total(src), func() error { return c.CopyFrom(r, off, src, fl) })
}

// Resize implements graph.Resizer.
func (f *Fault) Resize(ctx context.Context, size int64, p blk.Prealloc) error {
	z, ok := f.inner.(graph.Resizer)
	if !ok {
		return blk.ErrNotSupported
	}
	return f.do(OpResize, 0, 0, func() error { return z.Resize(ctx, size, p) })
}

// ActualSize implements graph.Sizer.
func (f *Fault) ActualSize() (int64, error) {
	if s, ok := f.inner.(graph.Sizer); ok {
		return s.ActualSize()
	}
	return f.inner.Size(), nil
}
