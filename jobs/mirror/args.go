package mirror

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

// plan is what the arguments come to.
type plan struct {
	typ    types.JobType            // mirror or commit
	args   types.BlockdevMirrorArgs // canonical: nodes by their own names
	drive  *types.DriveMirror       // nil: not drive-mirror
	commit *types.BlockCommitArgs   // nil: not block-commit
	nodes  *blockdev.Manager

	source, target *graph.Node
	below          bool // the target is in the source's backing chain
	// base is where the copied part of the chain ends; nil: all is copied. For commits it is the
	// target.
	base        *graph.Node
	none        bool             // only what is written from now on is copied
	full        bool             // what the source has not allocated may read as anything in the target
	unmap       blk.Flags        // of zeroes that are written
	granularity int64            // bytes, a power of two
	bufSize     int64            // bytes
	opened      *blockdev.Opened // the target of drive-mirror
	backing     *graph.Node      // that it gets at the end if it is new; nil: none
}

func newJob(p plan) *Job { return &Job{copier: copier{plan: p}, patience: blockjob.NewPatience()} }

// FromArgs makes a job of blockdev-mirror that blockjob.Start starts.
func FromArgs(nodes *blockdev.Manager, a *types.BlockdevMirrorArgs) *Job {
	return newJob(plan{typ: types.JobTypeMirror, args: *a, nodes: nodes, unmap: blk.MayUnmap})
}

// FromDriveArgs makes a job of drive-mirror that blockjob.Start starts.
func FromDriveArgs(nodes *blockdev.Manager, a *types.DriveMirror) *Job {
	p := plan{typ: types.JobTypeMirror, drive: a, nodes: nodes, args: types.BlockdevMirrorArgs{
		JobID: a.JobID, Device: a.Device, Replaces: a.Replaces, Sync: a.Sync, Speed: a.Speed, Granularity: a.Granularity,
		BufSize: a.BufSize, OnSourceError: a.OnSourceError, OnTargetError: a.OnTargetError, CopyMode: a.CopyMode,
		AutoFinalize: a.AutoFinalize, AutoDismiss: a.AutoDismiss,
	}}
	if types.Or(a.Unmap, true) {
		p.unmap = blk.MayUnmap
	}
	return newJob(p)
}

// EnterCommit creates a job of block-commit of a node that is written to, and puts it into the
// graph. The nodes are held, and were checked.
func EnterCommit(
	ctx context.Context, m *jobs.Manager, top, base *graph.Node, a *types.BlockCommitArgs,
) (*jobs.Job, error) {
	p := plan{typ: types.JobTypeCommit, commit: a, source: top, target: base, base: base, unmap: blk.MayUnmap}
	p.args = types.BlockdevMirrorArgs{
		JobID: a.JobID, Device: top.Name(), Target: base.Name(), Speed: a.Speed,
		OnSourceError: a.OnError, OnTargetError: a.OnError, FilterNodeName: a.FilterNodeName,
		AutoFinalize: a.AutoFinalize, AutoDismiss: a.AutoDismiss,
	}
	j := newJob(p)
	if err := j.setSizes(); err != nil {
		return nil, err
	}
	return j.enter(ctx, m)
}

// Enter implements blockjob.Job.
func (j *Job) Enter(ctx context.Context, m *jobs.Manager) (mj *jobs.Job, err error) {
	j.full = j.args.Sync == types.MirrorSyncModeFull
	if j.drive == nil {
		if err := j.checkNames(); err != nil {
			return nil, err
		}
	} else {
		if err := j.openTarget(ctx); err != nil {
			return nil, err
		}
		defer func() { j.opened.Finish(err) }()
	}
	if err := j.check(); err != nil {
		return nil, err
	}
	return j.enter(ctx, m)
}

func (p *plan) existing() bool {
	return types.Or(p.drive.Mode, types.NewImageModeAbsolutePaths) == types.NewImageModeExisting
}

func (p *plan) policies() copy.Policies {
	return copy.PoliciesOf(p.args.OnSourceError, p.args.OnTargetError)
}

// Find implements blockjob.Job.
func (p *plan) Find() (nodes []*graph.Node, err error) {
	a := &p.args
	if p.source, err = p.nodes.LookupRoot(a.Device); err != nil {
		return nil, err
	}
	if n := p.source.Graph().Node(types.Or(a.Replaces, "")); n != nil {
		nodes = append(nodes, n)
	}
	if p.drive != nil {
		return append(nodes, p.source), p.source.Blocked(graph.OpMirrorSource)
	}
	if p.target, err = p.nodes.Lookup(&a.Target, &a.Target); err != nil {
		return nil, err
	}
	return append(nodes, p.source, p.target), nil
}

func (p *plan) checkNames() error {
	if _, err := graph.GivenName(p.args.FilterNodeName); err != nil {
		return err
	}
	if types.Or(p.args.Replaces, "none") == "" {
		return errors.New("Failed to find node with node-name=''")
	}
	return nil
}

