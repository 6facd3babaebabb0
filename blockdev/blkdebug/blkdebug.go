// Package blkdebug is the filter blkdebug: requests pass it to its image, but those that its rules name fail, and it can claim limits and
// permissions that the image does not have. It is for tests.
package blkdebug

import (
	"context"
	"fmt"
	"math"
	"sync"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// rule makes requests fail.
type rule struct {
	kinds uint32 // 1 << kind of request
	off   int64  // only requests that touch this byte; negative: all
	errno syscall.Errno
	once  bool
}

// kinds of requests, as rules name them.
var kinds = map[types.BlkdebugIOType]uint32{
	types.BlkdebugIOTypeRead: 1 << 0, types.BlkdebugIOTypeWrite: 1 << 1, types.BlkdebugIOTypeWriteZeroes: 1 << 2,
	types.BlkdebugIOTypeDiscard: 1 << 3, types.BlkdebugIOTypeFlush: 1 << 4, types.BlkdebugIOTypeBlockStatus: 1 << 5,
}

const (
	kindRead = 1 << iota
	kindWrite
	kindZero
	kindDiscard
	kindFlush
	kindStatus
	// usual are those that a rule without a kind means.
	usual = kindRead | kindWrite | kindZero | kindDiscard | kindFlush
)

type driver struct {
	node          *graph.Node
	limits        blk.Limits
	take, unshare perm.Perm

	mu    sync.Mutex
	rules []rule // +checklocks:mu  the first that matches counts
}

// Open opens the filter. Its child is called "image".
func Open(o *graph.Opening) (graph.Driver, error) {
	u := o.Options.(*types.BlockdevOptionsBlkdebug)
	d := &driver{node: o.Node, take: perms(u.TakeChildPerms), unshare: perms(u.UnshareChildPerms)}
	for _, r := range u.InjectError {
		x := rule{kinds: usual, off: -1, errno: syscall.EIO, once: r.Once != nil && *r.Once}
		if r.Iotype != nil {
			x.kinds = kinds[*r.Iotype]
		}
		if r.Errno != nil {
			x.errno = syscall.Errno(*r.Errno)
		}
		if r.Sector != nil && *r.Sector >= 0 {
			x.off = *r.Sector * 512
		}
		d.rules = append([]rule{x}, d.rules...) // later ones come first, as in the reference
	}
	return d, d.setLimits(u)
}

// setLimits takes the limits over from the options, in the reference's order of checks.
func (d *driver) setLimits(u *types.BlockdevOptionsBlkdebug) error {
	l := &d.limits
	bad := func(what string, v int64) error {
		return fmt.Errorf("Cannot meet constraints with %s %d", what, v)
	}
	if u.Align != nil {
		if l.RequestAlign = *u.Align; l.RequestAlign < 0 || l.RequestAlign >= math.MaxInt32 || l.RequestAlign&(l.RequestAlign-1) != 0 {
			return bad("align", l.RequestAlign)
		}
	}
	align := max(l.RequestAlign, d.node.FilteredChild().Caps().Limits.RequestAlign, 1)
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

// fail is the error of a request of that kind, or nil.
func (d *driver) fail(kind uint32, off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, r := range d.rules {
		if r.kinds&kind == 0 || r.off >= 0 && (n <= 0 || r.off < off || r.off >= off+n) {
			continue
		}
		if r.errno == 0 {
			return nil
		}
		if r.once {
			d.rules = append(d.rules[:i:i], d.rules[i+1:]...)
		}
		return r.errno
	}
	return nil
}

func (d *driver) image() *graph.Edge { return d.node.FilteredChild() }

// Reopen implements graph.Reopener: there is nothing that could change.
func (d *driver) Reopen(*graph.Reopening) (graph.Participant, error) { return nil, nil }

// Caps implements graph.Driver. No request passes the rules unseen.
func (d *driver) Caps() graph.Caps {
	return graph.Caps{
		Limits:     d.limits,
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		ZeroFlags:  blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
	}
}

// Size is 0 once the filter was taken out of the graph and waits to be closed.
func (d *driver) Size() int64 {
	if c := d.image(); c != nil {
		return c.Size()
	}
	return 0
}

// Close implements graph.Driver.
func (d *driver) Close() error { return nil }

// ReadAt implements graph.Driver.
func (d *driver) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := d.fail(kindRead, off, v.Len()); err != nil {
		return err
	}
	return d.image().ReadAt(r, v, off, f)
}

// WriteAt implements graph.Writer.
func (d *driver) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := d.fail(kindWrite, off, v.Len()); err != nil {
		return err
	}
	return d.image().WriteAt(r, v, off, f)
}

// Zero implements graph.Zeroer.
func (d *driver) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	if err := d.fail(kindZero, off, n); err != nil {
		return err
	}
	return d.image().Zero(r, off, n, f)
}

// Discard implements graph.Discarder.
func (d *driver) Discard(r *blk.Req, off, n int64) error {
	if err := d.fail(kindDiscard, off, n); err != nil {
		return err
	}
	return d.image().Discard(r, off, n)
}

// Flush implements graph.Flusher.
func (d *driver) Flush(r *blk.Req) error {
	if err := d.fail(kindFlush, 0, 0); err != nil {
		return err
	}
	return d.image().Flush(r)
}

// Status implements graph.Statuser.
func (d *driver) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	if err := d.fail(kindStatus, off, n); err != nil {
		return blk.Extent{}, err
	}
	return blk.Extent{N: n, Raw: true, OffValid: true, MapOff: off, In: d.image()}, nil
}

// Resize implements graph.Resizer.
func (d *driver) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	return d.image().Resize(ctx, size, false, m)
}

// EdgeClaim implements graph.Permer.
func (d *driver) EdgeClaim(_ string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	c := perm.Default(role, up, !readOnly, false)
	c.Need |= d.take
	c.Share &^= d.unshare
	return c
}
