// Package mirror is the job behind blockdev-mirror, and behind block-commit of a node that is written to: it copies a node to a target, keeps the two
// in step until it is told to complete, and then puts the target in the node's place.
//
//	 before         while it runs                                 after completion
//
//	parents         parents                                       parents
//	   |               |                                             |
//	 source         filter (mirror_top) . . . job . . . target     target      source
//	   |               | backing                                     |            |
//	                 source --- bits say what is to be copied
//	                   |
//
// A bitmap of the source records what is written; the job copies what is dirty, over and over. What is dirty is clean before it is read, so a write in
// between makes it dirty again.
//
//	running: copy what is dirty --> nothing dirty, flushed --> ready: go on copying --complete--> drained, nothing dirty, flushed --> pivot
//
// In the mode write-blocking, guests' writes go to both sides before they are answered (both.go), so that they make nothing dirty. From then on the
// background has to copy each granule that is dirty once at most, however fast guests write: the job gets ready in the time that takes.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/chain"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

const (
	// workers copy extents at the same time. A second one makes nothing faster where the kernel copies, and takes a processor from guests.
	workers = 1
	// maxCopy is the most that one copy takes, in bytes, and shortCopy that while guests may have to wait for it.
	maxCopy   = 1 << 20
	shortCopy = 256 << 10
	// maxInFlight is how many extents the reference has in flight; its buffer size is counted in those.
	maxInFlight = 16
)

// Args says what to mirror. The nodes were looked up by the caller, who has checked that no operation on them is blocked.
type Args struct {
	ID             string
	Type           types.JobType // mirror or commit
	Source, Target *graph.Node
	Replaces       string // name of the node that the target replaces; "": the source
	// Base is where the copied part of the source's backing chain ends; nil: all is copied. For commits it is the target.
	Base *graph.Node
	// None copies only what is written from now on.
	None bool
	// ZeroTarget: what the source has not allocated may read as anything in the target.
	ZeroTarget     bool
	Speed          int64 // bytes per second, 0: no limit
	Granularity    int64 // bytes, a power of two; 0: as fits the target
	BufSize        int64 // bytes; 0: as much as is good
	OnSourceError  types.BlockdevOnError
	OnTargetError  types.BlockdevOnError
	Unmap          bool
	CopyMode       types.MirrorCopyMode
	FilterNodeName string // "": generated, and the filter is implicit
	// Hold is the caller's of the nodes; it ends before the job goes to work. Nil: there is none.
	Hold           *graph.Hold
	ManualFinalize bool
	ManualDismiss  bool
	// Publish lets the transaction that starts the job make a target visible that was opened for it; nil: it is visible.
	Publish func(tx *graph.Tx) error
	// Rebase lets the last transaction of a job that succeeds give the target its backing file; nil: it has what it needs. end is called, unless there
	// was an error, when the transaction is over.
	Rebase func(ctx context.Context, tx *graph.Tx) (end func(committed bool), err error)
}

// job is the runner.
type job struct {
	Args
	g      *graph.Graph
	m      *jobs.Manager
	mj     *jobs.Job
	commit bool // the target is in the source's backing chain
	filter *graph.Node
	driver *filterDriver
	dirty  *graph.DirtyBitmap
	bits   *bitmap.Bitmap // of dirty
	ranges ranges

	root   *graph.Root   // on the filter: reads
	target *graph.Root   // on the target: writes
	holds  []*graph.Root // what else the job relies on
	thaw   func()

	life    life
	mu      sync.Mutex // guards block and replace: Complete may come while the job ends
	block   []func()
	replace *graph.Node // what the target replaces; nil: the source

	// wasReadOnly are the nodes of a base that a commit has made writable.
	wasReadOnly []*graph.Node
	claimed     bool // the target is blocked by this job itself already

	// Set by Run before the first copy.
	h *jobs.Handle
	// hidden is the target's cluster size, in bytes, if its backing file is not opened: of a cluster that gets anything nothing shows through later. It is
	// allCluster as well if granules are smaller; both 0: neither.
	hidden, allCluster     int64
	alone                  bool         // what the target does not hold are zeroes for good
	asked                  int64        // up to where the walk knows that there are no long zeroes
	saysZero, showsBacking bool         // the target's own allocation tells whether a backing file shows; one could at all
	both                   atomic.Int64 // bytes of writes to both sides under way

	held    *graph.Hold // of the nodes, for the end
	undrain func()      // while the source is held quiet for the end
}

