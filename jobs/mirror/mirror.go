// Package mirror is the job behind blockdev-mirror, and behind block-commit of a node that is
// written to: it copies a node to a target, keeps the two in step until it is told to complete, and
// then puts the target in the node's place.
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
// A bitmap of the source records what is written; the job copies what is dirty, over and over. What
// is dirty is clean before it is read, so a write in between makes it dirty again.
//
//	copying --nothing dirty, flushed--> ready --told to complete--> quiet, equal, flushed --> pivot
//
// In the mode write-blocking, guests' writes go to both sides before they are answered (both.go),
// so that they make nothing dirty. From then on the background has to copy each granule that is
// dirty once at most, however fast guests write: the job gets ready in the time that takes.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

const (
	// workers copy extents at the same time on this machine. A second one makes nothing faster where
	// the kernel copies, and takes a processor from guests.
	workers = 1
	// maxCopy is the most that one copy takes, in bytes, and shortCopy that while guests may have
	// to wait for it.
	maxCopy   = 1 << 20
	shortCopy = 256 << 10
	// maxInFlight is how many extents QEMU has in flight; its buffer size is counted in those.
	maxInFlight = 16
)

// Job is a job of blockdev-mirror or drive-mirror, or of block-commit of a node that is written to,
// before its start and as it runs.
type Job struct {
	copier
	site blockjob.Site
	// of the job's requests at both sides
	patience blockjob.Patience

	dirty *graph.DirtyBitmap
	reads *graph.Root // the job's requests at the filter

	mu      sync.Mutex // guards unblock and replace: Complete may come while the job ends
	unblock func()
	replace *graph.Node // what the target replaces; nil: the source

	both    atomic.Int64 // bytes of writes to both sides under way
	held    *graph.Hold  // of the nodes, for the end
	undrain func()       // while the source is held quiet for the end
}

// enter creates the job and puts it into the graph.
func (j *Job) enter(ctx context.Context, m *jobs.Manager) (*jobs.Job, error) {
	if j.source.SkipFilters() == j.target.SkipFilters() {
		return nil, errors.New("Can't mirror node into itself")
	}
	j.life.setMode(types.Or(j.args.CopyMode, types.MirrorCopyModeBackground))
	j.below = graph.Now.InChain(j.source, j.target)
	if j.typ == types.JobTypeCommit {
		if err := j.site.MakeWritable(ctx, j.target); err != nil {
			return nil, err
		}
	}
	return j.site.Enter(ctx, j.source.Graph(), func(tx *graph.Tx) error { return j.fill(tx, m) })
}

// fill builds the filter and takes what the job relies on.
func (j *Job) fill(tx *graph.Tx, m *jobs.Manager) error {
	if j.opened != nil {
		if err := j.opened.Publish(tx); err != nil {
			return err
		}
	}
	name, _ := graph.GivenName(j.args.FilterNodeName)
	o := graph.Options{DriverName: DriverName, NeverFreeze: true, Discard: true}
	filter, err := j.site.MakeFilter(tx, name, o)
	if err != nil {
		return err
	}
	j.driver = &filterDriver{graph.Through(filter), j}
	filter.SetDriver(j.driver)
	if _, err := tx.InsertFilter(filter, "backing", j.source); err != nil {
		return err
	}
	if err := tx.Try(); err != nil {
		return err
	}
	a := &j.args
	spec := blockjob.Spec(j.typ, j, a.JobID, a.Speed, a.AutoFinalize, a.AutoDismiss)
	if spec.SeenAs, spec.Args = visible.Mirror, a; j.commit != nil {
		spec.SeenAs, spec.Args = visible.ActiveCommit, j.commit
	}
	spec.Nodes = []*graph.Node{filter, j.target}
	spec.Instant = !j.misfit() && visible.StartFirst(spec.SeenAs, visible.Disks{
		AtOnce: graph.Now.Instant(j.source) && graph.Now.Instant(j.target), Size: j.source.Size(), Nothing: j.none,
	})
	if err := j.site.Create(m, spec); err != nil {
		return err
	}
	if err := j.keep(tx); err != nil {
		return err
	}
	tx.Check(j.blocked)
	tx.Join(starting{j})
	j.site.BlockAt(tx, append(j.between(), filter, j.source, j.target)...)
	return nil
}

// blocked tells why another job that uses a node between source and target does not let this one
// in.
func (j *Job) blocked() error {
	for _, n := range j.between() {
		if err := n.Blocked(graph.OpCommitTarget); err != nil { // they are backing files
			return err
		}
	}
	return nil
}

// starting makes the bitmap at the moment when the filter is in the graph: the source is quiet.
type starting struct{ *Job }

func (s starting) Prepare(context.Context) (err error) {
	s.dirty, err = s.source.Bitmaps().New(graph.DirtyBitmapSpec{Granularity: s.granularity})
	return err
}

func (s starting) Abort() {
	if s.dirty != nil {
		s.dirty.Remove()
	}
}

func (s starting) Commit() { s.bits = s.dirty.Bits() }

// keep takes what the job relies on.
func (j *Job) keep(tx *graph.Tx) error {
	const others = perm.ConsistentRead | perm.WriteUnchanged | perm.Write
	target := perm.Claim{Need: perm.Write, Share: perm.WriteUnchanged}
	if j.below {
		if target.Share = others; j.target.Size() < j.source.Size() {
			target.Need |= perm.Resize
		}
	} else if graph.Now.InChain(j.source, j.target.SkipFilters()) {
		return errors.New("Cannot mirror to a filter on top of a node in the source's backing chain")
	}
	uses := []blockjob.Use{
		{Name: "main node", Node: j.site.Filter, Claim: perm.Claim{Need: perm.ConsistentRead, Share: others},
			Root: &j.reads, Ctx: j.patience.Ctx},
		{Node: j.target, Claim: target, Root: &j.writes, Ctx: j.patience.Ctx},
		{Name: "source", Node: j.source, Claim: perm.Claim{Share: others}},
		{Name: "target", Node: j.target, Claim: perm.Claim{Share: perm.All}},
	}
	c := perm.Claim{Share: perm.WriteUnchanged | perm.Write}
	for _, n := range j.between() {
		if n.SkipFilters() == j.target.SkipFilters() {
			c.Share = others // a filter on the base
		}
		uses = append(uses, blockjob.Use{Name: "intermediate node", Node: n, Claim: c})
	}
	err := j.site.Keep(tx, uses...)
	if err == nil && j.below {
		err = j.site.FreezeChain(tx, j.source, j.target)
	}
	return err
}

// Cancel implements jobs.Canceler: a job that is ready, and is asked gently, ends as a success
// without touching its parents.
func (j *Job) Cancel(force bool) bool { return force || j.life.get().phase == copying }

// Complete implements jobs.Completer.
func (j *Job) Complete(context.Context) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if name := types.Or(j.args.Replaces, ""); name != "" && j.replace == nil && j.life.get().phase <= ready {
		n := j.source.Graph().Node(name)
		if n == nil {
			return fmt.Errorf("Node name '%s' not found", name)
		}
		j.replace = n
		j.unblock = n.Block(graph.AllOps, errors.New("block device is in use by block-job-complete"))
	}
	j.life.complete()
	return nil
}

// ChangeCopyMode is the body of block-job-change. The job takes to the mode at its next step.
func (j *Job) ChangeCopyMode(to types.MirrorCopyMode) { j.life.setMode(to) }
