// Package commit is the job behind block-commit of a node that is a backing file: it copies what
// the layers from a top down to a base hold into the base, and then takes those layers out of the
// chain.
//
//	 before         while it runs                      after
//
//	overlay         overlay                           overlay
//	   | backing       | backing                         | backing
//	  top           filter (commit_top)                 base
//	   | backing       | backing   (frozen from here)
//	  mid             top ---.
//	   | backing       | backing
//	  base            mid   job
//	                   | backing
//	                  base <-'  writes what it reads at the top
//
// What is read through the chain stays what it is: the base gets only what layers above it hide.
// Committing a node that is written to is a mirror into its own backing chain (package mirror).
package commit

import (
	"context"
	"errors"
	"time"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/copy"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

const (
	// chunk is the largest extent copied at once, in bytes; limitedChunk that of a job with a speed
	// limit, as in QEMU.
	chunk        = 1 << 20
	limitedChunk = 512 << 10
	// workers copy extents at the same time; see package mirror.
	workers = 1
)

// enter creates the job and puts it into the graph.
func (j *Job) enter(ctx context.Context, m *jobs.Manager) (*jobs.Job, error) {
	a := &j.args
	if j.top.SkipFilters() == j.base.SkipFilters() {
		return nil, errors.New("Invalid files for merge: top and base are the same")
	}
	spec := blockjob.Spec(types.JobTypeCommit, j, a.JobID, a.Speed, a.AutoFinalize, a.AutoDismiss)
	spec.Nodes, spec.Args = []*graph.Node{j.top}, a
	if err := j.site.Create(m, spec); err != nil {
		return nil, err
	}
	if err := j.site.MakeWritable(ctx, j.base); err != nil {
		return nil, err
	}
	j.last, j.copied = graph.Now.Overlay(j.top, j.base), graph.Now.Chain(j.top, j.base)
	return j.site.Enter(ctx, j.top.Graph(), j.fill)
}

// fill builds the filter and takes what the job relies on.
func (j *Job) fill(tx *graph.Tx) error {
	o := graph.Options{DriverName: DriverName, ReadOnly: true, NeverFreeze: true}
	filter, err := j.site.MakeFilter(tx, j.filterName, o)
	if err != nil {
		return err
	}
	filter.SetDriver(&filterDriver{graph.PassReads{Node: filter}})
	if _, err := tx.InsertFilter(filter, "backing", j.top); err != nil {
		return err
	}
	if err := j.keep(tx); err != nil {
		return err
	}
	if err := j.site.FreezeChain(tx, filter, j.base); err != nil {
		return err
	}
	j.site.BlockAt(tx, append(append([]*graph.Node{j.device}, j.copied...), j.base)...)
	return j.site.FreezeOverlays(tx, filter)
}

// keep takes what the job relies on.
func (j *Job) keep(tx *graph.Tx) error {
	uses := []blockjob.Use{{Name: "main node", Node: j.device, Claim: perm.Claim{Share: perm.All}}}
	c := perm.Claim{Share: perm.WriteUnchanged | perm.Write}
	for _, n := range j.copied {
		if n.SkipFilters() == j.base.SkipFilters() {
			c.Share |= perm.ConsistentRead // a filter on the base
		}
		uses = append(uses, blockjob.Use{Name: "intermediate node", Node: n, Claim: c})
	}
	c = perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.ConsistentRead | perm.WriteUnchanged}
	if j.base.Size() < j.top.Size() {
		c.Need |= perm.Resize
	}
	return j.site.Keep(tx, append(uses,
		blockjob.Use{Name: "base", Node: j.base, Claim: perm.Claim{Share: perm.All}},
		blockjob.Use{Node: j.base, Claim: c, Root: &j.writes},
		blockjob.Use{Node: j.top, Claim: perm.Claim{Share: perm.All}, Root: &j.reads})...)
}

// Run implements jobs.Runner.
func (j *Job) Run(ctx context.Context, h *jobs.Handle) error {
	size := j.top.Size()
	h.SetRemaining(size)
	h.Yield()
	policies := copy.PoliciesOf(j.args.OnError, j.args.OnError)
	err := blockjob.Grow(ctx, h, j.writes, size, func(err error) error { return failed(h, policies, err) })
	if err != nil {
		return err
	}
	t := copy.Task{
		// The base is below the top: whoever waits for the base to be quiet waits for those who
		// came in at the top.
		Gate: copy.RootGate(ctx, j.reads), Size: size, Chunk: chunk,
		Look: func(r *blk.Req, off, n int64) (copy.Extent, error) {
			if h.Limited() {
				n = min(n, limitedChunk)
			}
			return j.look(r, off, n)
		},
		Copy: j.copy, Side: policies.Side, RetryIgnored: true,
	}
	t.SetWorkers(workers, j.top)
	return copy.Run(h, t)
}

