// Package rebase is the job behind x-qblockd-rebase: it gives an image another backing file and
// leaves what its guests see as it is. What the image has from below is compared in the old and the
// new one; what differs is copied into the image, and then its backing link and header are changed.
//
//	 before            while it runs                    after
//
//	parents             parents                        parents
//	   |                   |                              |
//	 image              filter (copy-on-read)           image
//	   | backing           | file                         | backing
//	  old                image <-- what differs         base
//	                       | backing (frozen)
//	                      old          base (nobody writes to it)
//
// Guests keep writing: each extent is compared and copied under a conflict lock on the image, and
// only where that has nothing of its own by then. As it has a backing file all the while, nothing
// that it has becomes unallocated: so at the end all that it has not is the same in both.
package rebase

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

const (
	// chunk is the largest extent that is compared at once, in bytes; one such extent is the grain
	// of the speed limit.
	chunk = 512 << 10
	// workers compare extents at the same time.
	workers = 4
)

// Job is a job of x-qblockd-rebase, before its start and as it runs.
type Job struct {
	args  types.XQblockdRebaseArgs
	nodes *blockdev.Manager
	site  blockjob.Site

	image      *graph.Node
	base       *graph.Node // the new backing file, or nil
	filterName string
	guests     *atomic.Bool // see blockjob.Site.MakeCopyFilter
	root       *graph.Root  // the job's requests
	reads      *graph.Root  // those to base, or nil
}

// FromArgs makes a job that blockjob.Start starts.
func FromArgs(nodes *blockdev.Manager, a *types.XQblockdRebaseArgs) (*Job, error) {
	if a.BaseNode == nil && a.BackingFile != nil {
		return nil, errors.New("backing file specified, but no base")
	}
	return &Job{args: *a, nodes: nodes}, nil
}

// Find implements blockjob.Job.
func (j *Job) Find() ([]*graph.Node, error) {
	a := &j.args
	device, err := j.nodes.Lookup(&a.Device, &a.Device)
	if err != nil {
		return nil, err
	}
	if j.filterName, err = graph.GivenName(a.FilterNodeName); err != nil {
		return nil, fmt.Errorf("Could not create node: %w", err)
	}
	j.image, j.base = device.SkipFilters(), nil
	if err := j.image.Blocked(graph.OpStream); err != nil {
		return nil, err
	}
	d, ok := j.image.Driver().(graph.BackingChanger)
	if !ok {
		return nil, fmt.Errorf("Driver '%s' cannot store a backing file", j.image.DriverName())
	}
	if j.image.Backing() == nil {
		return nil, fmt.Errorf("Node '%s' has no backing file", j.image.Name())
	}
	if a.BaseNode == nil {
		return []*graph.Node{j.image}, nil
	}
	if j.base, err = j.nodes.Lookup(nil, a.BaseNode); err != nil {
		return nil, err
	}
	if slices.Contains(j.base.NodesBelow(), j.image) {
		return nil, fmt.Errorf("Node '%s' depends on '%s', and cannot become its backing file", j.base.Name(), j.image.Name())
	}
	name, format, err := j.nodes.HeaderNames(j.base, a.BackingFile, a.BackingMaskProtocol)
	if err != nil {
		return nil, err
	}
	if err := d.CheckBackingFile(name, format); err != nil {
		return nil, fmt.Errorf("Could not change backing file to '%s': %s", name, blk.ErrnoText(err))
	}
	return []*graph.Node{j.image, j.base}, nil
}

// Enter implements blockjob.Job.
func (j *Job) Enter(ctx context.Context, m *jobs.Manager) (*jobs.Job, error) {
	if err := j.freezable(ctx); err != nil {
		return nil, err // told before the image is made writable, or cannot be
	}
	if err := j.site.MakeWritable(ctx, j.image); err != nil {
		return nil, err
	}
	return j.site.Enter(ctx, j.image.Graph(), func(tx *graph.Tx) error { return j.fill(tx, m) })
}

// freezable tells why another job does not let the backing link be frozen.
func (j *Job) freezable(ctx context.Context) error {
	tx := j.image.Graph().Begin(ctx)
	defer tx.Abort()
	_, err := tx.FreezeChain(j.image, graph.Now.Below(j.image))
	return err
}