func errInUse(t types.JobType) error {
	return fmt.Errorf("block device is in use by block job: %s", t)
}

// Start checks the arguments, inserts the filter and starts the job; see jobs.Manager.Start for release. On error nothing has changed.
func Start(ctx context.Context, m *jobs.Manager, a Args) (release func(), err error) {
	mj, err := Enter(ctx, m, a)
	if err != nil {
		return nil, err
	}
	a.Hold.Release()
	return m.Start(mj), nil
}

// Enter is Start that leaves it to the caller to start the job.
func Enter(ctx context.Context, m *jobs.Manager, a Args) (*jobs.Job, error) {
	j := &job{Args: a, g: a.Source.Graph(), m: m, thaw: func() {}}
	if err := j.check(); err != nil {
		return nil, err
	}
	if j.Type == types.JobTypeCommit && j.Target.ReadOnly() {
		release, err := chain.Claim(ctx, j.Target, graph.OpCommitTarget, errInUse(j.Type))
		if err != nil {
			return nil, err
		}
		defer release()
		j.claimed = true
		if err := j.makeWritable(ctx); err != nil {
			return nil, err
		}
	}
	if err := j.attach(ctx); err != nil {
		j.restoreReadOnly()
		return nil, err
	}
	return j.mj, nil
}

func (j *job) check() error {
	if j.Granularity == 0 {
		j.Granularity = j.Target.DefaultGranularity()
	}
	switch {
	case j.BufSize < 0:
		return errors.New("Invalid parameter 'buf-size'")
	case j.BufSize == 0:
		j.BufSize = maxInFlight * maxCopy
	}
	if j.Source.SkipFilters() == j.Target.SkipFilters() {
		return errors.New("Can't mirror node into itself")
	}
	j.life.setMode(j.CopyMode)
	return nil
}

// attach builds the filter and the job's holds in one transaction.
func (j *job) attach(ctx context.Context) error {
	tx := j.g.Begin(ctx)
	defer tx.Abort()
	j.commit = graph.Now.InChain(j.Source, j.Target)
	if j.Publish != nil {
		if err := j.Publish(tx); err != nil {
			return err
		}
	}
	source := j.Source.Options()
	filter, err := tx.NewNode(&graph.Options{
		Name: j.FilterNodeName, DriverName: DriverName, Kind: graph.Filter,
		Implicit: j.FilterNodeName == "", NeverFreeze: true, Discard: true, Direct: source.Direct, NoFlush: source.NoFlush,
	})
	if err != nil {
		return err
	}
	j.filter, j.driver = filter, &filterDriver{node: filter, job: j}
	filter.SetDriver(j.driver)
	if _, err := tx.InsertFilter(filter, "backing", j.Source); err != nil {
		return err
	}
	if err := tx.Try(); err != nil {
		return err
	}
	seenAs := visible.Mirror
	if j.Type == types.JobTypeCommit {
		seenAs = visible.ActiveCommit
	}
	j.mj, err = j.m.Create(jobs.Spec{
		ID: j.ID, Type: j.Type, Runner: j, Block: true, Speed: j.Speed, ManualFinalize: j.ManualFinalize, ManualDismiss: j.ManualDismiss,
		SeenAs: seenAs, Instant: !j.misfit() && visible.StartFirst(seenAs, visible.Disks{
			AtOnce: j.Source.Instant() && j.Target.Instant(), Size: j.Source.Size(), Nothing: j.None,
		}),
		Nodes: []*graph.Node{filter, j.Target},
	})
	if err != nil {
		return err
	}
	err = j.hold(tx)
	if err == nil {
		err = tx.Publish(filter)
	}
	if err == nil {
		tx.Check(j.blocked)
		tx.Join(starting{j})
		err = tx.Commit()
	}
	if err != nil {
		j.m.Discard(j.mj)
	}
	return err
}

