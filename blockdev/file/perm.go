package file

import (
	"context"
	"log/slog"

	"golang.org/x/sys/unix"

	"qblockd/graph/perm"
)

// pending is a prepared permission change.
type pending struct {
	want lockSet
	h    *handle // replaces the current one and holds want already; nil: stay
}

const writers = perm.Write | perm.WriteUnchanged | perm.Resize

// PermPrepare implements graph.PermTaker: takes the locks that the claim needs beyond those
// held, and under auto-read-only opens the file for writing or no longer for writing. It
// blocks as long as the storage does, but no longer than ctx; work that is stuck by then is
// undone when the kernel lets go of it. It undoes its own work when it fails.
func (d *disk) PermPrepare(ctx context.Context, c perm.Claim) error {
	select {
	case d.permSlot <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	p := &pending{want: locksFor(c)}
	cur := d.cur.Load()
	if cur == nil {
		<-d.permSlot
		return unix.EBADF
	}
	writable := !d.ro || c.Need&writers != 0 // a job may make a read-only node writable for a while
	if d.auto {
		writable = c.Need&writers != 0
	}
	if writable == cur.writable && (!d.locks || p.want.minus(d.held).empty()) {
		d.pending = p // only lowers, or changes nothing
		<-d.permSlot
		return nil
	}

	held := d.held
	cur.hold() // for the case that we leave before prepare does
	late, err := await(ctx, func() error { return d.prepare(cur, held, p, writable) }, func(err error) {
		if err == nil {
			d.undo(cur, held, p)
		}
		cur.drop()
		<-d.permSlot
	})
	if late {
		return err
	}
	if err == nil {
		d.pending = p
	}
	cur.drop()
	<-d.permSlot
	return err
}

// prepare does the blocking part.
func (d *disk) prepare(cur *handle, held lockSet, p *pending, writable bool) error {
	if writable != cur.writable {
		h, err := d.reopen(cur, writable)
		if err != nil {
			return err
		}
		p.h = h
	}
	if !d.locks {
		return nil
	}
	if !p.want.minus(held).empty() {
		if err := takeLocks(cur.fd, held, p.want, d.name); err != nil {
			d.closePending(p)
			return err
		}
	}
	if p.h != nil {
		if err := lockBytes(p.h.fd, p.want); err != nil {
			d.undo(cur, held, p)
			return err
		}
	}
	return nil
}

// undo takes a prepared change back.
func (d *disk) undo(cur *handle, held lockSet, p *pending) {
	if d.locks {
		warnUnlock(unlockBytes(cur.fd, p.want.minus(held)))
	}
	d.closePending(p)
}

func (d *disk) closePending(p *pending) {
	if p.h != nil {
		p.h.drop()
		p.h = nil
	}
}

// PermCommit implements graph.PermTaker.
func (d *disk) PermCommit() {
	p := d.pending
	d.pending = nil
	cur := d.cur.Load()
	if p == nil || cur == nil {
		return
	}
	drop := d.held.union(p.want)
	if p.h != nil {
		d.cur.Store(p.h)
	} else {
		drop = d.held.minus(p.want)
	}
	if d.locks {
		warnUnlock(unlockBytes(cur.fd, drop))
		d.held = p.want
	}
	if p.h != nil {
		cur.drop()
	}
}

// PermAbort implements graph.PermTaker; without a prepared change it does nothing.
func (d *disk) PermAbort() {
	p := d.pending
	d.pending = nil
	if cur := d.cur.Load(); p != nil && cur != nil {
		d.undo(cur, d.held, p)
	}
}

// reopen opens the same file with another access mode.
func (d *disk) reopen(cur *handle, writable bool) (*handle, error) {
	if cur.writable {
		// A descriptor opened later may not be told of a failed write-back before.
		if err := d.fdatasync(cur.fd); err != nil {
			d.remember(err)
		}
	}
	return d.openAgain(cur, writable)
}

// warnUnlock logs what cannot happen on a local file system: the change is done by now.
func warnUnlock(err error) {
	if err != nil {
		slog.Warn(err.Error())
	}
}
