package file

import (
	"context"
	"log/slog"

	"golang.org/x/sys/unix"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// pending is a prepared permission change.
type pending struct {
	want lockSet
	h    *handle // replaces the current one and holds want already; nil: stay

	// direct and limits come with h.
	direct bool
	limits blk.Limits
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
	s := d.settings
	if d.next != nil {
		s = *d.next
	}
	writable := !s.ro || c.Need&writers != 0 // a job may make a read-only node writable for a while
	if s.auto {
		writable = c.Need&writers != 0
	}
	reopen := writable != cur.writable || s.direct != d.settings.direct
	if !reopen && (!d.locks || p.want.minus(d.held).empty()) {
		d.pending = p // only lowers, or changes nothing
		<-d.permSlot
		return nil
	}

	held := d.held
	cur.hold()  // for the case that we leave before prepare does
	flags := -1 // stay
	if reopen {
		flags = s.flags(writable)
	}
	late, err := await(ctx, "", func() error { return d.prepare(cur, held, p, flags) }, func(err error) {
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

// prepare does the blocking part; flags are those to open the file anew with, if not negative.
func (d *disk) prepare(cur *handle, held lockSet, p *pending, flags int) error {
	if flags >= 0 {
		if err := reopenAs(d, cur, p, flags); err != nil {
			return err
		}
	}
	if !d.locks {
		return nil
	}
	if !p.want.minus(held).empty() {
		if err := takeLocks(cur.fd, held, p.want, d.name); err != nil {
			p.close()
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
	p.close()
}

func (p *pending) close() {
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
		if d.direct != p.direct {
			// A reopen: no request is here.
			d.direct, d.limits = p.direct, p.limits
			d.setNoWait(p.h.fd, d.direct)
		}
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

// reopenAs opens the same file in another way.
func reopenAs(d *disk, cur *handle, p *pending, flags int) error {
	if cur.writable {
		// A descriptor opened later may not be told of a failed write-back before.
		if err := d.fdatasync(cur.fd); err != nil {
			d.remember(err)
		}
	}
	h, err := d.openAgain(cur, flags)
	if err != nil {
		return err
	}
	p.h, p.limits = h, d.limits
	if p.direct, err = d.alignments(h.fd, flags&unix.O_DIRECT != 0, &p.limits); err != nil {
		p.close()
	}
	return err
}

// reopen changes how the file is opened, which follows when permissions are prepared.
func reopen(open graph.Driver, u *types.BlockdevOptionsFile, g *graph.Options) (graph.Participant, error) {
	d, ok := open.(*disk)
	if !ok {
		d = open.(*cdrom).d
	}
	return &resetting{d: d, u: u, g: g}, nil
}

// resetting changes settings within a transaction.
type resetting struct {
	d *disk
	u *types.BlockdevOptionsFile
	g *graph.Options
	s settings // once it is prepared
}

// Prepare implements graph.Participant.
func (r *resetting) Prepare(context.Context) error {
	g := r.g
	r.s = r.d.settings
	r.s.ro, r.s.auto, r.s.direct, r.s.noFlush = g.ReadOnly, g.AutoReadOnly, g.Direct, g.NoFlush
	r.s.setCache(r.u)
	r.d.next = &r.s
	return nil
}

// Commit implements graph.Participant. It writes what changes and nothing else: queries read the
// names at any time.
func (r *resetting) Commit() {
	d, s := &r.d.settings, &r.s
	d.ro, d.auto, d.direct, d.noFlush, d.drop, d.check = s.ro, s.auto, s.direct, s.noFlush, s.drop, s.check
	r.d.next = nil
}

// Abort implements graph.Participant.
func (r *resetting) Abort() { r.d.next = nil }

// warnUnlock logs what cannot happen on a local file system: the change is done by now.
func warnUnlock(err error) {
	if err != nil {
		slog.Warn(err.Error())
	}
}
