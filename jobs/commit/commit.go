// Package commit is the job behind block-commit of a node that is a backing file: it copies what the layers from a top down to a base hold into the base,
// and then takes those layers out of the chain.
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
// What is read through the chain stays what it is: the base gets only what layers above it hide. Committing a node that is written to is a mirror into
// its own backing chain (package mirror).
package commit

import (
	"context"
	"errors"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/chain"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

const (
	// chunk is the largest extent copied at once, in bytes; limitedChunk that of a job with a speed limit, as in the reference.
	chunk        = 1 << 20
	limitedChunk = 512 << 10
	// workers copy extents at the same time; see package mirror.
	workers = 1
)

// Args says what to commit. Device is the top of the chain that Top and Base were found in; nobody writes to Top.
type Args struct {
	ID                string
	Device, Top, Base *graph.Node
	// BackingFile is what the header of the overlay will name; "" means the base's own name.
	BackingFile string
	// MaskProtocol writes "raw" for the format of a base that is a protocol node.
	MaskProtocol   bool
	Speed          int64 // bytes per second, 0: no limit
	OnError        types.BlockdevOnError
	FilterNodeName string // "": generated, and the filter is implicit
	ManualFinalize bool
	ManualDismiss  bool
	// Hold is the caller's of the nodes; it ends before the job goes to work. Nil: there is none.
	Hold *graph.Hold
	// HeaderName is how an overlay's header names a node, and the format.
	HeaderName func(*graph.Node) (name, format string, err error)
}

// errInUse is why the nodes of a job take no other operation.
var errInUse = errors.New("block device is in use by block job: commit")

// job is the runner.
type job struct {
	Args
	g       *graph.Graph
	last    *graph.Node // the last one to be copied: the overlay of the base
	filter  *graph.Node // nil once removed
	top     *graph.Root // reads
	base    *graph.Root // writes
	holds   []*graph.Root
	block   []func()
	thaw    func()
	wasRead []*graph.Node // the nodes of the base that were made writable
	claimed bool          // the base is blocked by this job itself already
}

// Start checks the arguments, inserts the filter and starts the job; see jobs.Manager.Start for release. On error nothing has changed.
func Start(ctx context.Context, m *jobs.Manager, a Args) (release func(), err error) {
	if a.Top.SkipFilters() == a.Base.SkipFilters() {
		return nil, errors.New("Invalid files for merge: top and base are the same")
	}
	j := &job{Args: a, g: a.Top.Graph(), last: chain.Overlay(a.Top, a.Base), thaw: func() {}}
	mj, err := m.Create(jobs.Spec{
		ID: j.ID, Type: types.JobTypeCommit, Runner: j, Block: true, Speed: j.Speed, ManualFinalize: j.ManualFinalize, ManualDismiss: j.ManualDismiss,
		Nodes: []*graph.Node{j.Top},
	})
	if err != nil {
		return nil, err
	}
	if err = j.begin(ctx, mj); err != nil {
		m.Discard(mj)
		return nil, err
	}
	a.Hold.Release()
	return m.Start(mj), nil
}

// begin makes the base writable and puts the job into the graph. No other job gets in between.
func (j *job) begin(ctx context.Context, mj *jobs.Job) error {
	if j.Base.ReadOnly() {
		release, err := chain.Claim(ctx, j.Base, graph.OpCommitTarget, errInUse)
		if err != nil {
			return err
		}
		defer release()
		j.claimed = true
		if err := j.makeWritable(ctx); err != nil {
			return err
		}
	}
	err := j.attach(ctx, mj)
	if err != nil {
		j.restoreReadOnly()
	}
	return err
}

// makeWritable makes a read-only base writable for the time of the job.
func (j *job) makeWritable(ctx context.Context) error {
	if !j.Base.ReadOnly() {
		return nil
	}
	nodes := j.Base.WithFiles()
	if err := j.g.SwitchReadOnly(ctx, false, nodes...); err != nil {
		return err
	}
	j.wasRead = nodes
	return nil
}

// restoreReadOnly undoes makeWritable. A failure leaves the node writable and is logged.
func (j *job) restoreReadOnly() {
	nodes := j.wasRead
	j.wasRead = nil
	if nodes == nil {
		return
	}
	if err := j.g.SwitchReadOnly(context.Background(), true, nodes...); err != nil {
		slog.Warn("the base of a commit stays writable", "node", j.Base.Name(), "err", err)
	}
}

// attach builds the filter and the job's holds in one transaction.
func (j *job) attach(ctx context.Context, mj *jobs.Job) error {
	tx := j.g.Begin(ctx)
	defer tx.Abort()
	top := j.Top.Options()
	filter, err := tx.NewNode(&graph.Options{
		Name: j.FilterNodeName, DriverName: DriverName, Kind: graph.Filter, ReadOnly: true,
		Implicit: j.FilterNodeName == "", NeverFreeze: true, Direct: top.Direct, NoFlush: top.NoFlush,
	})
	if err != nil {
		return err
	}
	j.filter = filter
	filter.SetDriver(&filterDriver{node: filter})
	if _, err := tx.InsertFilter(filter, "backing", j.Top); err != nil {
		return err
	}
	if err := j.hold(tx, mj); err != nil {
		return err
	}
	thawChain, err := tx.FreezeChain(filter, j.Base)
	if err != nil {
		return err
	}
	thawOverlays, err := tx.FreezeOverlays(filter)
	if err != nil {
		return err
	}
	j.thaw = func() { thawChain(); thawOverlays() }
	if err := tx.Publish(filter); err != nil {
		return err
	}
	tx.Check(j.blocked)
	tx.Join(graph.OnCommit(j.keepOthersAway))
	return tx.Commit()
}

// blocked tells why another job does not let this one in. Asked with the nodes reserved: of two that start at the same time one sees the other.
func (j *job) blocked() error {
	for n := j.Top; n != j.Base; n = chain.Below(n) {
		if err := n.Blocked(graph.OpCommitTarget); err != nil {
			return err
		}
	}
	if j.claimed {
		return nil
	}
	return j.Base.Blocked(graph.OpCommitTarget)
}

// keepOthersAway keeps others away from the nodes of the job from the moment it is in the graph.
func (j *job) keepOthersAway() {
	nodes := []*graph.Node{j.Device}
	for n := j.Top; n != j.Base; n = chain.Below(n) {
		nodes = append(nodes, n)
	}
	for _, n := range append(nodes, j.Base) {
		j.block = append(j.block, n.BlockAll(errInUse, graph.OpDataplane))
	}
}

// hold takes what the job relies on.
func (j *job) hold(tx *graph.Tx, mj *jobs.Job) error {
	spec := graph.RootSpec{Kind: graph.KindJob, Name: mj.ID(), Desc: mj.Describe(), StayAtNode: true, Job: true}
	keep := func(name string, c perm.Claim, n *graph.Node) error {
		spec.EdgeName, spec.Claim = name, c
		r, err := tx.AttachRoot(spec, n)
		j.holds = append(j.holds, r)
		return err
	}
	if err := keep("main node", perm.Claim{Share: perm.All}, j.Device); err != nil {
		return err
	}
	c := perm.Claim{Share: perm.WriteUnchanged | perm.Write}
	for n := j.Top; n != j.Base; n = chain.Below(n) {
		if n.SkipFilters() == j.Base.SkipFilters() {
			c.Share |= perm.ConsistentRead // a filter on the base
		}
		if err := keep("intermediate node", c, n); err != nil {
			return err
		}
	}
	if err := keep("base", perm.Claim{Share: perm.All}, j.Base); err != nil {
		return err
	}
	c = perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.ConsistentRead | perm.WriteUnchanged}
	if j.Base.Size() < j.Top.Size() {
		c.Need |= perm.Resize
	}
	spec = graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, StayAtNode: true, Job: true, Claim: c}
	var err error
	if j.base, err = tx.AttachRoot(spec, j.Base); err != nil {
		return err
	}
	spec.Claim = perm.Claim{Share: perm.All}
	j.top, err = tx.AttachRoot(spec, j.Top)
	return err
}

