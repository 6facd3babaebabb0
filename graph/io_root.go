package graph

import (
	"context"
	"time"

	"qblockd/graph/blk"
)

// SetAccount lets a count the requests through r from now on; nil: none are counted.
func (r *Root) SetAccount(a *Account) { r.acct.Store(a) }

// Account is what SetAccount set.
func (r *Root) Account() *Account { return r.acct.Load() }

// The requests of Edge, through the root, counted by its Account.

// Size is Edge.Size.
func (r *Root) Size() int64 { return r.edge.Size() }

// ReadAt is Edge.ReadAt.
func (r *Root) ReadAt(q *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	a := r.Account()
	t := a.start()
	err := r.edge.ReadAt(q, v, off, f)
	a.done(acctRead, t, v.Len(), err)
	return err
}

// WriteAt is Edge.WriteAt.
func (r *Root) WriteAt(q *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	a := r.Account()
	t := a.start()
	err := r.edge.WriteAt(q, v, off, f)
	a.done(acctWrite, t, v.Len(), err)
	return err
}

// Zero is Edge.Zero; it counts as a write.
func (r *Root) Zero(q *blk.Req, off, n int64, f blk.Flags) error {
	a := r.Account()
	t := a.start()
	err := r.edge.Zero(q, off, n, f)
	a.done(acctWrite, t, n, err)
	return err
}

// Discard is Edge.Discard.
func (r *Root) Discard(q *blk.Req, off, n int64) error {
	a := r.Account()
	t := a.start()
	err := r.edge.Discard(q, off, n)
	a.done(acctUnmap, t, n, err)
	return err
}

// Flush is Edge.Flush.
func (r *Root) Flush(q *blk.Req) error {
	a := r.Account()
	t := a.start()
	err := r.edge.Flush(q)
	a.done(acctFlush, t, 0, err)
	return err
}

// Map is Edge.Map. It counts nothing: whoever asked may find no use for the ranges; Mapped tells if
// there was one.
func (r *Root) Map(q *blk.Req, off, n int64, m *blk.Mapping) error { return r.edge.Map(q, off, n, m) }

// Mapped counts a read of n bytes that was served from mapped ranges, and took that long.
func (r *Root) Mapped(n int64, took time.Duration) {
	a := r.Account()
	a.done(acctRead, a.start()-took, n, nil)
}

// CopyFrom is Edge.CopyFrom; it counts as a write unless it has to be made by hand.
func (r *Root) CopyFrom(q *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	a := r.Account()
	t := a.start()
	err := r.edge.CopyFrom(q, off, src, f)
	if err == nil || !isNotSupported(err) {
		a.done(acctWrite, t, blk.Total(src), err)
	}
	return err
}

// Prefetch is Edge.Prefetch; it is not counted.
func (r *Root) Prefetch(q *blk.Req, off, n int64) error { return r.edge.Prefetch(q, off, n) }

// Status is Edge.Status.
func (r *Root) Status(q *blk.Req, off, n int64) (blk.Extent, error) { return r.edge.Status(q, off, n) }

// StatusAbove is Edge.StatusAbove.
func (r *Root) StatusAbove(q *blk.Req, base *Node, includeBase bool, off, n int64) (blk.Extent, error) {
	return r.edge.StatusAbove(q, base, includeBase, off, n)
}

// Resize is Edge.Resize.
func (r *Root) Resize(ctx context.Context, size int64, exact bool, m blk.Prealloc) error {
	return r.edge.Resize(ctx, size, exact, m)
}
