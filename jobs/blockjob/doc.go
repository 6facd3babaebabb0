// Package blockjob is what block jobs have in common: how they start, and their place in the graph.
//
//	Start          the job's nodes are held: Find, Enter; then they are let go, and the job runs
//
//	MakeWritable   a node that is read-only is not, for the time of the job
//	Site.Enter     one transaction: filter, claims, freezes; from its commit on others are kept away
//	...            the job works
//	Leave          in the last transaction of a job that succeeds: claims and freezes are given back
//	Release        the same where there was none; read-only again; others may come
package blockjob

import (
	"context"

	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// Job is a block job that is about to start.
type Job interface {
	// Find looks up the nodes that the job's arguments name, and refuses what cannot be. It is
	// called with nothing held, and again with what it has returned held.
	Find() ([]*graph.Node, error)
	// Enter creates the job and puts it into the graph. On error nothing has changed.
	Enter(ctx context.Context, m *jobs.Manager) (*jobs.Job, error)
}

// Start starts a job; see jobs.Manager.Start for release. As its nodes are held until it is in the
// graph, what Find has seen holds until then: of two jobs that start at the same time one sees the
// other.
func Start(ctx context.Context, g *graph.Graph, m *jobs.Manager, j Job) (release func(), err error) {
	hold, err := g.Hold(ctx, j.Find)
	if err != nil {
		return nil, err
	}
	defer hold.Release()
	mj, err := j.Enter(ctx, m)
	if err != nil {
		return nil, err
	}
	hold.Release() // a job that ends at once holds them itself
	return m.Start(mj), nil
}

// Spec is what the arguments that all block jobs have say.
func Spec(t types.JobType, r jobs.Runner, id *string, speed *int64, autoFinalize, autoDismiss *bool) jobs.Spec {
	return jobs.Spec{
		ID: types.Or(id, ""), Type: t, Runner: r, Block: true, Speed: types.Or(speed, 0),
		ManualFinalize: !types.Or(autoFinalize, true), ManualDismiss: !types.Or(autoDismiss, true),
	}
}