// failed says what becomes of an error while the base grows.
func failed(h *jobs.Handle, policies copy.Policies, err error) error {
	if h.Context().Err() != nil {
		return jobs.ErrCancelled
	}
	action, stopped := h.OnErrorIdle(types.IoOperationTypeWrite, policies.Write, err)
	switch {
	case stopped != nil:
		return stopped
	case action == types.BlockErrorActionReport:
		return err
	case action == types.BlockErrorActionIgnore:
		return h.Sleep(100 * time.Millisecond) // it is tried again, but not as fast as it fails
	}
	return nil
}

// look tells the copy engine what the layers above the base hold.
func (j *Job) look(r *blk.Req, off, n int64) (copy.Extent, error) {
	x, err := j.reads.Edge().StatusAbove(r, j.last, true, off, n)
	switch {
	case err != nil:
		return copy.Extent{}, err
	case !x.Allocated:
		return copy.Extent{N: x.N}, nil
	case x.Zero:
		return copy.Extent{N: x.N, Action: copy.Zero}, nil
	}
	return copy.Extent{N: x.N, Action: copy.Data}, nil
}

func (j *Job) copy(r *blk.Req, off int64, e copy.Extent) (int64, error) {
	if e.Action != copy.Zero {
		return copy.All(e.N, graph.Copy(r, j.reads.Edge(), j.writes.Edge(), off, e.N, 0))
	}
	if err := j.writes.Edge().Zero(r, off, e.N, blk.MayUnmap); err != nil {
		return 0, &graph.CopyError{Write: true, Err: err}
	}
	return e.N, nil
}

// Prepare implements jobs.Preparer: it puts the base in the place of the top and rewrites the
// headers of the overlays, all or nothing.
func (j *Job) Prepare(ctx context.Context, h *jobs.Handle) error {
	g, filter := j.top.Graph(), j.site.Filter
	hold, err := g.Hold(ctx, func() ([]*graph.Node, error) {
		return append(graph.Now.Chain(filter, graph.Now.Below(j.base)), overlaysOf(filter, true)...), nil
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	ctx = context.WithoutCancel(ctx)
	// A filter in between keeps an overlay from being told of its new backing file, but not from
	// reading it.
	all := overlaysOf(filter, true)
	for _, n := range all {
		restore, err := blockjob.MakeWritable(ctx, n)
		if err != nil {
			return err
		}
		defer restore()
	}
	for _, n := range all {
		if err := j.hideTail(ctx, n); err != nil {
			return err
		}
	}
	tx := g.Begin(ctx)
	defer tx.Abort()
	if err := j.pivot(tx); err != nil {
		return err
	}
	below := filter.NodesBelow()
	if err := tx.Commit(); err != nil {
		return err
	}
	j.site.Filter = nil
	h.Show(visible.CommitLeft, below...)
	return nil
}

// pivot lets tx take the job out of the graph, put the base in the place of the filter, and tell
// the overlays.
func (j *Job) pivot(tx *graph.Tx) error {
	filter := j.site.Filter
	overlays := overlaysOf(filter, false)
	if err := j.site.Leave(tx); err != nil {
		return err
	}
	if err := tx.Detach(filter.FilteredChild()); err != nil {
		return err
	}
	if err := tx.ReplaceNode(filter, j.base); err != nil {
		return err
	}
	name, format, err := j.nodes.HeaderNames(j.base, j.args.BackingFile, j.args.BackingMaskProtocol)
	if err != nil {
		return err
	}
	for _, n := range overlays {
		tx.Drain(n)
		tx.Join(&blockdev.HeaderChange{Node: n, Base: j.base, Name: name, Format: format})
	}
	return nil
}

// Clean implements jobs.Cleaner.
func (j *Job) Clean(*jobs.Handle) {
	hold, _ := j.top.Graph().HoldNodes(context.Background(), j.top, j.base) // none if the graph is closed
	defer hold.Release()
	j.site.Release()
}
