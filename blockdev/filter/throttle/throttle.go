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

func (d *filter) file() *graph.Edge { return d.Below() }

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

// leave ends what enter began; a request that would have blocked below was none.
func (d *filter) leave(p pass, dir direction, n int64, err error) {
	if err != nil && p.round != 0 && errors.Is(err, blk.ErrWouldBlock) {
		d.m.Load().refund(p, dir, n)
	}
}

// ReadAt implements graph.Driver.
func (d *filter) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	p, err := d.m.Load().enter(r, reading, n)
	if err != nil {
		return err
	}
	err = d.file().ReadAt(r, v, off, f)
	d.leave(p, reading, n, err)
	return err
}

// WriteAt implements graph.Writer.
func (d *filter) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	p, err := d.m.Load().enter(r, writing, n)
	if err != nil {
		return err
	}
	err = d.file().WriteAt(r, v, off, f)
	d.leave(p, writing, n, err)
	return err
}

// Zero implements graph.Zeroer. Zeroes count like data.
func (d *filter) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	p, err := d.m.Load().enter(r, writing, n)
	if err != nil {
		return err
	}
	err = d.file().Zero(r, off, n, f)
	if f&blk.NoFallback != 0 && errors.Is(err, blk.ErrNotSupported) {
		d.m.Load().refund(p, writing, n) // the caller will write
		return err
	}
	d.leave(p, writing, n, err)
	return err
}

// Discard implements graph.Discarder. What is discarded counts as written.
func (d *filter) Discard(r *blk.Req, off, n int64) error {
	p, err := d.m.Load().enter(r, writing, n)
	if err != nil {
		return err
	}
	err = d.file().Discard(r, off, n)
	d.leave(p, writing, n, err)
	return err
}

// Map implements graph.Mapper. What is mapped counts as read; what is not is read otherwise.
func (d *filter) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	p, err := d.m.Load().enter(r, reading, n)
	if err != nil {
		return err
	}
	before := m.N()
	err = d.file().Map(r, off, n, m)
	if p.round == 0 {
		return err
	}
	switch got := m.N() - before; {
	case err != nil || got == 0:
		d.m.Load().refund(p, reading, n)
	case got < n:
		d.m.Load().adjust(p, reading, n, got)
	}
	return err
}

// CopyFrom implements graph.CopyRanger. What is copied counts as written.
func (d *filter) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	var n int64
	for i := range src {
		n += src[i].N
	}
	p, err := d.m.Load().enter(r, writing, n)
	if err != nil {
		return err
	}
	if err = d.file().CopyFrom(r, off, src, f); err != nil {
		d.m.Load().refund(p, writing, n) // most failures are followed by a write
	}
	return err
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
