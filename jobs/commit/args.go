package commit

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/mirror"
	"qblockd/schema/types"
)

// Job is a job of block-commit, before its start and as it runs.
type Job struct {
	args  types.BlockCommitArgs
	nodes *blockdev.Manager
	site  blockjob.Site

	device     *graph.Node // the top of the chain that top and base were found in
	top, base  *graph.Node
	copied     []*graph.Node // from the top to the node directly above the base
	last       *graph.Node   // the last one to be copied: the overlay of the base
	filterName string

	reads, writes *graph.Root // the job's requests, at the top and at the base
}

// FromArgs makes a job that blockjob.Start starts.
func FromArgs(nodes *blockdev.Manager, a *types.BlockCommitArgs) *Job {
	return &Job{args: *a, nodes: nodes}
}

// Find implements blockjob.Job.
func (j *Job) Find() ([]*graph.Node, error) {
	a, err := &j.args, error(nil)
	if j.device, err = j.nodes.LookupRoot(a.Device); err != nil {
		if _, unknown := j.nodes.FindDevice(a.Device); unknown != nil {
			err = unknown // clients tell versions apart by its class
		}
		return nil, err
	}
	if err := j.device.Blocked(graph.OpCommitSource); err != nil {
		return nil, err
	}
	if err := j.findTop(); err != nil {
		return nil, err
	}
	if err := j.findBase(); err != nil {
		return nil, err
	}
	for _, n := range graph.Now.Chain(j.top, graph.Now.Below(j.base)) {
		if err := n.Blocked(graph.OpCommitTarget); err != nil {
			return nil, err
		}
	}
	if j.top == j.base {
		return nil, errors.New("cannot commit an image into itself")
	}
	return graph.Now.Chain(j.device, graph.Now.Below(j.base)), nil
}

// findTop finds the first node to be copied.
func (j *Job) findTop() (err error) {
	a := &j.args
	switch j.top = j.device; {
	case a.TopNode != nil && a.Top != nil:
		return errors.New("'top-node' and 'top' are mutually exclusive")
	case a.TopNode != nil:
		j.top, err = j.inChain(j.device, a.TopNode)
	case a.Top != nil && *a.Top != j.nodes.Filename(j.device):
		if j.top = j.nodes.FindBacking(j.device, *a.Top); j.top == nil {
			return fmt.Errorf("Top image file %s not found", *a.Top)
		}
	}
	return err
}

// findBase finds the node that is copied into.
func (j *Job) findBase() (err error) {
	switch a := &j.args; {
	case a.BaseNode != nil && a.Base != nil:
		return errors.New("'base-node' and 'base' are mutually exclusive")
	case a.BaseNode != nil:
		j.base, err = j.inChain(j.top, a.BaseNode)
	case a.Base != nil:
		if j.base = j.nodes.FindBacking(j.top, *a.Base); j.base == nil {
			return fmt.Errorf("Can't find '%s' in the backing chain", *a.Base)
		}
	default:
		j.base = graph.Now.Overlay(j.top, nil)
	}
	return err
}

func (j *Job) inChain(above *graph.Node, name *string) (*graph.Node, error) {
	n, err := j.nodes.Lookup(nil, name)
	if err == nil && !graph.Now.InChain(above, n) {
		err = fmt.Errorf("'%s' is not in this backing file chain", *name)
	}
	return n, err
}

// Enter implements blockjob.Job. With somebody who writes to the top the job is a mirror.
func (j *Job) Enter(ctx context.Context, m *jobs.Manager) (_ *jobs.Job, err error) {
	a := &j.args
	if j.filterName, err = graph.GivenName(a.FilterNodeName); err != nil {
		return nil, err
	}
	active := j.top.SkipFilters() == j.device.SkipFilters()
	written := active || j.top.Claim().Need&perm.Write != 0
	switch {
	case a.BackingFile != nil && active:
		return nil, errors.New("'backing-file' specified, but 'top' is the active layer")
	case a.BackingFile != nil && written:
		return nil, errors.New("'backing-file' specified, but 'top' has a writer on it")
	}
	// Canonical: nodes by their own names.
	a.Top, a.TopNode, a.Base, a.BaseNode = nil, new(j.top.Name()), nil, new(j.base.Name())
	if written {
		return mirror.EnterCommit(ctx, m, j.top, j.base, a)
	}
	if err := graph.Now.Overlay(j.device, j.top).Blocked(graph.OpCommitTarget); err != nil {
		return nil, err
	}
	if _, _, err := j.nodes.HeaderName(graph.Now, j.base); err != nil {
		return nil, err
	}
	return j.enter(ctx, m)
}