// blocked tells why another job does not let this one in. Asked with the nodes reserved: of two that start at the same time one sees the other.
func (j *job) blocked() error {
	source, target := graph.OpMirrorSource, graph.OpMirrorTarget
	if j.Type == types.JobTypeCommit {
		// Only the device must not be a backing file, and the caller has seen to that.
		source, target = graph.OpCommitTarget, graph.OpCommitTarget
	}
	if err := j.Source.Blocked(source); err != nil {
		return err
	}
	for _, n := range j.between() {
		if err := n.Blocked(graph.OpCommitTarget); err != nil { // they are backing files
			return err
		}
	}
	if j.claimed {
		return nil
	}
	return j.Target.Blocked(target)
}

// starting makes the bitmap, and keeps others away from the nodes, at the moment when the filter is in the graph: the source is quiet.
type starting struct{ *job }

func (s starting) Prepare(context.Context) (err error) {
	s.dirty, err = s.Source.NewDirtyBitmap(graph.DirtyBitmapSpec{Granularity: s.Granularity})
	return err
}

func (s starting) Abort() {
	if s.dirty != nil {
		s.dirty.Remove()
	}
}

func (s starting) Commit() {
	s.bits = s.dirty.Bits()
	for _, n := range append(s.between(), s.filter, s.Source, s.Target) {
		s.block = append(s.block, n.BlockAll(errInUse(s.Type), graph.OpDataplane))
	}
}

// between are the nodes between source and a target below it.
func (j *job) between() []*graph.Node {
	if !j.commit {
		return nil
	}
	return graph.Now.Chain(graph.Now.Below(j.Source), j.Target)
}

// hold takes what the job relies on.
func (j *job) hold(tx *graph.Tx) error {
	const others = perm.ConsistentRead | perm.WriteUnchanged | perm.Write
	spec := graph.RootSpec{Kind: graph.KindJob, Name: j.mj.ID(), Desc: j.mj.Describe(), StayAtNode: true, Job: true}
	add := func(name string, c perm.Claim, n *graph.Node) (*graph.Root, error) {
		spec.EdgeName, spec.Claim = name, c
		return tx.AttachRoot(spec, n)
	}
	var err error
	if j.root, err = add("main node", perm.Claim{Need: perm.ConsistentRead, Share: others}, j.filter); err != nil {
		return err
	}
	c := perm.Claim{Need: perm.Write, Share: perm.WriteUnchanged}
	if j.commit {
		if c.Share = others; j.Target.Size() < j.Source.Size() {
			c.Need |= perm.Resize
		}
	} else if graph.Now.InChain(j.Source, j.Target.SkipFilters()) {
		return errors.New("Cannot mirror to a filter on top of a node in the source's backing chain")
	}
	j.target, err = tx.AttachRoot(graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, StayAtNode: true, Job: true, Claim: c}, j.Target)
	if err != nil {
		return err
	}
	keep := func(name string, c perm.Claim, n *graph.Node) error {
		r, err := add(name, c, n)
		j.holds = append(j.holds, r)
		return err
	}
	if err := keep("source", perm.Claim{Share: others}, j.Source); err != nil {
		return err
	}
	if err := keep("target", perm.Claim{Share: perm.All}, j.Target); err != nil {
		return err
	}
	c = perm.Claim{Share: perm.WriteUnchanged | perm.Write}
	for _, n := range j.between() {
		if n.SkipFilters() == j.Target.SkipFilters() {
			c.Share = others // a filter on the base
		}
		if err := keep("intermediate node", c, n); err != nil {
			return err
		}
	}
	if j.commit {
		j.thaw, err = tx.FreezeChain(j.Source, j.Target)
	}
	return err
}

// Cancel implements jobs.Canceler: a job that is ready, and is asked gently, ends as a success without touching its parents.
func (j *job) Cancel(force bool) bool { return force || j.life.get().phase == copying }

// Complete implements jobs.Completer.
func (j *job) Complete(context.Context) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.Replaces != "" && j.replace == nil && j.life.get().phase <= ready {
		n := j.g.Node(j.Replaces)
		if n == nil {
			return fmt.Errorf("Node name '%s' not found", j.Replaces)
		}
		j.replace = n
		j.block = append(j.block, n.BlockAll(errors.New("block device is in use by block-job-complete")))
	}
	j.life.complete()
	return nil
}

// ChangeCopyMode is the body of block-job-change. The job takes to the mode at its next step.
func (j *job) ChangeCopyMode(to types.MirrorCopyMode) { j.life.setMode(to) }
