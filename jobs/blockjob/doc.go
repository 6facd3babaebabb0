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

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// Nodes finds, names and opens nodes as the arguments of jobs name them; *blockdev.Manager is one.
type Nodes interface {
	// Lookup finds a node by the name of a device or of the node itself.
	Lookup(device, nodeName *string) (*graph.Node, error)
	// LookupIn is Lookup of a node by a device or node name as it is once tx is committed.
	LookupIn(tx *graph.Tx, name string) (*graph.Node, error)
	// LookupRoot is Lookup of a node that nothing but devices and exports uses.
	LookupRoot(name string) (*graph.Node, error)
	// FindDevice is Lookup with an error of the class DeviceNotFound.
	FindDevice(name string) (*graph.Node, error)
	// FindBacking is the node in the backing chain of top whose image has that file name, or nil.
	FindBacking(top *graph.Node, file string) *graph.Node
	// Filename is the node's name as queries show it.
	Filename(n *graph.Node) string
	// HeaderName is how the header of an image names n as its backing file, and the format.
	HeaderName(v graph.View, n *graph.Node) (name, format string, err error)
	// OpenImage opens an image by its file name, or makes it, for a job that then publishes it.
	OpenImage(ctx context.Context, i blockdev.OpenImage) (*blockdev.Opened, error)
	// OpenBacking opens what the header of n's image names as its backing file, and lets tx attach
	// and publish it; nil if the header names none.
	OpenBacking(ctx context.Context, tx *graph.Tx, n *graph.Node) (*blockdev.Opened, error)
}

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
		ID: Or(id, ""), Type: t, Runner: r, Block: true, Speed: Or(speed, 0),
		ManualFinalize: !Or(autoFinalize, true), ManualDismiss: !Or(autoDismiss, true),
	}
}

// Or is what p points to, or the default of an argument that was not given.
func Or[T any](p *T, otherwise T) T {
	if p != nil {
		return *p
	}
	return otherwise
}
