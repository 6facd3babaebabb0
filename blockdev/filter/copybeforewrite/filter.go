package copybeforewrite

import (
	"context"
	"errors"
	"syscall"
	"time"

	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// Driver is the filter.
type Driver struct {
	graph.Passthrough
	State
}

// New makes the filter of a hidden node whose children will be named "file" and "target". size and
// cluster are in bytes; with compressed, copies are written compressed. Nothing is to do yet.
func New(node *graph.Node, size, cluster int64, compressed bool) *Driver {
	d := &Driver{graph.Through(node), State{
		node: node, cluster: cluster, compressed: compressed,
		pending: bitmap.New(size, cluster), done: bitmap.New(size, cluster), access: bitmap.New(size, cluster),
		copies: map[*running]struct{}{}, reading: map[*running]struct{}{},
	}}
	for _, b := range []*bitmap.Bitmap{d.done, d.access} {
		// Clients see them, without a name.
		if _, err := node.Bitmaps().New(graph.DirtyBitmapSpec{Bits: b, Disabled: true}); err != nil {
			panic("copybeforewrite: " + err.Error())
		}
	}
	return d
}

// Caps implements graph.Driver. Nothing passes the filter unseen.
func (d *Driver) Caps() graph.Caps {
	return graph.Caps{
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		ZeroFlags:  blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback,
	}
}

// Close implements graph.Driver.
func (d *Driver) Close() error {
	if d.listed != nil {
		d.listed.Remove()
	}
	if d.readersOver != nil {
		d.readersOver()
	}
	return nil
}

// ReadAt implements graph.Driver.
func (d *Driver) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	d.passing(r)
	return d.Below().ReadAt(r, v, off, f)
}

// before does what must be done before a guest changes [off, off+n).
func (d *Driver) before(r *blk.Req, off, n int64) error {
	d.passing(r)
	if d.broken.Load() {
		return nil
	}
	err := d.copyInTime(r, off, n)
	var failed *graph.CopyError
	if d.breakSnapshot && errors.As(err, &failed) {
		d.broken.Store(true)
		return nil
	}
	return err
}

// copyInTime is Copy that is given up when the time is over: it then goes on by itself, as what is
// in the kernel cannot be called back.
func (d *Driver) copyInTime(r *blk.Req, off, n int64) error {
	if d.timeout == 0 || r.NoWait {
		return d.Copy(r, off, n)
	}
	q, end := graph.Beside(r)
	if q == nil {
		return d.Copy(r, off, n) // a drain waits for this request and will wait for no other one
	}
	done := make(chan error, 1)
	panics.Go("a copy before a write", func() {
		defer end()
		done <- d.Copy(q, off, n)
	}, func(err error) { done <- err })
	t := time.NewTimer(d.timeout)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return &graph.CopyError{Write: true, Err: syscall.ETIMEDOUT}
	}
}

// WriteAt implements graph.Writer.
func (d *Driver) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if f&blk.WriteUnchanged == 0 {
		if err := d.before(r, off, v.Len()); err != nil {
			return err
		}
	}
	return d.Below().WriteAt(r, v, off, f)
}

// Zero implements graph.Zeroer.
func (d *Driver) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	if err := d.before(r, off, n); err != nil {
		return err
	}
	return d.Below().Zero(r, off, n, f)
}

// Flush implements graph.Flusher: guests' flushes do not wait for the target, nor fail with it. Who
// wants the copy on stable storage flushes the target.
func (d *Driver) Flush(r *blk.Req) error {
	if s := d.Below(); s != nil {
		return s.Flush(r)
	}
	return nil // out of the graph already
}

// Discard implements graph.Discarder.
func (d *Driver) Discard(r *blk.Req, off, n int64) error {
	if err := d.before(r, off, n); err != nil {
		return err
	}
	return d.Below().Discard(r, off, n)
}

// Resize implements graph.Resizer: the size stays while there is a point in time to keep.
func (d *Driver) Resize(context.Context, int64, blk.Prealloc) error { return blk.ErrNotSupported }

// EdgeClaim implements graph.Permer. The target is written to, and others may write to it, too (the
// guests' disk may be in its chain), but not change its size. The source must hold still but for
// what comes through the filter.
func (d *Driver) EdgeClaim(child string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	if child == "target" {
		return perm.Claim{Need: perm.Write, Share: perm.All &^ perm.Resize}
	}
	c := d.Passthrough.EdgeClaim(child, role, up, readOnly)
	if d.changes {
		c.Need |= perm.Write
	}
	if c.Need&perm.Write != 0 {
		c.Need |= perm.ConsistentRead
	}
	c.Share &^= perm.Write | perm.Resize
	return c
}

// IdleClaim implements graph.Idler: what nobody looks at need not hold still. So the filter can be
// made above a disk in use, and then be put in.
func (d *Driver) IdleClaim(child string, c perm.Claim) perm.Claim {
	if child == "target" {
		return c
	}
	return perm.Unused
}
