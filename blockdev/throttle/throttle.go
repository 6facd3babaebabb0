// Package throttle is the filter throttle and the groups whose limits it keeps to: requests pass, but no faster than the group allows.
//
// A limit is a leaky bucket, as in the reference: what passes fills it, time empties it, and while it is too full requests wait.
// Flushes and questions about allocation are not limited.
//
// # Waiting
//
// A request waits in the filter, inside its unit of work: what it amounts to is known nowhere else, as formats above make several
// requests of one. So that nobody waits for a limit through a gate, the filter is a graph.Drainer: while a drain waits for units that
// reach it, whatever waits here goes on at once, counted. What it goes beyond the limits is paid for by those that come later. A unit
// of work that must not wait is told blk.ErrWouldBlock, and nothing is counted.
//
// Locks: Group.mu, a leaf, held for moments only.
package throttle

import (
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

type driver struct {
	graph.Passthrough
	m *Member
}

// Opener makes the function that opens the filter; find finds a group by its name, nil if there is none. The child is called "file".
func Opener(find func(name string) *Group) graph.OpenFunc {
	return func(o *graph.Opening) (graph.Driver, error) {
		name := o.Options.(*types.BlockdevOptionsThrottle).ThrottleGroup
		if g := find(name); g != nil {
			if m := g.Join(); m != nil {
				return &driver{graph.Passthrough{Node: o.Node}, m}, nil
			}
		}
		return nil, fmt.Errorf("Throttle group '%s' does not exist", name)
	}
}

func (d *driver) file() *graph.Edge { return d.Below() }

// Caps implements graph.Driver. The filter is transparent, as it counts what is mapped and copied itself.
func (d *driver) Caps() graph.Caps {
	c := d.Passthrough.Caps()
	c.Transparent = true
	return c
}

// Close implements graph.Driver.
func (d *driver) Close() error {
	d.m.Leave()
	return nil
}

// leave ends what enter began; a request that would have blocked below was none.
func (d *driver) leave(p pass, dir direction, n int64, err error) {
	if err != nil && p.round != 0 && errors.Is(err, blk.ErrWouldBlock) {
		d.m.refund(p, dir, n)
	}
}

// ReadAt implements graph.Driver.
func (d *driver) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	p, err := d.m.enter(r, reading, n)
	if err != nil {
		return err
	}
	err = d.file().ReadAt(r, v, off, f)
	d.leave(p, reading, n, err)
	return err
}

// WriteAt implements graph.Writer.
func (d *driver) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	p, err := d.m.enter(r, writing, n)
	if err != nil {
		return err
	}
	err = d.file().WriteAt(r, v, off, f)
	d.leave(p, writing, n, err)
	return err
}

// Zero implements graph.Zeroer. Zeroes count like data.
func (d *driver) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	p, err := d.m.enter(r, writing, n)
	if err != nil {
		return err
	}
	err = d.file().Zero(r, off, n, f)
	if f&blk.NoFallback != 0 && errors.Is(err, blk.ErrNotSupported) {
		d.m.refund(p, writing, n) // the caller will write
		return err
	}
	d.leave(p, writing, n, err)
	return err
}

// Discard implements graph.Discarder. What is discarded counts as written.
func (d *driver) Discard(r *blk.Req, off, n int64) error {
	p, err := d.m.enter(r, writing, n)
	if err != nil {
		return err
	}
	err = d.file().Discard(r, off, n)
	d.leave(p, writing, n, err)
	return err
}

// Map implements graph.Mapper. What is mapped counts as read; what is not is read otherwise.
func (d *driver) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	p, err := d.m.enter(r, reading, n)
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
		d.m.refund(p, reading, n)
	case got < n:
		d.m.adjust(p, reading, n, got)
	}
	return err
}

// CopyFrom implements graph.CopyRanger. What is copied counts as written.
func (d *driver) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	var n int64
	for i := range src {
		n += src[i].N
	}
	p, err := d.m.enter(r, writing, n)
	if err != nil {
		return err
	}
	if err = d.file().CopyFrom(r, off, src, f); err != nil {
		d.m.refund(p, writing, n) // most failures are followed by a write
	}
	return err
}

// DrainBegin implements graph.Drainer.
func (d *driver) DrainBegin() { d.m.Open() }

// Quiet implements graph.Drainer: nothing waits between DrainBegin and DrainEnd.
func (d *driver) Quiet() bool { return true }

// DrainEnd implements graph.Drainer.
func (d *driver) DrainEnd() { d.m.Shut() }
