package commit

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// tailChunk is how much of an overlay is looked at in one unit of work, in bytes.
const tailChunk = 64 << 20

// overlaysOf are the nodes that have n, or with filters one on n, as their backing file.
func overlaysOf(n *graph.Node, filters bool) (l []*graph.Node) {
	for _, e := range n.Parents() {
		switch p := e.ParentNode(); {
		case p == nil:
		case e.Role()&perm.COW != 0:
			l = append(l, p)
		case filters && p.Kind() == graph.Filter && p.FilteredChild() == e:
			l = append(l, overlaysOf(p, true)...)
		}
	}
	return l
}

// hideTail makes an overlay that is longer than the top go on reading zeroes there when a base that
// is longer, too, takes the place of the top. It changes nothing that anybody reads and may be done
// although the job fails after it.
func (j *Job) hideTail(ctx context.Context, overlay *graph.Node) error {
	off, end := j.top.Size(), min(j.base.Size(), overlay.Size())
	if off >= end {
		return nil
	}
	tx := j.top.Graph().Begin(ctx)
	defer tx.Abort()
	root, err := tx.AttachRoot(graph.RootSpec{
		EdgeName: "root", StayAtNode: true, Job: true,
		Claim: perm.Claim{Need: perm.ConsistentRead | perm.WriteUnchanged, Share: perm.All},
	}, overlay)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		return err
	}
	for err == nil && off < end {
		var n int64
		var zero bool
		if n, zero, err = j.shown(ctx, off, end-off); err == nil && !zero {
			n = min(tailChunk, n)
			err = zeroUnallocated(ctx, root, off, n)
		}
		off += n
	}
	if e := j.top.Graph().CloseRoot(ctx, root); err == nil {
		err = e
	}
	return err
}

// shown tells whether the base reads as zeroes in the beginning of [off, off+n), and how long that
// is: there is nothing to hide there.
func (j *Job) shown(ctx context.Context, off, n int64) (int64, bool, error) {
	r, err := j.writes.Begin(ctx)
	if err != nil {
		return 0, false, err
	}
	defer j.writes.End(r)
	x, err := j.writes.Edge().StatusAbove(r, nil, false, off, n)
	if err != nil || x.N == 0 {
		return n, false, nil
	}
	return x.N, x.Zero, nil
}

// zeroUnallocated zeroes what the node of root has not itself in [off, off+n).
func zeroUnallocated(ctx context.Context, root *graph.Root, off, n int64) error {
	r, err := root.Begin(ctx)
	if err != nil {
		return err
	}
	defer root.End(r)
	lock, err := root.Edge().LockRange(r, off, n)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	for end := off + n; off < end; {
		x, err := root.Edge().Status(r, off, end-off)
		if err != nil || x.N == 0 {
			return err
		}
		if !x.Allocated {
			if err := root.Edge().Zero(r, off, x.N, blk.WriteUnchanged); err != nil {
				return err
			}
		}
		off += x.N
	}
	return nil
}
