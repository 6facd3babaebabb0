// Package blkdebug is the filter blkdebug: requests pass it to its image, but those that its rules
// name fail, and it can claim limits and permissions that the image does not have. It is for tests.
package blkdebug

import (
	"context"
	"fmt"
	"math"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Driver is an open filter.
type Driver struct {
	graph.Passthrough
	limits        blk.Limits
	take, unshare perm.Perm
	rules         rules
}

// open opens the filter. It blocks as long as reading the file with rules takes.
func open(o *driver.Opening, u *types.BlockdevOptionsBlkdebug) (graph.Driver, error) {
	d := &Driver{
		Passthrough: graph.Through(o.Node), take: perms(u.TakeChildPerms), unshare: perms(u.UnshareChildPerms),
	}
	inject, set := u.InjectError, u.SetState
	if u.Config != nil {
		i, s, err := readConfig(*u.Config)
		if err != nil {
			return nil, err
		}
		inject, set = append(i, inject...), append(s, set...)
	}
	d.rules.init(inject, set)
	return d, d.setLimits(u)
}

// setLimits takes the limits over from the options, in QEMU's order of checks.
func (d *Driver) setLimits(u *types.BlockdevOptionsBlkdebug) error {
	l := &d.limits
	bad := func(what string, v int64) error {
		return fmt.Errorf("Cannot meet constraints with %s %d", what, v)
	}
	if u.Align != nil {
		l.RequestAlign = *u.Align
		if a := l.RequestAlign; a < 0 || a >= math.MaxInt32 || a&(a-1) != 0 {
			return bad("align", a)
		}
	}
	align := max(l.RequestAlign, d.Below().Caps().Limits.RequestAlign, 1)
	for _, x := range []struct {
		name   string
		from   *int32
		to     *int64
		factor *int64 // it must be a multiple of this, too
	}{
		{"max-transfer", u.MaxTransfer, &l.MaxTransfer, nil},
		{"opt-write-zero", u.OptWriteZero, &l.ZeroAlign, nil},
		{"max-write-zero", u.MaxWriteZero, &l.MaxZero, &l.ZeroAlign},
		{"opt-discard", u.OptDiscard, &l.DiscardAlign, nil},
		{"max-discard", u.MaxDiscard, &l.MaxDiscard, &l.DiscardAlign},
	} {
		if x.from == nil {
			continue
		}
		v, of := int64(*x.from), align
		if x.factor != nil {
			of = max(of, *x.factor)
		}
		if v < 0 || v%of != 0 || x.factor == nil && x.to != &l.MaxTransfer && v&(v-1) != 0 {
			return bad(x.name, v)
		}
		*x.to = v
	}
	return nil
}

func perms(l []types.BlockPermission) (p perm.Perm) {
	for _, x := range l {
		switch x {
		case types.BlockPermissionConsistentRead:
			p |= perm.ConsistentRead
		case types.BlockPermissionWrite:
			p |= perm.Write
		case types.BlockPermissionWriteUnchanged:
			p |= perm.WriteUnchanged
		case types.BlockPermissionResize:
			p |= perm.Resize
		}
	}
	return p
}

// DebugEvent implements graph.Debugger. Requests that must not wait are not counted: they come
// again.
func (d *Driver) DebugEvent(r *blk.Req, e blk.DebugEvent) {
	if d.rules.eventful.Load() && !r.NoWait {
		d.rules.event(e)
	}
}

// unless does something with [off, off+n) unless a rule lets that kind of request fail.
func (d *Driver) unless(r *blk.Req, kind uint32, off, n int64, do func() error) error {
	if r.NoWait && d.rules.eventful.Load() {
		return blk.ErrWouldBlock
	}
	if err := d.rules.fail(r, kind, off, n); err != nil {
		return err
	}
	return do()
}

// Caps implements graph.Driver. No request passes the rules unseen.
func (d *Driver) Caps() graph.Caps {
	return graph.Caps{
		Limits:     d.limits,
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		ZeroFlags:  blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
	}
}

// ReadAt implements graph.Driver.
func (d *Driver) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.unless(r, kindRead, off, v.Len(), func() error { return d.Below().ReadAt(r, v, off, f) })
}

// WriteAt implements graph.Writer.
func (d *Driver) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.unless(r, kindWrite, off, v.Len(), func() error { return d.Below().WriteAt(r, v, off, f) })
}

// Zero implements graph.Zeroer.
func (d *Driver) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return d.unless(r, kindZero, off, n, func() error { return d.Below().Zero(r, off, n, f) })
}

// Discard implements graph.Discarder.
func (d *Driver) Discard(r *blk.Req, off, n int64) error {
	return d.unless(r, kindDiscard, off, n, func() error { return d.Below().Discard(r, off, n) })
}

// Flush implements graph.Flusher.
func (d *Driver) Flush(r *blk.Req) error {
	return d.unless(r, kindFlush, 0, 0, func() error { return d.Below().Flush(r) })
}

// Status implements graph.BlockStatuser.
func (d *Driver) Status(r *blk.Req, off, n int64) (x blk.Extent, err error) {
	err = d.unless(r, kindStatus, off, n, func() (err error) {
		x, err = d.Passthrough.Status(r, off, n)
		return err
	})
	return x, err
}

// Resize implements graph.Resizer.
func (d *Driver) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	return d.Below().Resize(ctx, size, false, m)
}

// EdgeClaim implements graph.Permer.
func (d *Driver) EdgeClaim(_ string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	c := d.Passthrough.EdgeClaim("", role, up, readOnly)
	c.Need |= d.take
	c.Share &^= d.unshare
	return c
}
