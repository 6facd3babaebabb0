// Package throttle is the filter throttle and the groups whose limits it keeps to: requests pass,
// but no faster than the group allows.
//
// A limit is a leaky bucket, as in QEMU: what passes fills it, time empties it, and while
// it is too full requests wait. Flushes and questions about allocation are not limited.
//
// # Waiting
//
// A request waits in the filter, inside its unit of work: what it amounts to is known nowhere else,
// as formats above make several requests of one. So that nobody waits for a limit through a gate,
// the filter is a graph.Drainer: while a drain waits for units that reach it, whatever waits here
// goes on at once, counted. What it goes beyond the limits is paid for by those that come later. A
// unit of work that must not wait is told blk.ErrWouldBlock, and nothing is counted.
//
// Locks: filter.mu > Group.mu, both held for moments only.
package throttle

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

type filter struct {
	graph.Passthrough
	objects driver.Objects
	m       atomic.Pointer[Member] // changed while no request is here

	mu sync.Mutex // holds m still for DrainBegin and DrainEnd
	// between the two
	drain bool // +checklocks:mu
}

func open(o *driver.Opening, u *types.BlockdevOptionsThrottle) (graph.Driver, error) {
	g, _ := driver.Object[*Group](o.Objects, u.ThrottleGroup)
	m, err := join(g, u.ThrottleGroup)
	if err != nil {
		return nil, err
	}
	d := &filter{Passthrough: graph.Through(o.Node), objects: o.Objects}
	d.m.Store(m)
	return d, nil
}

func join(g *Group, name string) (*Member, error) {
	if g != nil {
		if m := g.Join(); m != nil {
			return m, nil
		}
	}
	return nil, fmt.Errorf("Throttle group '%s' does not exist", name)
}

// reopen: the filter may go to another group.
func reopen(open graph.Driver, u *types.BlockdevOptionsThrottle, _ *graph.Options) (graph.Participant, error) {
	d, name := open.(*filter), u.ThrottleGroup
	switch g, _ := driver.Object[*Group](d.objects, name); g {
	case nil:
		return nil, fmt.Errorf("Throttle group '%s' does not exist", name)
	case d.m.Load().g:
		return nil, nil
	default:
		return &move{d: d, to: g, name: name}, nil
	}
}

// move takes the filter to another group within a transaction.
type move struct {
	d    *filter
	to   *Group
	name string
	m    *Member // once it is prepared
}

// Prepare implements graph.Participant.
func (t *move) Prepare(context.Context) (err error) {
	t.m, err = join(t.to, t.name)
	return err
}

// Commit implements graph.Participant.
func (t *move) Commit() {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	if t.d.drain {
		t.m.Open()
	}
	t.d.m.Swap(t.m).Leave()
}

// Abort implements graph.Participant.
func (t *move) Abort() {
	if t.m != nil {
		t.m.Leave()
	}
}

// Caps implements graph.Driver. The filter is transparent, as it counts what is mapped and copied
// itself.
func (d *filter) Caps() graph.Caps {
	c := d.Passthrough.Caps()
	c.WriteFlags |= blk.Compressed // whether or not the node below takes it, as in QEMU
	c.Transparent = true
	return c
}

// Close implements graph.Driver.
func (d *filter) Close() error {
	d.m.Load().Leave()
	return nil
}

// limited does something that moves n bytes when the limits allow it. What was not done after all,
// as it would have blocked, is not counted, nor is what undone says.
func (d *filter) limited(
	r *blk.Req, dir direction, n int64, do func() error, undone func(error) bool,
) error {
	m := d.m.Load()
	p, err := m.enter(r, dir, n)
	if err != nil {
		return err
	}
	if err = do(); err != nil && (errors.Is(err, blk.ErrWouldBlock) || undone != nil && undone(err)) {
		m.adjust(p, dir, n, 0)
	}
	return err
}

// ReadAt implements graph.Driver.
func (d *filter) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.limited(r, reading, v.Len(), func() error { return d.Below().ReadAt(r, v, off, f) }, nil)
}

// WriteAt implements graph.Writer.
func (d *filter) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.limited(r, writing, v.Len(), func() error { return d.Below().WriteAt(r, v, off, f) }, nil)
}

// Zero implements graph.Zeroer. Zeroes count like data.
func (d *filter) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return d.limited(r, writing, n, func() error { return d.Below().Zero(r, off, n, f) }, func(err error) bool {
		return f&blk.NoFallback != 0 && errors.Is(err, blk.ErrNotSupported) // the caller will write
	})
}

// Discard implements graph.Discarder. What is discarded counts as written.
func (d *filter) Discard(r *blk.Req, off, n int64) error {
	return d.limited(r, writing, n, func() error { return d.Below().Discard(r, off, n) }, nil)
}

// Map implements graph.Mapper. What is mapped counts as read; what is not is read otherwise.
func (d *filter) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	member := d.m.Load()
	p, err := member.enter(r, reading, n)
	if err != nil {
		return err
	}
	before := m.N()
	err = d.Below().Map(r, off, n, m)
	got := m.N() - before
	if err != nil {
		got = 0
	}
	member.adjust(p, reading, n, got)
	return err
}

// CopyFrom implements graph.CopyRanger. What is copied counts as written.
func (d *filter) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	return d.limited(r, writing, blk.Total(src), func() error { return d.Below().CopyFrom(r, off, src, f) },
		func(error) bool { return true }) // most failures are followed by a write
}

// DrainBegin implements graph.Drainer.
func (d *filter) DrainBegin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drain = true
	d.m.Load().Open()
}

// Quiet implements graph.Drainer: nothing waits between DrainBegin and DrainEnd.
func (d *filter) Quiet() bool { return true }

// DrainEnd implements graph.Drainer.
func (d *filter) DrainEnd() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drain = false
	d.m.Load().Shut()
}