// openTarget makes and opens the file of drive-mirror.
func (p *plan) openTarget(ctx context.Context) error {
	a := p.drive
	if a.Replaces != nil && a.NodeName == nil {
		return errors.New("a node-name must be provided when replacing a named node of the graph")
	}
	name, err := graph.GivenName(a.NodeName)
	if err != nil {
		return err
	}
	if e := p.source.SkipFilters().Backing(); e != nil {
		p.backing = e.Node()
	}
	switch p.full = p.full || a.Sync == types.MirrorSyncModeTop && p.backing == nil; {
	case p.full:
		p.backing = nil
	case a.Sync == types.MirrorSyncModeNone:
		p.backing = p.source
	}
	p.opened, err = p.nodes.OpenImage(ctx, blockdev.OpenImage{
		Filename: a.Target, Mode: a.Mode, Format: a.Format, Name: name, For: p.source, Below: p.backing, View: graph.Now,
	})
	if err != nil {
		return err
	}
	p.target = p.opened.Node()
	p.args.Target = p.target.Name()
	p.full = p.full && (p.existing() || !p.target.Caps().ZeroInit)
	return nil
}

// check refuses what cannot be mirrored, in QEMU's order.
func (p *plan) check() error {
	switch g := types.Or(p.args.Granularity, 0); {
	case g != 0 && (g < graph.MinGranularity || g > 64<<20):
		return errors.New("Parameter 'granularity' expects a value in range [512B, 64MB]")
	case g&(g-1) != 0:
		return errors.New("Parameter 'granularity' expects a power of 2")
	}
	if err := p.source.Blocked(graph.OpMirrorSource); err != nil {
		return err
	}
	if err := p.target.Blocked(graph.OpMirrorTarget); err != nil {
		return err
	}
	if n := graph.Now.SkipImplicitFilters(p.source); types.Or(p.args.Replaces, "") == "" && n != p.source {
		p.args.Replaces = new(n.Name())
	}
	if name := types.Or(p.args.Replaces, ""); name != "" {
		if err := checkReplaces(p.source, name); err != nil {
			return err
		}
	}
	switch p.args.Sync {
	case types.MirrorSyncModeIncremental, types.MirrorSyncModeBitmap:
		return fmt.Errorf("Sync mode '%s' not supported", p.args.Sync)
	case types.MirrorSyncModeTop:
		p.base = graph.Now.BackingChainNext(p.source) // nil: all is copied
	case types.MirrorSyncModeNone:
		p.none = true
	}
	return p.setSizes()
}

// setSizes takes the sizes that the arguments give, or good ones.
func (p *plan) setSizes() error {
	if p.granularity = int64(types.Or(p.args.Granularity, 0)); p.granularity == 0 {
		p.granularity = p.target.Bitmaps().DefaultGranularity()
	}
	if p.bufSize = types.Or(p.args.BufSize, 0); p.bufSize == 0 {
		p.bufSize = maxInFlight * maxCopy
	}
	if p.bufSize < 0 {
		return errors.New("Invalid parameter 'buf-size'")
	}
	return nil
}

// checkReplaces tells why a mirror of source cannot take the place of the node of that name.
func checkReplaces(source *graph.Node, name string) error {
	n := source.Graph().Node(name)
	if n == nil {
		return fmt.Errorf("Failed to find node with node-name='%s'", name)
	}
	if err := n.Blocked(graph.OpReplace); err != nil {
		return err
	}
	if !canReplace(source, n) {
		return fmt.Errorf("Cannot replace '%s' by a node mirrored from '%s', because it cannot be guaranteed that doing so"+
			" would not lead to an abrupt change of visible data", name, source.Name())
	}
	if n.Size() != source.Size() {
		return errors.New("cannot replace image with a mirror image of different size")
	}
	return nil
}

// misfit tells whether the target has a size of its own that is not the source's.
func (p *plan) misfit() bool { return p.base != p.target && p.source.Size() != p.target.Size() }

// zeroesUnmap tells whether zeroing the target is fast and takes no space.
func (p *plan) zeroesUnmap() bool {
	return p.target.Options().Discard && p.target.Caps().ZeroFlags&blk.MayUnmap != 0
}

// between are the nodes between source and a target below it.
func (p *plan) between() []*graph.Node {
	if !p.below {
		return nil
	}
	return graph.Now.Chain(graph.Now.Below(p.source), p.target)
}

// rebase lets tx give the target of drive-mirror its backing file; one that it opens is returned.
func (p *plan) rebase(ctx context.Context, tx *graph.Tx) (*blockdev.Opened, error) {
	n := p.target.SkipFilters()
	switch {
	case p.drive == nil:
		return nil, nil
	case !p.existing():
		return nil, blockdev.SetBacking(tx, n, p.backing)
	case n.Backing() != nil:
		return nil, nil
	}
	return p.nodes.OpenBacking(ctx, tx, n)
}