// Run implements jobs.Runner.
func (j *job) Run(ctx context.Context, h *jobs.Handle) error {
	size := j.Top.Size()
	h.SetRemaining(size)
	h.Yield()
	if j.Base.Size() < size {
		if err := j.grow(ctx, size); err != nil {
			return err
		}
	}
	return copy.Run(h, copy.Task{
		// The base is below the top: whoever waits for the base to be quiet waits for those who came in at the top.
		Gate: copy.RootGate(ctx, j.top), Size: size, Chunk: chunk, Workers: workers,
		Look: func(r *blk.Req, off, n int64) (copy.Extent, error) {
			if h.Limited() {
				n = min(n, limitedChunk)
			}
			return j.look(r, off, n)
		},
		Copy: j.copy, Side: j.side, RetryIgnored: true,
	})
}

func (j *job) grow(ctx context.Context, size int64) error {
	hold, err := j.g.HoldNodes(ctx, j.Base)
	if err != nil {
		return err
	}
	defer hold.Release()
	undrain, err := j.g.Drain(ctx, j.Base)
	if err != nil {
		return err
	}
	defer undrain()
	return chain.Grow(ctx, j.base.Edge(), size)
}

// look tells the copy engine what the layers above the base hold.
func (j *job) look(r *blk.Req, off, n int64) (copy.Extent, error) {
	x, err := j.top.Edge().StatusAbove(r, j.last, true, off, n)
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

func (j *job) copy(r *blk.Req, off int64, e copy.Extent) (int64, error) {
	if e.Action != copy.Zero {
		return copy.All(e.N, graph.Copy(r, j.top.Edge(), j.base.Edge(), off, e.N, 0))
	}
	if err := j.base.Edge().Zero(r, off, e.N, blk.MayUnmap); err != nil {
		return 0, &graph.CopyError{Write: true, Err: err}
	}
	return e.N, nil
}

// side tells reading errors from writing errors.
func (j *job) side(err error) (types.IoOperationType, types.BlockdevOnError) {
	var c *graph.CopyError
	if errors.As(err, &c) && c.Write {
		return types.IoOperationTypeWrite, j.OnError
	}
	return types.IoOperationTypeRead, j.OnError
}

// Prepare implements jobs.Preparer: it puts the base in the place of the top and rewrites the headers of the overlays, all or nothing.
func (j *job) Prepare(ctx context.Context, h *jobs.Handle) error {
	hold, err := j.g.Hold(ctx, func() ([]*graph.Node, error) {
		return append(chain.Between(j.filter, chain.Below(j.Base)), overlaysOf(j.filter)...), nil
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	ctx = context.WithoutCancel(ctx)
	var overlays []*graph.Node
	for _, e := range j.filter.Parents() {
		if n := e.ParentNode(); n != nil && e.Role()&perm.COW != 0 {
			overlays = append(overlays, n)
		}
	}
	// A filter in between keeps an overlay from being told of its new backing file, but not from reading it.
	for _, n := range overlaysOf(j.filter) {
		if !n.ReadOnly() {
			continue
		}
		nodes := n.WithFiles()
		if err := j.g.SwitchReadOnly(ctx, false, nodes...); err != nil {
			return err
		}
		defer func() {
			if err := j.g.SwitchReadOnly(ctx, true, nodes...); err != nil {
				slog.Warn("the overlay of a commit stays writable", "node", n.Name(), "err", err)
			}
		}()
	}
	for _, n := range overlaysOf(j.filter) {
		if err := j.hideTail(ctx, n); err != nil {
			return err
		}
	}
	tx := j.g.Begin(ctx)
	defer tx.Abort()
	tx.Quiet(j.top)
	if err := j.leave(tx); err != nil {
		return err
	}
	if err := tx.Detach(j.filter.FilteredChild()); err != nil {
		return err
	}
	if err := tx.ReplaceNode(j.filter, j.Base); err != nil {
		return err
	}
	name, format, err := chain.HeaderNames(j.Base, j.HeaderName, j.BackingFile, j.MaskProtocol)
	if err != nil {
		return err
	}
	for _, n := range overlays {
		tx.Drain(n)
		tx.Join(&chain.HeaderChange{Node: n, Base: j.Base, Name: name, Format: format})
	}
	below := j.filter.NodesBelow()
	if err := tx.Commit(); err != nil {
		return err
	}
	h.Quiesced(1, below...)
	j.filter = nil
	return nil
}

// leave lets tx give back what the job relies on.
func (j *job) leave(tx *graph.Tx) error {
	if err := errors.Join(tx.Thaw(j.filter, j.Base), tx.ThawOverlays(j.filter)); err != nil {
		return err
	}
	for _, r := range append(j.holds, j.top, j.base) {
		if err := tx.DetachRoot(r); err != nil {
			return err
		}
	}
	return nil
}

// Clean implements jobs.Cleaner.
func (j *job) Clean(*jobs.Handle) {
	if hold, err := j.g.HoldNodes(context.Background(), j.Top, j.Base); err == nil {
		defer hold.Release()
	}
	if j.filter != nil {
		chain.TakeOut(j.ID, j.filter, nil, j.leave)
		j.filter = nil
	}
	j.thaw() // where the graph was closed already
	j.restoreReadOnly()
	for _, f := range j.block {
		f()
	}
	j.block = nil
}