func (j *Job) fill(tx *graph.Tx, m *jobs.Manager) (err error) {
	if err = j.site.FreezeChain(tx, j.image, graph.Now.Below(j.image)); err != nil {
		return err
	}
	if j.guests, err = j.site.MakeCopyFilter(tx, j.filterName, j.image); err != nil {
		return fmt.Errorf("Could not create node: %w", err)
	}
	a := &j.args
	spec := blockjob.Spec(types.JobTypeXQblockdRebase, j, a.JobID, a.Speed, a.AutoFinalize, a.AutoDismiss)
	spec.Nodes, spec.Args = []*graph.Node{j.site.Filter}, a
	if err := j.site.Create(m, spec); err != nil {
		return err
	}
	j.site.BlockAt(tx, j.image, j.site.Filter)
	return j.keep(tx)
}

// keep takes what the job relies on: the right to read and to write unchanged data at the image, no
// resize there, and no writes to the new backing file.
func (j *Job) keep(tx *graph.Tx) error {
	const unchanging = perm.ConsistentRead | perm.WriteUnchanged
	uses := []blockjob.Use{
		{Name: "main node", Node: j.site.Filter, Claim: perm.Claim{Share: perm.All}},
		{Name: "active node", Node: j.image, Claim: perm.Claim{Share: unchanging | perm.Write}},
		{
			Node: j.site.Filter, Root: &j.root,
			Claim: perm.Claim{Need: perm.ConsistentRead, Share: unchanging | perm.Write},
		},
	}
	if j.base != nil {
		uses = append(uses, blockjob.Use{
			Node: j.base, Claim: perm.Claim{Need: perm.ConsistentRead, Share: unchanging}, Root: &j.reads,
		})
	}
	return j.site.Keep(tx, uses...)
}

// Run implements jobs.Runner.
func (j *Job) Run(ctx context.Context, h *jobs.Handle) error {
	size := j.image.Size()
	h.SetRemaining(size)
	c := copier{image: j.site.Filter.FilteredChild(), below: j.image.Backing(), grain: j.grain()}
	t := copy.Task{
		Gate: copy.RootGate(ctx, j.root), Size: size, Chunk: chunk, Guests: j.guests,
		Look: c.look, Copy: c.copy, Side: copy.PoliciesOf(j.args.OnError, j.args.OnError).Side,
	}
	nodes := []*graph.Node{j.image}
	if j.base != nil {
		c.base, t.Gate = j.reads.Edge(), copy.BothGates(ctx, j.root, j.reads)
		if graph.Now.InChain(j.image, j.base) {
			c.shared = j.base
		}
		nodes = append(nodes, j.base)
	}
	t.SetWorkers(workers, nodes...)
	return copy.Run(h, t)
}

// grain is how much is compared as a whole: what the image allocates at once, if a chunk is made of
// such.
func (j *Job) grain() int64 {
	if n := j.image.Caps().Limits.ClusterSize; n > 0 && n <= chunk {
		return n
	}
	return chunk
}

// Prepare implements jobs.Preparer: it removes the filter, changes the backing link, and rewrites
// the image's header, all or nothing.
func (j *Job) Prepare(ctx context.Context, _ *jobs.Handle) error {
	nodes := []*graph.Node{j.image}
	if j.base != nil {
		nodes = append(nodes, j.base)
	}
	g := j.image.Graph()
	hold, err := g.HoldNodes(ctx, nodes...)
	if err != nil {
		return err
	}
	defer hold.Release()
	tx := g.Begin(context.WithoutCancel(ctx))
	defer tx.Abort()
	if err := j.site.Leave(tx); err != nil {
		return err
	}
	if err := tx.RemoveFilter(j.site.Filter); err != nil {
		return err
	}
	if err := j.change(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	j.site.Filter = nil
	return nil
}

// change lets tx change the backing link and the header.
func (j *Job) change(tx *graph.Tx) (err error) {
	cow, header := j.image.Backing(), &blockdev.HeaderChange{Node: j.image}
	if j.base == nil {
		err = tx.Detach(cow)
	} else {
		a := &j.args
		header.Name, header.Format, err = j.nodes.HeaderNames(j.base, a.BackingFile, a.BackingMaskProtocol)
		if err == nil && cow.Node() != j.base {
			err = tx.Replace(cow, j.base)
		}
	}
	if err != nil {
		return err
	}
	tx.Drain(j.image)
	tx.Join(header)
	return nil
}

// Clean implements jobs.Cleaner.
func (j *Job) Clean(*jobs.Handle) {
	hold, _ := j.image.Graph().HoldNodes(context.Background(), j.image) // none if the graph is closed
	defer hold.Release()
	j.site.Release()
}
