// Package stream is the job behind block-stream: it copies what the backing chain of a node holds
// into the node, down to a base that stays, and then makes the node's backing link skip what it has
// copied.
//
//	 before                 while it runs                     after
//
//	parents                parents                           parents
//	   |                      |                                 |
//	  top                  filter (copy-on-read)               top
//	   | backing              | file                            | backing
//	  mid                    top <--- writes what is read      base
//	   | backing              | backing       (frozen)
//	  base                   mid
//	                          | backing
//	                         base
//
// Guests keep writing: each extent is copied under a conflict lock on the top node, and only where
// the top node has nothing of its own by then.
package stream

import (
	"context"
	"fmt"
	"sync/atomic"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/copy"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

const (
	// chunk is the largest extent copied at once, in bytes; one such extent is the grain of the
	// speed limit.
	chunk = 512 << 10
	// workers copy extents at the same time.
	workers = 4
)

// Job is a job of block-stream, before its start and as it runs.
type Job struct {
	args  types.BlockStreamArgs
	nodes *blockdev.Manager
	site  blockjob.Site

	chain      []*graph.Node // from the top to the node directly above what stays
	last       *graph.Node   // the last one to be copied: one of the chain, and no filter
	filterName string
	guests     *atomic.Bool // see blockjob.Site.MakeCopyFilter
	root       *graph.Root  // the job's requests
}

// FromArgs makes a job that blockjob.Start starts.
func FromArgs(nodes *blockdev.Manager, a *types.BlockStreamArgs) (*Job, error) {
	for _, p := range []struct {
		nameA, nameB string
		a, b         *string
	}{
		{"base", "base-node", a.Base, a.BaseNode},
		{"base", "bottom", a.Base, a.Bottom},
		{"bottom", "base-node", a.Bottom, a.BaseNode},
	} {
		if p.a != nil && p.b != nil {
			return nil, fmt.Errorf("'%s' and '%s' cannot be specified at the same time", p.nameA, p.nameB)
		}
	}
	return &Job{args: *a, nodes: nodes}, nil
}

func (j *Job) top() *graph.Node   { return j.chain[0] }
func (j *Job) above() *graph.Node { return j.chain[len(j.chain)-1] }

// Find implements blockjob.Job.
func (j *Job) Find() ([]*graph.Node, error) {
	a := &j.args
	top, err := j.nodes.Lookup(&a.Device, &a.Device)
	if err != nil {
		return nil, err
	}
	if j.filterName, err = graph.GivenName(a.FilterNodeName); err != nil {
		return nil, fmt.Errorf("Could not create node: %w", err)
	}
	base, bottom, err := j.findEnd(top)
	if err != nil {
		return nil, err
	}
	end := base
	if bottom != nil {
		end = graph.Now.Below(bottom)
	}
	j.chain = graph.Now.Chain(top, end)
	for _, n := range j.chain {
		if err := n.Blocked(graph.OpStream); err != nil {
			return nil, err
		}
	}
	if base == nil && a.BackingFile != nil {
		return nil, fmt.Errorf("backing file specified, but streaming the entire chain")
	}
	if base != nil {
		if _, _, err := j.nodes.HeaderName(graph.Now, base); err != nil {
			return nil, err
		}
	}
	if j.last = bottom; bottom == nil {
		if j.last = graph.Now.Overlay(top, base); j.last == nil {
			return nil, fmt.Errorf("'%s' is not in the backing chain of '%s'", base.Name(), top.Name())
		}
	}
	return j.chain, nil
}

// findEnd finds the node that the arguments name as the end of what is streamed: the base stays,
// the bottom does not.
func (j *Job) findEnd(top *graph.Node) (base, bottom *graph.Node, err error) {
	switch a := &j.args; {
	case a.Base != nil:
		if base = j.nodes.FindBacking(top, *a.Base); base == nil {
			return nil, nil, fmt.Errorf("Can't find '%s' in the backing chain", *a.Base)
		}
	case a.BaseNode != nil:
		if base, err = j.nodes.Lookup(nil, a.BaseNode); err != nil {
			return nil, nil, err
		}
		if base == top || !graph.Now.InChain(top, base) {
			return nil, nil, fmt.Errorf("Node '%s' is not a backing image of '%s'", *a.BaseNode, a.Device)
		}
	case a.Bottom != nil:
		if bottom, err = j.nodes.Lookup(nil, a.Bottom); err != nil {
			return nil, nil, err
		}
		if bottom.Kind() == graph.Filter {
			return nil, nil, fmt.Errorf("Node '%s' is a filter, use a non-filter node as 'bottom'", *a.Bottom)
		}
		if !graph.Now.InChain(top, bottom) {
			return nil, nil, fmt.Errorf("Node '%s' is not in a chain starting from '%s'", *a.Bottom, a.Device)
		}
	}
	return base, bottom, nil
}

// Enter implements blockjob.Job.
func (j *Job) Enter(ctx context.Context, m *jobs.Manager) (*jobs.Job, error) {
	if err := j.freezable(ctx); err != nil {
		return nil, err // told before the top is made writable, or cannot be
	}
	if err := j.site.MakeWritable(ctx, j.top()); err != nil {
		return nil, err
	}
	return j.site.Enter(ctx, j.top().Graph(), func(tx *graph.Tx) error { return j.fill(tx, m) })
}

// freezable tells why another job does not let the chain be frozen.
func (j *Job) freezable(ctx context.Context) error {
	tx := j.top().Graph().Begin(ctx)
	defer tx.Abort()
	_, err := tx.FreezeChain(j.top(), j.above())
	return err
}

func (j *Job) fill(tx *graph.Tx, m *jobs.Manager) error {
	if err := j.site.FreezeChain(tx, j.top(), j.above()); err != nil {
		return err
	}
	// What the graph does not allow is told before the job is announced.
	var err error
	if j.guests, err = j.site.MakeCopyFilter(tx, j.filterName, j.top()); err != nil {
		return fmt.Errorf("Could not create node: %w", err)
	}
	m.Show(visible.StreamEntered, j.top())
	a := &j.args
	if a.Base != nil { // canonical: nodes by their own names
		a.Base, a.BaseNode = nil, new(graph.Now.Below(j.above()).Name())
	}
	spec := blockjob.Spec(types.JobTypeStream, j, a.JobID, a.Speed, a.AutoFinalize, a.AutoDismiss)
	spec.Nodes, spec.Args = []*graph.Node{j.site.Filter}, a
	if err := j.site.Create(m, spec); err != nil {
		m.Show(visible.StreamRefused, j.top())
		return err
	}
	j.site.BlockAt(tx, append(j.chain[:len(j.chain):len(j.chain)], j.site.Filter)...)
	return j.keep(tx)
}

// keep takes what the job relies on: the right to read and to write unchanged data at the top, no
// resize there, and no writes to what is copied.
func (j *Job) keep(tx *graph.Tx) error {
	const unchanging = perm.ConsistentRead | perm.WriteUnchanged
	uses := []blockjob.Use{
		{Name: "main node", Node: j.site.Filter, Claim: perm.Claim{Share: perm.All}},
		{Name: "active node", Node: j.top(), Claim: perm.Claim{Share: unchanging | perm.Write}},
	}
	for _, n := range j.chain[1:] {
		uses = append(uses, blockjob.Use{Name: "intermediate node", Node: n, Claim: perm.Claim{Share: unchanging}})
	}
	return j.site.Keep(tx, append(uses, blockjob.Use{
		Node: j.site.Filter, Claim: perm.Claim{Need: perm.ConsistentRead, Share: unchanging | perm.Write}, Root: &j.root,
	})...)
}

// Run implements jobs.Runner.
func (j *Job) Run(ctx context.Context, h *jobs.Handle) error {
	top := j.top().SkipFilters()
	if top == j.last {
		return nil // nothing between it and what stays
	}
	size := j.top().Size()
	h.SetRemaining(size)
	c := copier{target: j.site.Filter.FilteredChild(), below: top.Backing(), last: j.last}
	t := copy.Task{
		Gate: copy.RootGate(ctx, j.root), Size: size, Chunk: chunk,
		Guests: j.guests, Look: c.look, Copy: c.copy,
		Operation: types.IoOperationTypeRead, Policy: types.Or(j.args.OnError, types.BlockdevOnErrorReport),
	}
	t.SetWorkers(workers, j.top())
	return copy.Run(h, t)
}

// Prepare implements jobs.Preparer: it removes the filter, makes the backing link of the top skip
// what was copied, and rewrites the image's header, all or nothing.
func (j *Job) Prepare(ctx context.Context, h *jobs.Handle) error {
	g := j.top().Graph()
	hold, err := g.HoldNodes(ctx, j.chain...)
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
	if cow := j.top().SkipFilters().Backing(); cow != nil {
		if err := j.skipCopied(tx, cow); err != nil {
			return err
		}
	}
	below := j.top().NodesBelow()
	if err := tx.Commit(); err != nil {
		return err
	}
	j.site.Filter = nil
	h.Show(visible.StreamLeft, j.top())
	h.Show(visible.StreamCut, below...)
	return nil
}

// skipCopied lets tx make the backing link of the top lead to what stays.
func (j *Job) skipCopied(tx *graph.Tx, cow *graph.Edge) (err error) {
	header := &blockdev.HeaderChange{Node: cow.ParentNode()}
	if base := graph.Now.Below(j.above()); base == nil {
		err = tx.Detach(cow)
	} else {
		a := &j.args
		header.Name, header.Format, err = j.nodes.HeaderNames(base, a.BackingFile, a.BackingMaskProtocol)
		if err == nil && cow.Node() != base {
			err = tx.Replace(cow, base)
		}
	}
	if err != nil {
		return err
	}
	tx.Drain(header.Node)
	tx.Join(header)
	return nil
}

// Clean implements jobs.Cleaner.
func (j *Job) Clean(h *jobs.Handle) {
	hold, _ := j.top().Graph().HoldNodes(context.Background(), j.top()) // none if the graph is closed
	defer hold.Release()
	if j.site.TakeOut(nil) {
		h.Show(visible.StreamFailed, j.top())
	}
	j.site.Release()
}
